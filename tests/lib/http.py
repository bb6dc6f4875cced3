"""A client of the agent's servers, and ports to let them listen on."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import sys
from typing import Any, NamedTuple

from ebpf_svc.testbed.host import Host

_PORTS = itertools.count(20_000 + os.getpid() % 100 * 100)
"""Below the ports the kernel gives to clients, and apart for runs side by side."""


class Reply(NamedTuple):
    """What a server answered."""

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
    except ConnectionResetError:  # it waited for a listener that closed: the next one is refused
        return False
    return False


def free_port() -> int:
    """A port nobody listens on in either family, given only once."""
    while True:
        port = next(_PORTS)
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::", port))
        except OSError:
            continue
        return port


_FETCH = """
import http.client, json, sys
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=3)
try:
    connection.request("GET", sys.argv[3])
    response = connection.getresponse()
    print(json.dumps([response.status, dict(response.getheaders()), response.read().decode()]))
except ConnectionRefusedError:
    print(json.dumps([0, {}, ""]))
"""


def fetch(host: Host, address: str, port: int, path: str = "/") -> Reply:
    """Ask once from a host of the testbed; status 0 = refused."""
    argv = [sys.executable, "-I", "-S", "-c", _FETCH, address, str(port), path]
    status, headers, body = json.loads(host.run(argv))
    return Reply(status, headers, body.encode())
