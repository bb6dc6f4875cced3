"""The server against clients that are slow, silent, many or wrong, and addresses it cannot have."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus

import pytest

from ebpf_svc.health.http import Request, Response, text_response
from ebpf_svc.health.server import HttpServer, Site
from tests.lib.http import free_port, get, refuses
from tests.lib.waiting import eventually, wait_out

MakeServer = Callable[..., HttpServer]


def hello(request: Request) -> Response:
    return text_response(f"{request.method} {request.path}\n")


def serving(server: HttpServer, port: int, *addresses: str) -> HttpServer:
    """Start a server that answers `hello` at these addresses, and wait until it does."""
    server.serve("test", [Site("hello", each, port, hello) for each in addresses or ["127.0.0.1"]])
    server.start()
    # Sites are opened in their order.
    last = (addresses or ("127.0.0.1",))[-1]
    eventually(lambda: not refuses(port, last))
    return server


def is_cut(client: socket.socket) -> bool:
    """Whether the server has closed the connection."""
    client.settimeout(2)
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_every_address_answers_and_only_those(make_server: MakeServer) -> None:
    """Both families side by side on one port; another port is not opened."""
    port = free_port()
    serving(make_server(), port, "127.0.0.1", "::1")
    assert get(port, "/a").body == b"GET /a\n"
    assert get(port, "/b", address="::1").body == b"GET /b\n"
    assert refuses(free_port())


def test_wildcard_of_one_family_leaves_the_other_free(make_server: MakeServer) -> None:
    """`::` alone does not take IPv4 along (H1)."""
    port = free_port()
    serving(make_server(), port, "0.0.0.0")
    assert refuses(port, "::1")
    server = make_server()
    server.serve("test", [Site("hello", "::", port, hello)])
    server.start()
    eventually(lambda: not refuses(port, "::1"))


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_any_method_is_answered(make_server: MakeServer, method: str) -> None:
    """A prober may use what it likes (H3)."""
    port = free_port()
    serving(make_server(), port)
    expected = "" if method == "HEAD" else f"{method} /x\n"
    assert get(port, "/x", method=method).body.decode() == expected


def test_request_byte_by_byte_is_answered(make_server: MakeServer) -> None:
    """A request may come in pieces."""
    port = free_port()
    serving(make_server(), port)
    with socket.create_connection(("127.0.0.1", port)) as client:
        for byte in b"GET /slow HTTP/1.1\r\n\r\n":
            client.sendall(bytes([byte]))
        client.settimeout(2)
        assert b"GET /slow" in b"".join(iter(lambda: client.recv(4096), b""))


def test_silent_client_is_cut_and_holds_up_nobody(make_server: MakeServer) -> None:
    """One that connects and says nothing costs nobody else any time."""
    port = free_port()
    serving(make_server(read_s=0.4), port)
    with socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(b"GET /")
        began = time.monotonic()
        assert get(port).status == 200
        assert time.monotonic() - began < 0.3
        assert is_cut(silent)
        assert 0.3 < time.monotonic() - began < 1.5


def test_client_that_does_not_read_is_cut(make_server: MakeServer) -> None:
    """A big answer nobody takes is given up; others are answered meanwhile."""
    port, page = free_port(), bytes(20_000_000)
    server = make_server(write_s=0.4)
    server.serve(
        "test",
        [Site("big", "127.0.0.1", port, lambda request: Response(200, page, "image/x"))],
    )
    server.start()
    eventually(lambda: not refuses(port))
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", port))
        lazy.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert get(port).body == page
        wait_out(0.5)
        received = 0
        lazy.settimeout(2)
        try:
            while data := lazy.recv(1 << 20):
                received += len(data)
        except ConnectionResetError:
            pass
        assert received < len(page)


def reluctant(port: int) -> socket.socket:
    """A client that asks and takes next to nothing of the answer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert client.recv(1)
    return client


def received(client: socket.socket) -> int:
    """How much comes until the end; 0 when the connection is reset."""
    client.settimeout(2)
    try:
        return sum(map(len, iter(lambda: client.recv(1 << 20), b"")))
    except ConnectionResetError:
        return 0


def test_answers_nobody_reads_do_not_fill_the_memory(make_server: MakeServer) -> None:
    """Of many clients that do not read the oldest are cut, the newest is waited for."""
    port, page = free_port(), bytes(10_000_000)
    server = make_server(write_s=30.0, answers_max_bytes=15_000_000)
    server.serve(
        "test",
        [Site("big", "127.0.0.1", port, lambda request: Response(200, page, "image/x"))],
    )
    server.start()
    eventually(lambda: not refuses(port))
    lazy = [reluctant(port) for _ in range(5)]
    try:
        assert get(port).body == page
        served = [received(client) > len(page) for client in lazy]
        assert served[0] is False
        assert served[-1] is True
        assert served == sorted(served)
    finally:
        for client in lazy:
            client.close()


def test_many_silent_clients_leave_room_for_an_honest_one(make_server: MakeServer) -> None:
    """When connections run out the oldest that only waits goes."""
    port = free_port()
    serving(make_server(read_s=30.0, connections_max=20), port)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    try:
        assert get(port, "/still").body == b"GET /still\n"
        assert is_cut(silent[0])
    finally:
        for client in silent:
            client.close()


def test_many_clients_at_once_are_all_answered(make_server: MakeServer) -> None:
    """A hundred probers in the same moment."""
    port = free_port()
    serving(make_server(), port)
    replies: list[int] = []
    threads = [
        threading.Thread(target=lambda: replies.append(get(port).status)) for _ in range(100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 100


def test_body_sent_with_the_request_does_not_reset_the_answer(make_server: MakeServer) -> None:
    """A client that sends more than is read still gets its answer."""
    port = free_port()
    serving(make_server(), port)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST /up HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000))
        client.settimeout(2)
        assert b"POST /up" in b"".join(iter(lambda: client.recv(4096), b""))


def test_nonsense_is_answered_with_an_error(make_server: MakeServer) -> None:
    """A TLS client learns at once that nobody speaks TLS here."""
    port = free_port()
    serving(make_server(), port)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\n\n")
        client.settimeout(2)
        assert client.recv(64).startswith(b"HTTP/1.1 400 ")


def test_broken_page_is_an_error_and_the_others_go_on(make_server: MakeServer) -> None:
    """A bug behind one page is a 500, not the end of the server."""

    def broken(_: Request) -> Response:
        raise KeyError("bug")

    one, other = free_port(), free_port()
    server = make_server()
    server.serve("test", [Site("broken", "127.0.0.1", one, broken)])
    server.serve("more", [Site("hello", "127.0.0.1", other, hello)])
    server.start()
    eventually(lambda: not refuses(other))
    assert get(one).status == HTTPStatus.INTERNAL_SERVER_ERROR
    assert get(other).status == 200
    assert get(one).status == HTTPStatus.INTERNAL_SERVER_ERROR


def test_taken_port_is_told_once_and_had_when_free(make_server: MakeServer) -> None:
    """A port someone else has is tried again until it can be had (HS8)."""
    port, failures = free_port(), []
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        server = make_server()
        server.serve(
            "test",
            [
                Site(
                    *("hello", "127.0.0.1", port, hello),
                    lambda site, error: failures.append((str(site), error.errno)),
                )
            ],
        )
        server.start()
        eventually(lambda: failures)
        wait_out(0.2)
    eventually(lambda: not refuses(port))
    assert get(port).status == 200
    assert failures == [(f"127.0.0.1:{port}", errno.EADDRINUSE)]


def test_retry_need_not_wait_for_the_pause(make_server: MakeServer) -> None:
    """Whoever has a reason to try again can (H7)."""
    port = free_port()
    squatter = socket.create_server(("127.0.0.1", port))
    server, failed = make_server(retry_s=60.0), threading.Event()
    site = Site("hello", "127.0.0.1", port, hello, lambda site, error: failed.set())
    server.serve("test", [site])
    server.start()
    assert failed.wait(2)
    squatter.close()
    server.retry()
    eventually(lambda: not refuses(port))


def test_address_the_machine_lacks_hurts_no_other(make_server: MakeServer) -> None:
    """What can be had is served, the rest is waited for."""
    port = free_port()
    serving(make_server(), port, "203.0.113.99", "127.0.0.1")
    assert get(port).status == 200


def test_port_moves_from_one_owner_to_another(make_server: MakeServer) -> None:
    """Closing comes before opening, so that nobody finds its port taken by our own past."""
    port, failures = free_port(), []
    server = make_server(retry_s=60.0)

    def site(name: str) -> Site:
        return Site(
            *(name, "127.0.0.1", port, lambda request: text_response(name)),
            lambda site, error: failures.append(error),
        )

    server.serve("test", [site("old")])
    server.start()
    eventually(lambda: not refuses(port))
    server.serve("test", [site("new")])

    def body() -> bytes:
        try:
            return get(port).body
        except ConnectionError:  # between the one and the other
            return b""

    eventually(body, until=b"new".__eq__)
    assert failures == []


def test_dropped_site_is_refused(make_server: MakeServer) -> None:
    """What is not wanted any more is not listened on."""
    port = free_port()
    server = serving(make_server(), port)
    server.serve("test", [])
    eventually(lambda: refuses(port))


def test_stop_gives_every_port_back_at_once(make_server: MakeServer) -> None:
    """The next agent can listen right away, even while clients hang on."""
    port = free_port()
    server = serving(make_server(read_s=30.0), port)
    with socket.create_connection(("127.0.0.1", port)):
        get(port)
        server.stop()
        assert refuses(port)
        serving(make_server(), port)
        assert get(port).status == 200


def test_server_that_was_never_started_can_be_stopped(make_server: MakeServer) -> None:
    """A start that fails half-way cleans up all of it."""
    make_server().stop()
