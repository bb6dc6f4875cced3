"""Servers on ports of their own, and a client that says what came back."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from ebpf_svc.health.server import HttpServer


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def get(port: int, path: str = "/", *, address: str = "127.0.0.1", method: str = "GET") -> Reply:
    """Ask once, as any client would."""
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return Reply(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def refuses(port: int, address: str = "127.0.0.1") -> bool:
    """Whether nothing listens there."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Ports nobody listens on in either family, each given once."""
    given: set[int] = set()

    def find() -> int:
        while True:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::", 0))
                port: int = probe.getsockname()[1]
            if port not in given:
                given.add(port)
                return port

    return find


@pytest.fixture
def make_server() -> Iterator[Callable[..., HttpServer]]:
    """Servers with little patience, stopped at the end."""
    made: list[HttpServer] = []

    def make(**options: Any) -> HttpServer:
        options = {"read_s": 0.3, "write_s": 0.3, "retry_s": 0.05} | options
        made.append(HttpServer("test", **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()
