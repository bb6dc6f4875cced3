"""The relay with real connections over the loopback device."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ebpf_svc.config.userspace import UserspaceSettings
from ebpf_svc.dataplane.userspace.stream import BUFFER_BYTES
from ebpf_svc.model.net import Protocol
from tests.lib.waiting import eventually
from tests.unit.dataplane.userspace.conftest import Site, plan_of

LARGE_BYTES = 100 << 20


def echo(conn: socket.socket) -> None:
    while data := conn.recv(1 << 16):
        conn.sendall(data)


def greet(name: bytes):  # type: ignore[no-untyped-def]  # a server that says who it is
    def serve(conn: socket.socket) -> None:
        conn.sendall(name)

    return serve


def test_bytes_pass_both_ways(site: Site) -> None:
    """What the client sends the backend gets, and the other way round."""
    conn = site.connect(site.serve(plan_of(site.listen(echo))))
    conn.sendall(b"hello")
    assert conn.recv(100) == b"hello"
    assert site.relay.call(site.relay.stream_count) == 1
    conn.close()
    eventually(lambda: site.relay.call(site.relay.stream_count), until=(0).__eq__)
    assert site.relay.fds == 0


def test_half_closed_connection_goes_on_the_other_way(site: Site) -> None:
    """A client that has said all may still hear all: each direction ends for itself."""

    def answer_at_the_end(conn: socket.socket) -> None:
        digest = hashlib.sha256()
        while data := conn.recv(1 << 16):
            digest.update(data)
        time.sleep(0.1)
        conn.sendall(digest.digest())

    conn = site.connect(site.serve(plan_of(site.listen(answer_at_the_end))))
    request = os.urandom(300_000)
    conn.sendall(request)
    conn.shutdown(socket.SHUT_WR)
    assert conn.recv(100) == hashlib.sha256(request).digest()
    assert conn.recv(100) == b""
    eventually(lambda: site.relay.fds, until=(0).__eq__)


@pytest.mark.parametrize("splices", [True, False])
def test_much_data_arrives_whole(site: Site, splices: bool) -> None:
    """100 MB there and back are the same bytes, with and without pipes."""
    if not splices:
        site.relay.pipe = lambda: None  # type: ignore[method-assign]  # as when files are scarce
    conn = site.connect(site.serve(plan_of(site.listen(echo))))
    block = os.urandom(1 << 20)
    sent = hashlib.sha256()

    def send() -> None:
        for _ in range(LARGE_BYTES >> 20):
            conn.sendall(block)
        conn.shutdown(socket.SHUT_WR)

    for _ in range(LARGE_BYTES >> 20):
        sent.update(block)
    sender = threading.Thread(target=send)
    sender.start()
    got, count = hashlib.sha256(), 0
    while data := conn.recv(1 << 18):
        got.update(data)
        count += len(data)
    sender.join()
    assert (count, got.digest()) == (LARGE_BYTES, sent.digest())
    eventually(lambda: site.relay.fds, until=(0).__eq__)


def test_client_that_does_not_read_holds_its_backend_only(site: Site) -> None:
    """Back-pressure: the sender is slowed, the relay's memory stays, others are served."""
    sent = 0

    def pour(conn: socket.socket) -> None:
        nonlocal sent
        block = bytes(1 << 20)
        for _ in range(LARGE_BYTES >> 20):
            conn.sendall(block)
            sent += len(block)

    pouring = site.serve(plan_of(site.listen(pour)))
    slow = site.connect(pouring)
    eventually(lambda: sent > 0)
    last = -1
    while last != sent:
        last = sent
        time.sleep(0.3)
    assert sent < LARGE_BYTES
    (stream,) = site.relay.call(lambda: list(site.relay.streams()))
    assert all(len(pump._held) <= BUFFER_BYTES for pump in stream.pumps)
    # Another client of the same relay has its own pace.
    quick, count = site.connect(pouring), 0
    while data := quick.recv(1 << 18):
        count += len(data)
    assert count == LARGE_BYTES
    slow_count = 0
    while data := slow.recv(1 << 18):
        slow_count += len(data)
    assert slow_count == LARGE_BYTES


def test_many_connections_at_once(site: Site) -> None:
    """500 clients together, each with its own answer."""
    port = site.serve(plan_of(site.listen(echo)))
    conns = [site.connect(port) for _ in range(500)]
    for number, conn in enumerate(conns):
        conn.sendall(f"client {number}".encode())
    assert [conn.recv(100) for conn in conns] == [
        f"client {number}".encode() for number in range(500)
    ]
    assert site.relay.call(site.relay.stream_count) == 500
    for conn in conns:
        conn.close()
    eventually(lambda: site.relay.fds, until=(0).__eq__)


def test_refused_connection_goes_to_another_backend(site: Site) -> None:
    """A backend that refuses costs the client nothing (U5)."""
    port = site.serve(plan_of(site.closed_port(), site.listen(greet(b"other"))))
    assert {site.connect(port).recv(100) for _ in range(8)} == {b"other"}
    assert site.relay.counts.retries > 0


def test_silent_backend_is_left_after_its_time(site: Site) -> None:
    """A backend that does not answer is given up after 250 ms, then another is tried (U5)."""
    full = site.stack.enter_context(socket.socket())
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    number = full.getsockname()[1]
    fillers = [site.stack.enter_context(socket.socket()) for _ in range(8)]
    for each in fillers:
        each.setblocking(False)
        each.connect_ex(("127.0.0.1", number))
    port = site.serve(plan_of(number, site.listen(greet(b"other"))))
    took = []
    for _ in range(2):
        begun = time.monotonic()
        assert site.connect(port).recv(100) == b"other"
        took.append(time.monotonic() - begun)
    assert max(took) > 0.2
    assert max(took) < 1


def test_client_is_reset_when_no_backend_answers(site: Site) -> None:
    """Four attempts, then the end, which the client can tell from an answer (U5)."""
    port = site.serve(plan_of(site.closed_port()))
    with pytest.raises(ConnectionResetError):
        site.connect(port).recv(100)
    assert (site.relay.counts.failed, site.relay.counts.retries) == (1, 3)
    eventually(lambda: site.relay.fds, until=(0).__eq__)
    # Each attempt's socket is closed.
    assert site.relay._own == set()


def test_reset_of_the_backend_reaches_the_client(site: Site) -> None:
    """A broken connection must not look like a finished one."""

    def break_off(conn: socket.socket) -> None:
        conn.recv(1)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    conn = site.connect(site.serve(plan_of(site.listen(break_off))))
    conn.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        conn.recv(100)


def test_closed_door_refuses_and_open_connections_go_on(site: Site) -> None:
    """A service that goes takes no new client; those it has stay (P12)."""
    port = site.serve(plan_of(site.listen(echo)))
    conn = site.connect(port)
    conn.sendall(b"1")
    assert conn.recv(10) == b"1"
    site.relay.call(site.relay.close_door, site.door)
    with pytest.raises(ConnectionRefusedError):
        site.connect(port)
    conn.sendall(b"2")
    assert conn.recv(10) == b"2"


def test_endpoint_that_is_a_door_does_not_loop(site: Site) -> None:
    """A service whose endpoint is its own address ends, it does not call itself for ever."""
    port = site.serve(plan_of(1))
    site.serve(plan_of(port))
    with pytest.raises(ConnectionResetError):
        site.connect(port).recv(100)
    assert 1 <= site.relay.counts.loops <= 8
    eventually(lambda: site.relay.fds, until=(0).__eq__)


def test_limit_of_files_makes_clients_wait(site: Site) -> None:
    """With no file left new clients stay in the queue until others go; nothing breaks."""
    port = site.serve(plan_of(site.listen(echo)))
    site.relay._limit = 8
    first = [site.connect(port) for _ in range(3)]
    for conn in first:
        conn.sendall(b"x")
        assert conn.recv(10) == b"x"
    waiting = site.connect(port)
    waiting.sendall(b"y")
    waiting.settimeout(0.3)
    with pytest.raises(TimeoutError):
        waiting.recv(10)
    assert site.relay.counts.limited > 0
    first[0].close()
    waiting.settimeout(5)
    assert waiting.recv(10) == b"y"


def test_thread_that_computes_gives_way_to_the_relay(site: Site) -> None:
    """Python's threads take shorter turns while the relay runs, and as before when it has ended."""
    usual_s = 0.005
    assert sys.getswitchinterval() < usual_s / 10
    site.relay.stop()
    assert sys.getswitchinterval() == pytest.approx(usual_s)


def test_backends_take_turns(site: Site) -> None:
    """Each of three backends gets the same share (U4)."""
    names = (b"a", b"b", b"c")
    port = site.serve(plan_of(*(site.listen(greet(name)) for name in names)))
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: site.connect(port).recv(10), range(30)))
    assert [got.count(name) for name in names] == [10, 10, 10]


# -- datagrams -------------------------------------------------------------------------------------


def test_datagrams_of_a_client_keep_their_backend_until_idle(site: Site) -> None:
    """One client, one backend, while datagrams come; after silence the way is forgotten (U6)."""
    ports = [site.echo_datagrams(name) for name in (b"a", b"b")]
    door = site.serve(plan_of(*ports, protocol=Protocol.UDP))
    client = site.datagrams(door)
    got = set()
    for _ in range(5):
        client.send(b"?")
        got.add(client.recv(100))
        time.sleep(0.1)
    assert len(got) == 1
    assert site.relay.fds == 1
    eventually(lambda: site.relay.fds, until=(0).__eq__, within_s=2)
    client.send(b"?")
    assert client.recv(100)[1:] == b"?"


def test_largest_datagrams_pass(site: Site) -> None:
    """64 KiB, where kube-proxy cut at 4096 bytes (U6)."""
    client = site.datagrams(site.serve(plan_of(site.echo_datagrams(b""), protocol=Protocol.UDP)))
    sent = os.urandom(65_507)
    client.send(sent)
    assert client.recv(1 << 16) == sent


def test_datagram_flow_moves_when_its_backend_goes(site: Site) -> None:
    """A flow ends with its endpoint and stays while that one drains (C5, C7)."""
    old, new = site.echo_datagrams(b"old"), site.echo_datagrams(b"new")
    client = site.datagrams(site.serve(plan_of(old, protocol=Protocol.UDP)))

    def ask() -> bytes:
        client.send(b"")
        return client.recv(100)

    assert ask() == b"old"
    site.serve(plan_of(old, new, protocol=Protocol.UDP, draining=(old,)))
    assert ask() == b"old"
    site.serve(plan_of(new, protocol=Protocol.UDP))
    assert ask() == b"new"


def test_backend_that_goes_answers_what_it_was_asked(site: Site) -> None:
    """Its answer is on its way when the plan changes: the client gets it, and no other (C7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as old:
        old.bind(("127.0.0.1", 0))
        old.settimeout(5)
        client = site.datagrams(site.serve(plan_of(old.getsockname()[1], protocol=Protocol.UDP)))
        client.send(b"?")
        _, asker = old.recvfrom(10)
        site.serve(plan_of(site.echo_datagrams(b"new"), protocol=Protocol.UDP))
        old.sendto(b"old", asker)
        assert client.recv(10) == b"old"
        client.send(b"")
        assert client.recv(10) == b"new"
    eventually(lambda: site.relay.fds, until=(0).__eq__)


def test_refused_datagram_goes_elsewhere(site: Site) -> None:
    """What a backend refuses ends its flow; the client's next datagram finds another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        closed = int(sock.getsockname()[1])
    ports = (closed, site.echo_datagrams(b"ok"))
    door = site.serve(plan_of(*ports, protocol=Protocol.UDP))
    clients = [site.datagrams(door) for _ in range(4)]
    for client in clients:
        client.send(b"")
    time.sleep(0.1)
    for client in clients:
        client.send(b"")
        assert client.recv(100) == b"ok"


def test_new_client_gets_the_file_of_the_longest_silent() -> None:
    """Where files are scarce nobody's first datagram is lost: the longest silence ends (U6)."""
    site = Site(UserspaceSettings(udp_idle_s=60))
    try:
        door = site.serve(plan_of(site.echo_datagrams(b""), protocol=Protocol.UDP))
        site.relay._limit = 4  # the door, two clients, and one spare
        first, _, third = clients = [site.datagrams(door) for _ in range(3)]
        for client in (*clients, first, third):
            client.send(b"?")
            assert client.recv(100) == b"?"
        left = [flow.client[1] for flow in site.relay.datagrams]
        assert left == [client.getsockname()[1] for client in (first, third)]
        assert site.relay.fds == len(left)
        assert site.relay.counts.limited == 2
    finally:
        site.close()


def test_datagrams_do_not_loop(site: Site) -> None:
    """An endpoint that is the door itself: the datagram is dropped."""
    port = site.serve(plan_of(1, protocol=Protocol.UDP))
    site.serve(plan_of(port, protocol=Protocol.UDP))
    site.datagrams(port).send(b"x")
    eventually(lambda: site.relay.counts.loops, until=(1).__eq__)
    assert site.relay.fds <= 1


def test_doors_keep_to_their_ports() -> None:
    """A range of ports is kept to, and one that is full is an error (U1)."""
    made = Site(UserspaceSettings(port_range=(45_001, 45_001)))
    try:
        assert made.serve(plan_of(1)) == 45_001
        other = plan_of(1, protocol=Protocol.UDP)
        assert made.serve(other) == 45_001
        made.relay.call(made.relay.close_door, made.door)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 45_001))
            with pytest.raises(OSError, match="in use"):
                made.serve(other)
    finally:
        made.close()
