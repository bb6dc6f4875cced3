"""Events reach the API server as it wants them, and harm nobody when it does not take them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from structlog.testing import capture_logs

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings
from ebpf_svc.events import Event, EventType, ObjectRef
from ebpf_svc.watch.kube import events
from ebpf_svc.watch.kube.connection import ApiServer
from ebpf_svc.watch.kube.events import KEPT, NOTE_BYTES, ApiSink
from tests.lib.waiting import eventually

WEB = ObjectRef("Service", "shop", "web")
NODE = ObjectRef("Node", "", "node1")
Fault = MockApiServer.Fault


def event(about: ObjectRef = WEB, note: str = "why", count: int = 1) -> Event:
    return Event(about, EventType.WARNING, "Invalid", note, "Read", count)


@pytest.fixture
def server() -> Iterator[MockApiServer]:
    mock = MockApiServer().start()
    yield mock
    mock.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "FIRST_RETRY_S", 0.02)


@contextmanager
def sending(server: MockApiServer) -> Iterator[ApiSink]:
    client = ApiServer(KubernetesSettings(master=server.url, qps=-1))
    sink = ApiSink(client, "node1")
    sink.start()
    yield sink
    sink.stop()
    client.close()


def notes(server: MockApiServer) -> list[str]:
    return [item["note"] for item in server.created]


def test_event_is_created_on_its_object(server: MockApiServer) -> None:
    """What events.k8s.io/v1 requires, in the namespace of the object; a Node's in default."""
    with sending(server) as sink:
        sink.send(event())
        sink.send(event(NODE, count=7))
        eventually(lambda: len(server.created), until=lambda count: count == 2)
    of_web, of_node = server.created
    assert [request.path for request in server.requests] == [
        "/apis/events.k8s.io/v1/namespaces/shop/events",
        "/apis/events.k8s.io/v1/namespaces/default/events",
    ]
    assert of_web["regarding"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "namespace": "shop",
        "name": "web",
        "uid": "shop/web",
    }
    wanted = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "reason": "Invalid",
        "type": "Warning",
        "note": "why",
        "action": "Read",
        "reportingController": "ebpf-svc.io/ebpf-svc",
        "reportingInstance": "node1",
    }
    assert wanted.items() <= of_web.items()
    assert "series" not in of_web
    assert of_web["metadata"]["namespace"] == "shop"
    assert of_web["metadata"]["name"].startswith("web.")
    assert of_node["regarding"]["uid"] == "node1"
    assert "namespace" not in of_node["regarding"]
    assert of_node["metadata"]["namespace"] == "default"
    assert of_node["series"] == {"count": 7, "lastObservedTime": of_node["eventTime"]}


def test_long_note_is_cut(server: MockApiServer) -> None:
    """The API server refuses more than 1024 bytes; letters stay whole."""
    with sending(server) as sink:
        sink.send(event(note="x" + "ü" * 1000))
        eventually(lambda: notes(server), until=bool)
    assert notes(server) == ["x" + "ü" * ((NOTE_BYTES - 1) // 2)]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_gets_the_event_later(server: MockApiServer, status: int) -> None:
    """Nothing is lost for a moment of trouble."""
    server.faults.append(Fault(status=status, times=2))
    with sending(server) as sink:
        sink.send(event())
        eventually(lambda: notes(server), until=bool)
    assert (notes(server), len(server.requests)) == (["why"], 3)


@pytest.mark.parametrize("status", [403, 404, 410, 422])
def test_refused_event_is_dropped_and_said(server: MockApiServer, status: int) -> None:
    """Without the right to create Events the agent works on, and its log has them."""
    server.faults.append(Fault(status=status, message="no"))
    with capture_logs() as lines, sending(server) as sink:
        sink.send(event())
        sink.send(event(NODE, "next"))
        eventually(lambda: notes(server), until=bool)
    assert notes(server) == ["next"]
    (line,) = [line for line in lines if line["event"] == "event.dropped"]
    assert (line["object"], line["reason"], line["details"]) == (
        "Service shop/web",
        "Invalid",
        "why",
    )


def test_newest_events_wait_for_an_absent_server(server: MockApiServer) -> None:
    """Sending returns at once; after an outage the latest hundred arrive."""
    server.stop()
    with sending(server) as sink:
        begun_s = time.monotonic()
        for number in range(KEPT + 50):
            sink.send(event(note=str(number)))
        assert time.monotonic() - begun_s < 0.5
        server.start()
        eventually(lambda: notes(server)[-1:], until=lambda last: last == [str(KEPT + 49)])
    assert len(notes(server)) in (KEPT, KEPT + 1)


def test_stop_does_not_wait_for_an_absent_server(server: MockApiServer) -> None:
    """An agent that ends has no time for Events."""
    server.stop()
    with sending(server) as sink:
        for number in range(KEPT):
            sink.send(event(note=str(number)))
        begun_s = time.monotonic()
        sink.stop()
    assert time.monotonic() - begun_s < 2 * events.STOP_S
