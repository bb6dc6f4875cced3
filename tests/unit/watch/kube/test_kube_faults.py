"""Following an API server that does not behave. Rules W1-W6, M4; 7.15 of what users complain of."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.watch.kube import reflector
from tests.lib import apiserver as api
from tests.lib.apiserver import Seen, watching
from tests.lib.waiting import eventually, wait_out

Fault = MockApiServer.Fault


@contextmanager
def settled(server: MockApiServer, **settings: object) -> Iterator[Seen]:
    """A source that has listed everything and watches."""
    with watching(server, **settings) as seen:
        seen.serves("shop/web")
        for kind in ("Service", "EndpointSlice", "Node", "ServiceCIDR"):
            eventually(lambda kind=kind: server.watchers(kind))
        yield seen


def lists_of(seen: Seen) -> int:
    return seen.source.progress["Service"].lists


def test_server_away_leaves_everything_as_it_was(server: MockApiServer) -> None:
    """An outage, however long, changes nothing; within a second of the return all is right."""
    with settled(server) as seen:
        before = seen.now
        server.stop()
        wait_out(0.5)
        assert seen.now is before
        # What happens meanwhile, a deletion included, is learned on return.
        server.put("Service", api.service("shop/api"))
        server.delete("Service", "shop", "web")
        returned_s = time.monotonic()
        server.start()
        seen.serves("shop/api", within_s=1.0)
        assert time.monotonic() - returned_s < 1.0
        assert lists_of(seen) == 1, "a resumed watch is enough"


def test_server_restarted_without_its_history_is_listed_again(
    server: MockApiServer, streaming_lists: bool
) -> None:
    """410 Gone: deletions nobody saw are noticed, what is equal keeps its identity."""
    with settled(server, streaming_lists=streaming_lists) as seen:
        server.put("Service", api.service("shop/api", "10.96.0.11"))
        seen.serves("shop/web", "shop/api")
        before = seen.becomes(bool)
        server.stop()
        server.delete("Service", "shop", "api")
        server.put("EndpointSlice", api.endpoint_slice("shop/web-b", "10.244.9.9"))
        server.forget_history()
        server.start()
        seen.serves("shop/web", within_s=2.0)
        seen.reaches("10.244.2.1", "10.244.9.9")
        after = seen.becomes(bool)
        assert lists_of(seen) == 2
        (name,) = after.services
        assert after.services[name] is before.services[name]


def test_state_never_shrinks_while_it_is_listed_again(server: MockApiServer) -> None:
    """No gap: a relist replaces the state in one step, however slowly it comes."""
    server.put("Service", *(api.service(f"many/s{i}", f"10.97.0.{i}") for i in range(10)))
    whole = {"shop/web", *(f"many/s{i}" for i in range(10))}
    with watching(server, streaming_lists=False, page_size=2) as seen:
        seen.serves(*whole)
        server.forget_history()
        server.piece_bytes, server.piece_pause_s = 300, 0.005
        server.kill_connections()
        deadline_s = time.monotonic() + 5
        while lists_of(seen) < 2 and time.monotonic() < deadline_s:
            assert seen.services == whole
        assert lists_of(seen) == 2


def test_list_that_expires_between_pages_is_begun_again(server: MockApiServer) -> None:
    """410 on a continue token: from the start, in one piece so that it cannot expire again."""
    server.put("Service", *(api.service(f"many/s{i}", f"10.97.0.{i}") for i in range(5)))
    server.faults.append(Fault("limit=2&continue", status=410, times=1))
    with watching(server, streaming_lists=False, page_size=2) as seen:
        seen.serves("shop/web", *(f"many/s{i}" for i in range(5)))
    asked = [r.query.get("limit") for r in server.requests if r.path.endswith("/services")]
    assert asked[:3] == ["2", "2", None]


def test_watch_refused_with_http_410_is_listed_again(server: MockApiServer) -> None:
    """The same as an ERROR event that says so."""
    with settled(server) as seen:
        server.faults.append(Fault("services", status=410))
        server.kill_connections()
        eventually(lambda: lists_of(seen) == 2)


def test_half_a_line_is_as_good_as_none(server: MockApiServer) -> None:
    """A connection cut in the middle of an event: the event comes again, whole."""
    with settled(server) as seen:
        server.inject("Service", b'{"type":"DELETED","object":{"metadata":{"namespace":"shop","na')
        wait_out(0.1)
        server.kill_connections()
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")
        assert lists_of(seen) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"<html>502 Bad Gateway</html>\n",
        b'{"type":"ADDED"\n',
        b"[]\n",
        b"{}\n",
        b'{"type":"ADDED","object":7}\n',
        b"\xff\xfe\n",
    ],
)
def test_line_that_is_no_event_ends_the_watch_not_the_agent(
    server: MockApiServer, text: bytes
) -> None:
    """Somebody in between answered; the watch is resumed."""
    with settled(server) as seen:
        server.inject("Service", text)
        eventually(lambda: sum("services" in r.path for r in server.requests) > 1)
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")


def test_object_of_the_wrong_shape_is_named_and_the_rest_goes_on(server: MockApiServer) -> None:
    """Skipped if it was never good; its last good state stays in force otherwise."""
    with settled(server) as seen:
        good = seen.becomes(bool).services
        server.put("Service", api.service("shop/web", ports="eighty"))
        server.put("Service", api.service("shop/bad", ports=[{"port": "http"}]))
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")
        assert seen.becomes(bool).services["shop", "web"] is good["shop", "web"]
        assert seen.problems == [
            'Service shop/bad: spec.ports[0].port: Invalid value: "http": must be an integer',
            'Service shop/web: spec.ports: Invalid value: "eighty": must be a list',
        ]
        server.put("Service", api.service("shop/web", "10.96.0.77"))
        server.delete("Service", "shop", "bad")
        seen.becomes(lambda s: s.services["shop", "web"].cluster_ips == ("10.96.0.77",))
        eventually(lambda: seen.problems == [])


def test_object_of_the_wrong_shape_in_a_list_is_named(
    server: MockApiServer, streaming_lists: bool
) -> None:
    """The same in a first list; after a relist its last good state still stands."""
    server.put("EndpointSlice", api.endpoint_slice("shop/bad", endpoints={"no": "list"}))
    with settled(server, streaming_lists=streaming_lists) as seen:
        eventually(lambda: seen.problems)
        assert [p.split(":")[:2] for p in seen.problems] == [
            ["EndpointSlice shop/bad", " endpoints"]
        ]
        seen.reaches("10.244.2.1")
        server.stop()
        server.put("EndpointSlice", api.endpoint_slice("shop/web-a", ports=5))
        server.put("EndpointSlice", api.endpoint_slice("shop/web-b", "10.244.3.3"))
        server.forget_history()
        server.start()
        seen.reaches("10.244.2.1", "10.244.3.3")
        assert len(seen.problems) == 2


def test_deletion_of_the_unknown_is_nothing(server: MockApiServer) -> None:
    """M6: and an event for an object without a name harms nobody."""
    with settled(server) as seen:
        before = seen.now
        for text in (
            b'{"type":"DELETED","object":{"metadata":{"namespace":"x","name":"y"}}}\n',
            b'{"type":"DELETED","object":{"metadata":null}}\n',
            b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"9"}}}\n',
            b'{"type":"NOVELTY","object":{"metadata":{"resourceVersion":"9"},"spec":[]}}\n',
        ):
            server.inject("EndpointSlice", text)
            server.inject("Service", text)
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")
        assert before is not None
        assert seen.becomes(bool).slices == before.slices


def test_nothing_but_bookmarks_is_peace(server: MockApiServer) -> None:
    """A quiet cluster: no event, no request, no change."""
    with settled(server, silence_s=0.8) as seen:
        before, asked = seen.now, len(server.requests)
        for _ in range(10):
            server.bookmark()
            wait_out(0.1)
        assert seen.now is before
        assert [r.path for r in server.requests[asked:]] == []


def test_silence_is_asked_about(server: MockApiServer) -> None:
    """7.15: a watch whose other end died without a word is replaced, and nothing is listed."""
    with settled(server, silence_s=0.3) as seen:
        asked = len(server.requests)
        eventually(lambda: len(server.requests) > asked)
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")
        assert lists_of(seen) == 1


def test_frozen_server_is_followed_when_it_thaws(server: MockApiServer) -> None:
    """A server that hangs with open connections costs one silence, not the agent."""
    with settled(server, silence_s=0.5) as seen:
        server.freeze()
        server.put("Service", api.service("shop/api"))
        wait_out(0.3)
        assert seen.services == {"shop/web"}
        server.thaw()
        seen.serves("shop/web", "shop/api")


def test_slow_list_is_waited_for(server: MockApiServer, streaming_lists: bool) -> None:
    """Slow bytes are not silence."""
    server.piece_bytes, server.piece_pause_s = 100, 0.02
    with watching(server, streaming_lists=streaming_lists, silence_s=0.3) as seen:
        seen.serves("shop/web", within_s=10)
        assert lists_of(seen) == 1


def test_server_in_trouble_is_asked_again(server: MockApiServer, streaming_lists: bool) -> None:
    """5xx, a balancer's HTML included: soon, but not at once."""
    statuses = (500, 502, 503, 504)
    server.faults += [Fault(status=status, body=b"<html>502</html>") for status in statuses]
    with watching(server, streaming_lists=streaming_lists) as seen:
        seen.serves("shop/web")
    assert [fault.times for fault in server.faults] == [0, 0, 0, 0]


def test_busy_server_says_when(server: MockApiServer) -> None:
    """429: Retry-After is obeyed, though the other kinds were let in."""
    server.faults.append(Fault("/services", status=429, headers={"Retry-After": "1"}))
    with watching(server) as seen:
        started_s = time.monotonic()
        seen.serves("shop/web")
        assert time.monotonic() - started_s >= 0.95


def test_server_away_is_tried_by_one_request_at_a_time(server: MockApiServer) -> None:
    """A thousand nodes after an outage: one attempt a node and pause, not one a kind."""
    with settled(server):
        asked = len(server.requests)
        server.faults.append(Fault(status=503, times=10**6))
        server.kill_connections()
        wait_out(0.6)
        assert 3 <= len(server.requests) - asked <= 16


def test_kind_that_is_forbidden_does_not_hold_the_others(
    server: MockApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W5: a missing permission is that kind's trouble; granted later, it is found."""
    monkeypatch.setattr(reflector, "FIRST_REFUSAL_S", 0.1)
    server.faults.append(Fault("endpointslices", status=403, times=2))
    with watching(server, streaming_lists=False) as seen:
        eventually(lambda: seen.source.progress["Service"].is_watching)
        assert seen.now is None
        seen.reaches("10.244.2.1")


def test_version_from_the_future_is_listed_again(server: MockApiServer) -> None:
    """etcd restored from a backup: versions went back, and the server times out (504)."""
    with settled(server) as seen:
        said = "Timeout: Too large resource version: 9999, current: 5"
        server.faults.append(Fault("services", status=504, message=said))
        server.kill_connections()
        eventually(lambda: lists_of(seen) == 2)


def test_error_event_other_than_expiry_is_listed_again(server: MockApiServer) -> None:
    """A watch cache that lost its place says so in an ERROR event."""
    with settled(server) as seen:
        error = b'{"type":"ERROR","object":{"kind":"Status","status":"Failure","code":%d}}\n'
        server.inject("Service", error % 500)
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")
        server.inject("Service", error % 410)
        eventually(lambda: lists_of(seen) == 2)


def test_answer_that_is_no_list_is_asked_again(server: MockApiServer) -> None:
    """A captive portal answers 200."""
    server.faults.append(Fault("services", status=200, body=b"<html>log in</html>", times=2))
    with watching(server, streaming_lists=False) as seen:
        seen.serves("shop/web")
        assert seen.problems == []


def test_watch_that_ends_at_once_is_not_asked_for_in_a_loop(server: MockApiServer) -> None:
    """A balancer that closes every watch must not be hammered."""
    with settled(server):
        server.faults.append(Fault("watch", status=200, body=b"", times=10**6))
        server.kill_connections()
        asked = len(server.requests)
        wait_out(0.6)
        # Four kinds, and pauses that grow to 0.1 s, at least half of it.
        assert len(server.requests) - asked <= 4 * 14


def test_server_that_never_answered_is_found_when_it_comes() -> None:
    """Started before the API server: nothing is planned until it is there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = MockApiServer()
    server.port = port
    try:
        with watching(server) as seen:
            wait_out(0.5)
            assert seen.now is None
            server.start()
            server.put("Node", api.node())
            server.put("Service", api.service("shop/web"))
            seen.serves("shop/web", within_s=1.5)
    finally:
        server.close()


def test_events_lost_nowhere_while_connections_break(server: MockApiServer) -> None:
    """Churn with a connection killed every few events ends in the server's state."""
    with settled(server) as seen:
        for i in range(60):
            server.put("EndpointSlice", api.endpoint_slice(f"shop/s{i % 7}", f"10.244.7.{i}"))
            if i % 5 == 0:
                server.delete("EndpointSlice", "shop", f"s{i % 7}")
            if i % 9 == 0:
                server.kill_connections()
            if i % 20 == 19:
                server.forget_history()
        expected = {"10.244.2.1", *(f"10.244.7.{i}" for i in range(53, 60) if i % 5)}
        # 55 was deleted right after it was put; the others are each slice's last state.
        seen.reaches(*expected)
