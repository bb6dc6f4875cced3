"""Events with names: records, lines, and who is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from ebpf_svc.dataplane.inspect import FlowEvent, Happening
from ebpf_svc.host.callers import Namespace
from ebpf_svc.model.desired import FrontendKey, FrontendKind
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.monitor import view as views
from ebpf_svc.monitor.view import Clients, Names, View, Wanted
from ebpf_svc.monitor.words import REASONS, reason_in_words
from ebpf_svc.status import STATE

VIP = FrontendKey("10.96.0.1", 80, Protocol.TCP)
HOST, POD, GONE = 1, 4711, 999


def _event(what: Happening = Happening.OPENED, **fields: object) -> FlowEvent:
    given = {
        "time_s": 1_700_000_000.25, "client": "10.244.1.5", "client_port": 40000, "netns": 0,
        "frontend": VIP, "backend": ("10.244.2.7", 8080), "reason": "", "device": 0, **fields,
    }  # fmt: skip
    return FlowEvent(what=what, **given)  # type: ignore[arg-type]


def _namespaces() -> Mapping[int, Namespace]:
    return {
        HOST: Namespace(HOST, ("172.18.0.2", "fd00::2")),
        POD: Namespace(POD, ("fd00:10:244::5", "10.244.1.9")),
    }


def _write_names(run_dir: Path, name: str) -> None:
    plan = {
        "namespace": "shop", "name": name, "port": "http", "protocol": "TCP", "family": 4,
        "frontends": [["10.96.0.1", 80, int(FrontendKind.CLUSTER_IP)]],
    }  # fmt: skip
    scratch = run_dir / "new"
    scratch.write_text(json.dumps({"revision": 1, "plans": [plan]}))
    os.replace(scratch, run_dir / STATE)  # noqa: PTH105


@pytest.fixture
def view(tmp_path: Path) -> View:
    _write_names(tmp_path, "web")
    return View(Names(tmp_path), Clients(HOST, _namespaces))


def test_packet_is_told_with_its_ends(view: View) -> None:
    """Client, service, frontend, endpoint."""
    record = view.record(_event(masquerade=True))
    assert (record["service"], record["client"], record["at"]) == (
        "shop/web:http", "10.244.1.5:40000", "packet"
    )  # fmt: skip
    assert (record["frontend"], record["backend"]) == ("10.96.0.1:80/TCP", "10.244.2.7:8080")
    assert record["time"] == "2023-11-14T22:13:20.250000+00:00"
    assert record["masquerade"]


@pytest.mark.parametrize(
    ("netns", "client", "addresses"),
    [
        (HOST, "node", ["172.18.0.2"]),
        (POD, "10.244.1.9", ["10.244.1.9"]),
        (GONE, "namespace 999", []),
    ],
)
def test_socket_is_told_by_whose_namespace_it_is(
    view: View, netns: int, client: str, addresses: list[str]
) -> None:
    """By the address of the family that is called."""
    record = view.record(_event(netns=netns, client="", client_port=0))
    assert (record["client"], record["client_addresses"]) == (client, addresses)
    assert record["at"] == "socket"


def test_unknown_namespaces_are_looked_for_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking costs milliseconds, and a flood of sockets may come from one that is gone."""
    looks: list[int] = []

    def look() -> Mapping[int, Namespace]:
        looks.append(1)
        return {}

    clients = Clients(HOST, look)
    for _ in range(10):
        assert clients.addresses(GONE, Family.V4) == ()
    assert len(looks) == 1
    monkeypatch.setattr(views, "LOOK_AGAIN_S", 0.0)
    clients.addresses(GONE, Family.V4)
    assert len(looks) == 2


def test_names_follow_what_the_agent_writes(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frontend that gets another Service, or is gone."""
    assert view.record(_event())["service"] == "shop/web:http"
    monkeypatch.setattr(views, "LOOK_AGAIN_S", 0.0)
    _write_names(tmp_path, "other")
    assert view.record(_event())["service"] == "shop/other:http"
    stranger = VIP._replace(port=81)
    assert view.record(_event(frontend=stranger))["service"] == "?"


def test_line_says_why(view: View) -> None:
    """A drop with its reason; columns stay under each other."""
    first = _event(Happening.DROPPED, backend=None, reason="source_range")
    line = view.line(first, view.record(first))
    assert "dropped    shop/web:http" in line
    assert line.endswith("10.96.0.1:80/TCP  (the client is in none of the load balancer's source "
                         "ranges)")  # fmt: skip
    second = _event(netns=HOST, client="", client_port=0)
    other = view.line(second, view.record(second))
    assert other.index("10.96.0.1") == line.index("10.96.0.1")
    assert other.endswith("-> 10.244.2.7:8080  (at connect)")


def test_every_drop_has_a_sentence() -> None:
    """A reason without one is printed as its own word."""
    from ebpf_svc.dataplane.ebpf.constants import Drop

    assert {drop.name.lower() for drop in Drop} <= REASONS.keys()
    assert reason_in_words("some_thing") == "some thing"
    assert reason_in_words("") == ""


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        (Wanted(), True),
        (Wanted(service="shop/web"), True),
        (Wanted(service="shop/web:http"), True),
        (Wanted(service="shop/web:https"), False),
        (Wanted(service="shop/we"), False),
        (Wanted(client="10.244.1.5"), True),
        (Wanted(client="10.244.1.50"), False),
        (Wanted(only_drops=True), False),
    ],
)
def test_filters(view: View, wanted: Wanted, shown: bool) -> None:
    """Service, one port of it, client, drops only."""
    event = _event()
    assert wanted.admits(event, view.record(event)) is shown
    bad = _event(Happening.REFUSED)
    assert Wanted(only_drops=True).admits(bad, view.record(bad))
