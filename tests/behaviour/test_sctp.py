"""SCTP through a service, where the kernel has it: the port stays, as a checksum covers it.

client ── router ──┬── node1 ── web1 web2 shell1
                   └── node2 ── web3
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Pod
from ebpf_svc.testbed.patience import PATIENCE
from tests.lib.manifests import Endpoint, Web
from tests.lib.world import World

SERVER = """
import socket, sys
listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
listener.bind(("::", int(sys.argv[1])))
listener.listen()
print("listening", flush=True)
while True:
    with listener.accept()[0] as connection:
        connection.recv(100)
        connection.send(sys.argv[2].encode())
"""
CLIENT = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
for _ in range(int(sys.argv[4])):
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_SCTP) as connection:
        connection.settimeout(float(sys.argv[3]))
        connection.connect((sys.argv[1], int(sys.argv[2])))
        connection.send(b"who are you?")
        print(connection.recv(100).decode())
"""
ANSWER_S = 3.0


@dataclass(frozen=True)
class SctpWeb(Web):
    """A service with an SCTP port alone, the same at every address."""

    @property
    def target_port(self) -> int:
        return self.node_port

    def manifests(self, endpoints: Sequence[Endpoint | Pod]) -> list[dict[str, Any]]:
        made = super().manifests(endpoints)
        for one in made:
            ports = one["spec"]["ports"] if one["kind"] == "Service" else one["ports"]
            port = {**ports[0], "name": "sctp", "protocol": Protocol.SCTP.value}
            ports[:] = [{**port, "port": self.node_port}]
        return made


@pytest.fixture(scope="session")
def sctp() -> None:
    """SCTP sockets; loading the module is the administrator's business, never the agent's."""
    subprocess.run(["modprobe", "sctp"], check=False, capture_output=True)
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError as error:
        pytest.skip(f"this kernel has no SCTP sockets: {error.strerror}")


@pytest.fixture
def web(sctp: None, world: World) -> Iterator[SctpWeb]:
    """The service, with a server in each of its pods."""
    web = SctpWeb(world.new_web().number)
    servers = []
    for pod in world.webs:
        argv = [sys.executable, "-ISc", SERVER, str(web.target_port), pod.name]
        servers.append(pod.popen(argv, stdout=subprocess.PIPE))
    try:
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
        world.publish(web, world.webs)
        yield web
        world.withdraw(web)
    finally:
        for server in servers:
            server.kill()
            server.communicate()


def served(host: Host, address: str, port: int, count: int) -> set[str]:
    """Who answered associations opened one after another."""
    argv = [sys.executable, "-ISc", CLIENT, address, str(port), str(ANSWER_S * PATIENCE)]
    return set(host.run([*argv, str(count)]).split())


@pytest.mark.smoke
def test_sctp_passes_through_services(sctp: None, world: World, web: SctpWeb) -> None:
    """A pod at the cluster's address and the outside at a node port reach SCTP pods (F5, P1)."""
    for family in Family:
        found = served(world.shell1, web.cluster.of(family), web.node_port, 20)
        assert found == {"web1", "web2", "web3"}
        node = world.cluster.nodes[0].address(family)
        found = served(world.cluster.client, node, web.node_port, 20)
        assert found == {"web1", "web2", "web3"}
