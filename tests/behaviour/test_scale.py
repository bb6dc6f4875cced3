"""One service large in one way: endpoints by the thousand, ports by the thousand.

One pod answers at every endpoint's address, so all of a thousand are real to their clients.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.addressing import Addresses
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.patience import PATIENCE
from ebpf_svc.testbed.traffic import Probe, Target, ask_all, serve
from tests.behaviour.conftest import Publish
from tests.lib.manifests import Endpoint, Web
from tests.lib.waiting import eventually
from tests.lib.world import World, write_manifests

MANY_ENDPOINTS = Addresses("10.244.200.0/22", "fd00:10:244:c8::/64")
SYNC_S = 180.0
ANSWER_S = 10.0
FIRST_PORT = 20_000
THROWS = 5
"""Requests per endpoint: what the chi-square approximation asks for."""
ALPHA_SIGMAS = 4.753
"""Of a normal distribution, above which lies 1e-6."""
PORTS = 5_000
SLICE_PORTS = 100
EVERY = 500

NAMES_ITSELF = """
import socket, struct, sys
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
server.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND: a whole prefix is its own
server.bind(("::", int(sys.argv[1])))
print("listening", flush=True)
while True:
    _, extra, _, client = server.recvmsg(100, 100)
    asked = extra[0][2][:16]
    about = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, asked + bytes(4))]
    server.sendmsg([asked], about, 0, client)
"""
"""Answers with the address that was asked, and from it."""

COUNTS = f"""
FIRST_PORT = {FIRST_PORT}
import collections, ipaddress, json, socket, sys
address, port, count, tries = sys.argv[1], *map(float, sys.argv[2:5])
def answer_of(asker):
    for _ in range(int(tries)):
        try:
            return asker.recv(100)
        except TimeoutError:
            asker.send(b"?")
    raise SystemExit("no answer")
family = socket.AF_INET6 if ":" in address else socket.AF_INET
found = collections.Counter()
left, any_address = int(count), "::" if ":" in address else "0.0.0.0"
while left:
    askers = []
    for each in range(min(left, 100)):
        asker = socket.socket(family, socket.SOCK_DGRAM)
        asker.bind((any_address, FIRST_PORT + left - each))
        asker.connect((address, int(port)))
        asker.settimeout(1)
        asker.send(b"?")
        askers.append(asker)
    for asker in askers:
        served = ipaddress.IPv6Address(answer_of(asker))
        found[str(served.ipv4_mapped or served)] += 1
        asker.close()
    left -= len(askers)
print(json.dumps(found))
"""
"""Asks from as many sockets, and says how often each address answered.

Each has a port of its own: of ports the kernel chooses some come again, as flows that have their
endpoint already, and each of those throws would count twice. A datagram that a busy machine lost
is sent again: the flow has its endpoint already.
"""


@dataclass(frozen=True)
class Wide(Web):
    """A UDP service with any number of endpoints, a hundred a slice."""

    endpoint_count: int = 0

    def addresses(self, family: Family) -> list[str]:
        stem = "10.244." if family is Family.V4 else "fd00:10:244:c8::"
        numbers = range(1, self.endpoint_count + 1)
        if family is Family.V4:
            return [f"{stem}{200 + number // 256}.{number % 256}" for number in numbers]
        return [f"{stem}{number:x}" for number in numbers]

    def manifests(self, endpoints: Sequence[Endpoint | Any]) -> list[dict[str, Any]]:
        service, *slices = super().manifests(endpoints)
        service["spec"]["ports"] = [p for p in service["spec"]["ports"] if p["name"] == "udp"]
        made = [service]
        for family, full in zip(Family, slices, strict=True):
            addresses = self.addresses(family)
            template = full["endpoints"][0]
            ports = [port for port in full["ports"] if port["name"] == "udp"]
            for start in range(0, len(addresses), 100):
                name = f"{full['metadata']['name']}-{start}"
                part = [{**template, "addresses": [one]} for one in addresses[start : start + 100]]
                metadata = {**full["metadata"], "name": name}
                made.append({**full, "metadata": metadata, "ports": ports, "endpoints": part})
        return made


@dataclass(frozen=True)
class Tall(Web):
    """A TCP service of 5,000 ports, each with a target port of its own."""

    def manifests(self, endpoints: Sequence[Endpoint | Any]) -> list[dict[str, Any]]:
        service, *slices = super().manifests(endpoints)
        ports = [(f"p{number}", 10_000 + number) for number in range(PORTS)]
        service["spec"].update(type="ClusterIP")
        service["status"] = {}
        service["spec"]["ports"] = [
            {"name": name, "protocol": "TCP", "port": port, "targetPort": port}
            for name, port in ports
        ]
        del service["spec"]["externalIPs"], service["spec"]["externalTrafficPolicy"]
        made = [service]
        for full in slices:
            for start in range(0, PORTS, SLICE_PORTS):
                part = [
                    {"name": name, "protocol": "TCP", "port": port}
                    for name, port in ports[start : start + SLICE_PORTS]
                ]
                metadata = {**full["metadata"], "name": f"{full['metadata']['name']}-{start}"}
                made.append({**full, "metadata": metadata, "ports": part})
        return made


@contextmanager
def _published(world: World, web: Web) -> Iterator[None]:
    """A large service, with time for it, behind web1."""
    path = world.manifests / f"{web.name}.yaml"
    world.heal()

    def passed(before: Sequence[int]) -> bool:
        now = [int(agent.status()["revision"]) for agent in world.agents]
        return all(new > old for new, old in zip(now, before, strict=True))

    def revisions() -> list[int]:
        return [int(agent.status().get("revision", 0)) for agent in world.agents]

    before = revisions()
    write_manifests(path, web.manifests([world.web1]))
    try:
        eventually(partial(passed, before), within_s=SYNC_S)
        assert [agent.status()["failed"] for agent in world.agents] == [[], []]
        yield
    finally:
        before = revisions()
        path.unlink()
        eventually(partial(passed, before), within_s=SYNC_S)


@contextmanager
def _answering_everywhere(world: World, port: int) -> Iterator[None]:
    """web1 is at every address of a prefix of its own, which both nodes know the way to."""
    node1, node2 = world.cluster.nodes
    routes: list[tuple[Host, list[str]]] = []
    for family in Family:
        ip, prefix = ["ip", "-4" if family is Family.V4 else "-6"], MANY_ENDPOINTS.of(family)
        hops: tuple[tuple[Host, Host], ...] = ((node1, world.web1), (node2, node1))
        routes.append((world.web1, [*ip, "route", "replace", "local", prefix, "dev", "lo"]))
        for at, to in hops:
            via = ["via", to.address(family)]
            routes.append((at, [*ip, "route", "replace", prefix, *via]))
    argv = [sys.executable, "-ISc", NAMES_ITSELF, str(port)]
    try:
        for at, add in routes:
            at.run(add)
        with world.web1.popen(argv, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "listening\n"
                yield
            finally:
                server.kill()
    finally:
        for at, add in routes:
            at.run(["del" if word == "replace" else word for word in add])


def _asked(asker: Host, target: Target, count: int) -> dict[str, int]:
    argv = [sys.executable, "-ISc", COUNTS, target.address, str(target.port), str(count)]
    found: dict[str, int] = json.loads(asker.run([*argv, str(ANSWER_S * PATIENCE)]))
    return found


def chi_square_limit(freedom: int) -> float:
    """What a fair spread stays below but for one in a million (Wilson and Hilferty)."""
    part = 2 / (9 * freedom)
    return float(freedom * (1 - part + ALPHA_SIGMAS * math.sqrt(part)) ** 3)


@pytest.mark.parametrize("endpoint_count", [1, 2])
def test_every_endpoint_gets_its_share(world: World, publish: Publish, endpoint_count: int) -> None:
    """One endpoint or two share a service's clients evenly, give or take chance (P12)."""
    _assert_shared(world, endpoint_count)


def test_each_of_a_thousand_endpoints_gets_its_share(world: World, publish: Publish) -> None:
    """A thousand endpoints share a service's clients evenly, give or take chance (P12)."""
    _assert_shared(world, 1_000)


def _assert_shared(world: World, endpoint_count: int) -> None:
    web = Wide(world.new_web().number, endpoint_count=endpoint_count)
    node1 = world.cluster.nodes[0]
    count = max(100, THROWS * endpoint_count)
    with _answering_everywhere(world, web.target_port), _published(world, web):
        for family in Family:
            for asker, target in (
                (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP)),
                (node1, web.at_cluster_ip(family, Protocol.UDP)),
                (world.cluster.client, web.at_node(node1, family, Protocol.UDP)),
            ):
                found = _asked(asker, target, count)
                addresses = web.addresses(family)
                assert set(found) <= set(addresses), (asker, target)
                fair = count / endpoint_count
                squares = sum((found.get(one, 0) - fair) ** 2 / fair for one in addresses)
                if endpoint_count > 1:
                    assert squares < chi_square_limit(endpoint_count - 1), (asker, target)


@pytest.mark.timeout(300)  # iptables-restore takes a minute for it
def test_service_of_five_thousand_ports(world: World, publish: Publish) -> None:
    """Each of 5,000 ports is a frontend of its own: every 500th is asked, and one there is not."""
    web = Tall(world.new_web().number)
    ports = [*range(10_000, 10_000 + PORTS, EVERY), 10_000 + PORTS - 1]
    serve(world.web1, tcp=ports)
    with _published(world, web):
        probes = [
            Probe(asker, Target(web.cluster.of(family), port, timeout_s=ANSWER_S))
            for family in Family
            for asker in _askers(world)
            for port in ports
        ]
        answers = ask_all(probes)
        wrong = [
            (probe, answer)
            for probe, (answer,) in zip(probes, answers, strict=True)
            if answer.server != "web1"
        ]
        assert wrong == []
        none = [
            Probe(asker, Target(web.cluster.v4, 10_000 + PORTS, timeout_s=0.5))
            for asker in _askers(world)
        ]
        assert not any(answer.ok for (answer,) in ask_all(none))


def _askers(world: World) -> tuple[Host | Node, ...]:
    return world.shell1, world.sandbox1, world.cluster.nodes[0], world.cluster.client
