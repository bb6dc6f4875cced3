"""Destroying sockets for real: a process in a network namespace and a cgroup of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import sweeper
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.sweeper import Sweeper
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.host.sockets import Peer, destroy_below, in_namespace, network_namespaces
from ebpf_svc.model.net import Family, Protocol
from tests.lib.plans import make_backend, make_desired, make_frontend, make_plan

pytestmark = pytest.mark.root

CLIENT = """
import json, socket, subprocess, sys

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
listener = socket.create_server(("127.0.0.1", 4000))

def udp(family, address, port):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect((address, port))
    return sock

sockets = {
    "v4": udp(socket.AF_INET, "127.0.0.1", 5001),
    "other port": udp(socket.AF_INET, "127.0.0.1", 5002),
    "v6": udp(socket.AF_INET6, "::1", 5001),
    "mapped": udp(socket.AF_INET6, "::ffff:127.0.0.1", 5001),
    "tcp": socket.create_connection(("127.0.0.1", 4000)),
    "unconnected": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
}
cookies = {
    name: int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)  # SO_COOKIE
    for name, sock in sockets.items()
}
print(json.dumps(cookies), flush=True)
sys.stdin.readline()
# SO_ERROR is what the next call would have failed with.
errors = {n: s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for n, s in sockets.items()}
print(json.dumps({name: error for name, error in errors.items() if error}), flush=True)
"""
ECONNABORTED = 103


class Client:
    """The process with the sockets; `errors()` ends it."""

    def __init__(self, cgroup: Path) -> None:
        self._process = subprocess.Popen(
            ["unshare", "-n", sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        (cgroup / "cgroup.procs").write_text(str(self._process.pid))
        assert self._process.stdout
        self.cookies: dict[str, int] = json.loads(self._process.stdout.readline())

    def errors(self) -> dict[str, int]:
        out, _ = self._process.communicate("go\n", timeout=10)
        errors: dict[str, int] = json.loads(out)
        return errors

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup with one child, both empty again at the end."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    if root is None:
        pytest.skip("no cgroup2 hierarchy is mounted")
    top = root / f"ebpf-svc-test-{os.getpid()}"
    below = top / "pod"
    below.mkdir(parents=True)
    yield top
    below.rmdir()
    top.rmdir()


@pytest.fixture
def client(cgroup: Path) -> Iterator[Client]:
    client = Client(cgroup / "pod")
    yield client
    client.end()


def test_matching_udp_sockets_of_both_families_fail_and_others_live(
    cgroup: Path, client: Client
) -> None:
    """A socket whose backend went fails with ECONNABORTED (C10); all others are left alone."""
    seen: list[Peer] = []

    def gone(peer: Peer) -> bool:
        seen.append(peer)
        return peer.port == 5001

    assert destroy_below(cgroup, gone) == 3
    assert sorted(seen) == sorted(
        [
            Peer(Family.V4, Protocol.UDP, "127.0.0.1", 5001, client.cookies["v4"], "127.0.0.1"),
            Peer(
                Family.V4,
                Protocol.UDP,
                "127.0.0.1",
                5002,
                client.cookies["other port"],
                "127.0.0.1",
            ),
            Peer(Family.V6, Protocol.UDP, "::1", 5001, client.cookies["v6"], "::1"),
            Peer(Family.V4, Protocol.UDP, "127.0.0.1", 5001, client.cookies["mapped"], "127.0.0.1"),
        ]
    )
    assert client.errors() == {"v4": ECONNABORTED, "v6": ECONNABORTED, "mapped": ECONNABORTED}


def test_tcp_socket_fails_when_asked_for(cgroup: Path, client: Client) -> None:
    """TCP sockets are destroyed only when the caller names the protocol."""
    cookie = client.cookies["tcp"]
    doomed = destroy_below(cgroup, lambda peer: peer.cookie == cookie, protocols=[Protocol.TCP])
    assert doomed == 1
    assert client.errors() == {"tcp": ECONNABORTED}


def test_namespaces_below_a_cgroup_are_those_of_its_processes(cgroup: Path, client: Client) -> None:
    """Each namespace is listed once, and only those of processes below the cgroup."""
    (namespace,) = network_namespaces(cgroup)
    inside = in_namespace(namespace, lambda: Path("/proc/thread-self/ns/net").readlink())
    assert inside != Path("/proc/self/ns/net").readlink()
    assert client.errors() == {}


def test_namespace_that_went_is_no_error(cgroup: Path) -> None:
    """A process may end between the look at the cgroup and the visit to its namespace."""
    assert in_namespace(Path("/proc/1000000000/ns/net"), lambda: 1) is None
    assert destroy_below(cgroup, lambda peer: True) == 0


def test_failure_inside_a_namespace_reaches_the_caller() -> None:
    """What the work raised is raised, not lost with its thread."""
    with pytest.raises(ZeroDivisionError):
        in_namespace(Path("/proc/self/ns/net"), lambda: 1 // 0)


BACKEND = make_backend("127.0.0.1", 5001)
FRONTEND = make_frontend(protocol=Protocol.UDP)


@pytest.fixture
def agent(tables: Tables, own_settings: EbpfSettings, client: Client) -> Forwarding:
    """It gave the client's socket an endpoint, which has just left."""
    agent = Forwarding(tables, own_settings)
    plan = make_plan("dns", FRONTEND, backends=[BACKEND])
    agent.apply(make_desired(plan))
    (backend,) = agent.states[Family.V4].records[plan.key].backend_ids
    sockets = tables.udp_sockets
    cookie = sockets.key.pack(value=client.cookies["v4"])
    given = sockets.value.pack(backend_id=backend, family=int(Family.V4))
    sockets.update([(cookie, given)])
    agent.apply(make_desired(make_plan("dns", FRONTEND, backends=[])))
    return agent


@pytest.fixture
def end_sockets(
    tables: Tables, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Forwarding, float], int]:
    """Have an agent end the sockets whose backend left so many seconds ago."""

    def end(agent: Forwarding, linger_s: float) -> int:
        monkeypatch.setattr(sweeper, "LINGER_S", linger_s)
        lock = threading.RLock()
        return Sweeper(agent.states, tables.udp_sockets, lock, cgroup=cgroup).end_sockets()

    return end


def test_socket_without_its_backend_is_destroyed_after_a_moment(
    agent: Forwarding, end_sockets: Callable[[Forwarding, float], int], client: Client
) -> None:
    """An answer that is on its way when the endpoint leaves is still heard; then C10."""
    assert end_sockets(agent, sweeper.LINGER_S) == 0
    assert end_sockets(agent, 0) == 1
    assert end_sockets(agent, 0) == 0
    assert client.errors() == {"v4": ECONNABORTED}


def test_socket_lives_when_its_backend_comes_back_in_that_moment(
    agent: Forwarding, end_sockets: Callable[[Forwarding, float], int], client: Client
) -> None:
    """It serves again: there is nothing the socket has lost."""
    agent.apply(make_desired(make_plan("dns", FRONTEND, backends=[BACKEND])))
    assert end_sockets(agent, 0) == 0
    assert client.errors() == {}


def test_socket_without_its_backend_is_destroyed_by_the_next_agent(
    agent: Forwarding,
    end_sockets: Callable[[Forwarding, float], int],
    client: Client,
    tables: Tables,
    own_settings: EbpfSettings,
) -> None:
    """An agent that ended in that moment has not forgotten the socket (Z2)."""
    successor = Forwarding(tables, own_settings)
    successor.adopt()
    assert end_sockets(successor, 0) == 1
    assert client.errors() == {"v4": ECONNABORTED}
