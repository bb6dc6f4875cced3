"""What becomes of TCP connections while services change, end oddly or meet odd packets.

client ── router ──┬── node1 ── web1 web2 shell1 sandbox1
                   └── node2 ── web3
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Pod
from ebpf_svc.testbed.patience import PATIENCE
from ebpf_svc.testbed.traffic import Connection, Target, connection, stop_serving
from tests.behaviour.conftest import Publish
from tests.lib.manifests import Endpoint, Web
from tests.lib.world import World

ANSWER_S = 8.0
HALF_CLOSED_BYTES = 300_000

ANSWERS_AFTER_END = """
import socket, sys, threading
def answer(connection):
    heard = 0
    while data := connection.recv(65536):
        heard += len(data)
    connection.sendall(b"x" * int(sys.argv[2]) + str(heard).encode())
    connection.close()
listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6,
                                dualstack_ipv6=True)
print("listening", flush=True)
while True:
    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
"""
"""Answers only once the client has said that it will say no more."""

HALF_CLOSES = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])) as asker:
    asker.sendall(b"y" * int(sys.argv[4]))
    asker.shutdown(socket.SHUT_WR)
    got = b""
    while data := asker.recv(65536):
        got += data
print(len(got.rstrip(b"0123456789")), got.lstrip(b"x").decode())
"""

ONE_PORT = """
import json, socket, struct, sys
address, port, source, wait_s, end = sys.argv[1:6]
asker = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
asker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
asker.settimeout(float(wait_s))
asker.bind(("", int(source)))
asker.connect((address, int(port)))
asker.sendall(b"GET / HTTP/1.0\\n" if end == "server" else b"{}\\n")
got = b""
while b"}" not in got:
    data = asker.recv(65536)
    assert data, "closed without an answer"
    got += data
if end == "server":
    while asker.recv(65536):
        pass
else:
    asker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
asker.close()
print(json.loads(got[got.index(b"{"):])["server"])
"""
"""Asks from a fixed port; the server closes first (and waits), or the client resets."""

STRAY = """
import ipaddress, socket, struct, sys
source, sport, target, dport = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
ends = ipaddress.ip_address(source).packed, ipaddress.ip_address(target).packed
sender = socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_RAW, 6)
sender.bind((source, 0))
payload = b"stray"
for seq, ack, flags in ((7, 7, 0x18), (0x90000000, 0x90000000, 0x10), (7, 7, 0x12)):
    head = struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 5 << 4, flags, 1000, 0, 0)
    pseudo = b"".join(ends) + struct.pack("!II", len(head + payload), 6)
    data = pseudo + head + payload + b"\\0" * (len(payload) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head = head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:]
    sender.sendto(head + payload, (target, 0))
"""
"""Sends segments that belong nowhere into a connection, as its server."""


@dataclass(frozen=True)
class Renamed(Web):
    """The same service after its ports were given other names."""

    def manifests(self, endpoints: Sequence[Endpoint | Pod]) -> list[dict[str, Any]]:
        made = super().manifests(endpoints)
        for one in made:
            for port in one["spec"]["ports"] if one["kind"] == "Service" else one["ports"]:
                port["name"] += "-2"
        return made


def _ways(world: World, web: Web, family: Family) -> tuple[tuple[Host, Target], ...]:
    """Everyone at the address it would use."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    at_cluster = web.at_cluster_ip(family, Protocol.TCP, timeout_s=ANSWER_S)
    return (
        (world.shell1, at_cluster),
        (world.sandbox1, at_cluster),
        (node1, at_cluster),
        (world.sandbox1, web.at_node(node1, family, Protocol.TCP, timeout_s=ANSWER_S)),
        (client, web.at_node(node1, family, Protocol.TCP, timeout_s=ANSWER_S)),
        (client, web.at_balancer(family, Protocol.TCP, timeout_s=ANSWER_S)),
    )


@contextmanager
def _connections(world: World, web: Web) -> Iterator[dict[str, Connection]]:
    with ExitStack() as stack:
        yield {
            f"{asker.name} {target.address}": stack.enter_context(connection(asker, target))
            for family in Family
            for asker, target in _ways(world, web, family)
        }


def _servers(conns: dict[str, Connection]) -> dict[str, str]:
    answers = {name: conn.ping() for name, conn in conns.items()}
    return {name: one.server or f"{one.outcome} {one.detail}" for name, one in answers.items()}


def _run(host: Host, script: str, *arguments: object) -> str:
    return host.run([sys.executable, "-ISc", script, *map(str, arguments)])


@contextmanager
def _server(pod: Pod, script: str, *arguments: object) -> Iterator[None]:
    """A program that listens on a pod during the block."""
    argv = [sys.executable, "-ISc", script, *map(str, arguments)]
    with pod.popen(argv, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            yield
        finally:
            server.kill()


def test_connections_outlive_every_change_of_their_service(world: World, publish: Publish) -> None:
    """Policies, other fields, port names, a drained endpoint: none ends a connection (P12, C4)."""
    web = publish([world.web1, world.web3])
    with _connections(world, web) as conns:
        first = _servers(conns)
        assert set(first.values()) <= {"web1", "web3"}
        local = replace(web, internal_local=True, external_local=True)
        draining: list[Endpoint | Pod] = [
            Endpoint(pod, ready=False, serving=True, terminating=True)
            for pod in (world.web1, world.web3)
        ]
        both: list[Endpoint | Pod] = [world.web1, world.web3]
        changes: tuple[tuple[Web, list[Endpoint | Pod]], ...] = (
            (local, both),
            (local, [world.web2]),
            (replace(web, affinity_s=100), [world.web1, world.web2]),
            (Renamed(web.number), both),
            (web, [*draining, world.web2]),
        )
        for changed, endpoints in changes:
            world.publish(changed, endpoints)
            assert _servers(conns) == first, (changed, endpoints)


def test_half_closed_connection_still_brings_the_answer(world: World, publish: Publish) -> None:
    """A client that has said all it has to say gets all of an answer that begins only then."""
    web = publish([world.web3])
    stop_serving(world.web3, tcp=[web.target_port])
    with _server(world.web3, ANSWERS_AFTER_END, web.target_port, HALF_CLOSED_BYTES):
        for family in Family:
            for asker, target in _ways(world, web, family):
                wait_s = ANSWER_S * PATIENCE
                said = _run(asker, HALF_CLOSES, target.address, target.port, wait_s, 5000)
                assert said.split() == [str(HALF_CLOSED_BYTES), "5000"], (asker, target)


@pytest.mark.parametrize("end", ["server", "reset"])
def test_same_five_tuple_again_gets_a_live_endpoint(
    world: World, publish: Publish, end: str
) -> None:
    """A port used again while its old connection is in TIME_WAIT, and after its endpoint left."""
    web = publish([world.web1])
    wait_s = ANSWER_S * PATIENCE
    for pod, times in ((world.web1, 2), (world.web3, 1)):
        world.publish(web, [pod])
        for family in Family:
            for number, (asker, target) in enumerate(_ways(world, web, family)[1:5]):
                for _ in range(times):
                    argv = (target.address, target.port, 6000 + number, wait_s, end)
                    assert _run(asker, ONE_PORT, *argv).strip() == pod.name, (asker, target)


def test_stray_segments_of_the_endpoint_do_not_end_the_connection(
    world: World, publish: Publish
) -> None:
    """What conntrack calls invalid reaches no client untranslated: it would answer with a reset."""
    web = publish([world.web3])
    with _connections(world, web) as conns:
        for name, conn in conns.items():
            answer = conn.ping()
            assert answer.ok, (name, answer)
            family = Family.V6 if ":" in answer.client else Family.V4
            pod = world.web3.address(family), web.target_port
            _run(world.web3, STRAY, *pod, answer.client, answer.client_port)
        again = {name: conn.ping() for name, conn in conns.items()}
        assert {name: one for name, one in again.items() if not one.ok} == {}
