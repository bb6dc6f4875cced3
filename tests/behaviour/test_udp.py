"""UDP clients that keep their port, cut their datagrams or ask much at once.

client ── router ──┬── node1 ── web1 web2 shell1 sandbox1
                   └── node2 ── web3
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Pod
from ebpf_svc.testbed.patience import PATIENCE
from ebpf_svc.testbed.traffic import Connection, Probe, Target, ask_all, connection, stop_serving
from tests.behaviour.conftest import Publish
from tests.lib.manifests import Endpoint, Web
from tests.lib.waiting import eventually
from tests.lib.world import World

every_family = pytest.mark.parametrize("family", list(Family), ids=lambda family: family.label)

ANSWER_S = 1.0
WITHIN_S = 15.0
LATE_S = 4.0
"""How long an answer is waited for whose pod leaves meanwhile."""

FRAGMENTS = """
import ipaddress, json, socket, struct, sys
source, target, port, order, wait_s = sys.argv[1:6]
six = ":" in target
ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
asker = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
asker.bind((source, 0))
asker.settimeout(float(wait_s))
ident = asker.getsockname()[1]
raw = socket.socket(asker.family, socket.SOCK_RAW, socket.IPPROTO_RAW)
body = b"{}".ljust(3000)
udp = struct.pack("!HHHH", asker.getsockname()[1], int(port), 8 + len(body), 0) + body
data = ends + struct.pack("!II", len(udp), 17) + udp
total = sum(struct.unpack(f"!{len(data) // 2}H", data))
while total >> 16:
    total = (total & 0xFFFF) + (total >> 16)
udp = udp[:6] + struct.pack("!H", ~total & 0xFFFF) + udp[8:]
pieces = []
for start in range(0, len(udp), 1200):
    piece = udp[start : start + 1200]
    more = start + 1200 < len(udp)
    if six:
        head = struct.pack("!IHBB", 6 << 28, 8 + len(piece), 44, 64) + ends
        head += struct.pack("!BBHI", 17, 0, start | more, ident)
    else:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(piece), ident,
                           (more << 13) | start // 8, 64, 17, 0) + ends
    pieces.append(head + piece)
for piece in pieces if order == "first" else pieces[::-1]:
    raw.sendto(piece, (target, 0))
print(json.loads(asker.recv(65535))["request_bytes"])
"""
"""Asks with one datagram in three fragments, in their order or the first one last."""

BURST = """
import json, selectors, socket, sys, threading, time
address, port, wait_s, count, together = sys.argv[1], *map(float, sys.argv[2:6])
missing = 0
for _ in range(int(count / together)):
    sockets = []
    for _ in range(int(together)):
        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET,
                            socket.SOCK_DGRAM)
        one.connect((address, int(port)))
        sockets.append(one)
    def send(kind):
        for one in sockets:
            one.send(json.dumps({"reply_bytes": kind}).encode())
    threads = [threading.Thread(target=send, args=(kind,)) for kind in (200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in sockets:
        one.settimeout(wait_s)
        try:
            if {len(one.recv(1000)), len(one.recv(1000))} != {200, 300}:
                missing += 1
        except TimeoutError:
            missing += 1
        one.close()
print(missing)
"""
"""Two questions at once on each of many sockets, as resolvers ask; says on how many any is lost."""

ANSWERS_WHEN_TOLD = """
import json, socket, sys
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
server.settimeout(float(sys.argv[3]))
server.bind(("::", int(sys.argv[1])))
print("listening", flush=True)
askers = [server.recvfrom(1000)[1] for _ in range(int(sys.argv[2]))]
print("asked", flush=True)
sys.stdin.readline()
for asker in askers:
    server.sendto(b'{"server": "late"}', asker)
"""
"""Hears so many questions before it answers the first one."""


def _run(host: Host, script: str, *arguments: object) -> str:
    return host.run([sys.executable, "-ISc", script, *map(str, arguments)])


def _flows(world: World, web: Web, stack: ExitStack) -> dict[str, Connection]:
    """Sockets that keep their port, at every kind of frontend; both families."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    options = {"connected": False, "timeout_s": ANSWER_S}
    return {
        f"{asker.name} {target.address}": stack.enter_context(connection(asker, target))
        for family in Family
        for asker, target in (
            (world.shell1, web.at_cluster_ip(family, Protocol.UDP, **options)),
            (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP, **options)),
            (world.sandbox1, web.at_node(node1, family, Protocol.UDP, **options)),
            (node1, web.at_cluster_ip(family, Protocol.UDP, **options)),
            (client, web.at_node(node1, family, Protocol.UDP, **options)),
            (client, web.at_balancer(family, Protocol.UDP, **options)),
        )
    }


def _servers(flows: dict[str, Connection]) -> dict[str, str]:
    with ThreadPoolExecutor(len(flows)) as pool:
        answers = dict(zip(flows, pool.map(Connection.ping, flows.values()), strict=True))
    return {name: one.server or f"{one.outcome} {one.detail}" for name, one in answers.items()}


def _moved(flows: dict[str, Connection], server: str) -> None:
    """Wait until every flow is answered by that pod.

    A datagram may be lost on a busy machine, and an answer come late.
    """
    eventually(
        lambda: _servers(flows),
        until=lambda found: set(found.values()) == {server},
        within_s=WITHIN_S,
    )


@pytest.mark.parametrize("unready", [False, True], ids=["none", "unready"])
def test_flows_begun_without_an_endpoint_recover(
    world: World, publish: Publish, unready: bool
) -> None:
    """A client that asked before anybody served is answered once somebody does, on its old port.

    And again after the last endpoint went and another came (C1, C7, C10, Q1).
    """
    web = publish([Endpoint(world.web1, ready=False, serving=False)] if unready else [])
    with ExitStack() as stack:
        flows = _flows(world, web, stack)
        assert not {"web1", "web2", "web3"} & set(_servers(flows).values())
        world.publish(web, [world.web1])
        _moved(flows, "web1")
        world.publish(web, [])
        assert not {"web1", "web2", "web3"} & set(_servers(flows).values())
        world.publish(web, [world.web3])
        _moved(flows, "web3")


def test_flows_follow_the_target_port(world: World, publish: Publish) -> None:
    """The same pod on another port: flows to the old one move, although nothing refuses (C8)."""
    web = publish([world.web1])
    with ExitStack() as stack:
        flows = _flows(world, web, stack)
        _moved(flows, "web1")
        other = replace(web, shared_port=7_500)
        world.publish(other, [Endpoint(world.web1)])
        # From now on the old port would answer with another name.
        world.web1.peer.call("serve", name="old port", ports=[("UDP", web.target_port)])
        assert "old port" not in _servers(flows).values()
        _moved(flows, "web1")


def test_flows_follow_a_service_made_anew(world: World, publish: Publish) -> None:
    """A service deleted and made again on its addresses, with other endpoints (Q1)."""
    web = publish([world.web1])
    with ExitStack() as stack:
        flows = _flows(world, web, stack)
        _moved(flows, "web1")
        world.withdraw(web)
        assert "web1" not in _servers(flows).values()
        world.publish(web, [world.web3])
        _moved(flows, "web3")


def _cut(world: World, web: Web, family: Family, order: str) -> None:
    """Ask with fragments made by hand: from a sandboxed pod and from outside."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    ways: tuple[tuple[Host, Target], ...] = (
        (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP)),
        (world.sandbox1, web.at_node(node1, family, Protocol.UDP)),
        (client, web.at_node(node1, family, Protocol.UDP)),
    )
    for asker, target in ways:
        place = asker.address(family), target.address, target.port
        said = _run(asker, FRAGMENTS, *place, order, 3 * PATIENCE)
        assert said.strip() == "3000", (asker, target)


@every_family
def test_datagram_cut_in_pieces_arrives_whole(
    world: World, publish: Publish, family: Family
) -> None:
    """Fragments in their order: the later ones find where the first one went."""
    _cut(world, publish(), family, "first")


@every_family
def test_datagram_cut_in_pieces_arrives_whole_the_first_piece_last(
    world: World, publish: Publish, family: Family
) -> None:
    """Fragments against their order: the ports come last."""
    _cut(world, publish(), family, "last")


@every_family
def test_bursts_of_two_questions_a_socket_lose_no_answer(
    world: World, publish: Publish, family: Family
) -> None:
    """A and AAAA at once on one port, on 200 of them: nobody loses the race for a flow's entry."""
    web = publish()
    node1 = world.cluster.nodes[0]
    for asker, target in (
        (world.shell1, web.at_cluster_ip(family, Protocol.UDP)),
        (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP)),
        (world.cluster.client, web.at_node(node1, family, Protocol.UDP)),
    ):
        wait_s = WITHIN_S * PATIENCE
        missing = _run(asker, BURST, target.address, target.port, wait_s, 200, 50).strip()
        assert (asker.name, missing) == (asker.name, "0")


@contextmanager
def _answering_when_told(pod: Pod, port: int, count: int) -> Iterator[subprocess.Popen[str]]:
    """A program on a pod that hears so many questions; each line to it and from it is a step."""
    arguments = map(str, (port, count, WITHIN_S * PATIENCE))
    argv = [sys.executable, "-ISc", ANSWERS_WHEN_TOLD, *arguments]
    with pod.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            yield server
        finally:
            server.kill()


def _says(server: subprocess.Popen[str], word: str) -> None:
    assert server.stdout is not None
    assert server.stdout.readline() == f"{word}\n"


def test_answer_under_way_when_its_pod_leaves_arrives(world: World, publish: Publish) -> None:
    """What a pod was asked while it served it may still answer once it has left."""
    web = publish([world.web1])
    stop_serving(world.web1, udp=[web.target_port])
    node1, client = world.cluster.nodes[0], world.cluster.client
    probes = [
        Probe(asker, target)
        for family in Family
        for asker, target in (
            (world.shell1, web.at_cluster_ip(family, Protocol.UDP, timeout_s=LATE_S)),
            (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP, timeout_s=LATE_S)),
            (world.sandbox1, web.at_external_ip(family, Protocol.UDP, timeout_s=LATE_S)),
            (node1, web.at_cluster_ip(family, Protocol.UDP, timeout_s=LATE_S)),
            (client, web.at_node(node1, family, Protocol.UDP, timeout_s=LATE_S)),
        )
    ]
    with (
        _answering_when_told(world.web1, web.target_port, len(probes)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        _says(server, "listening")
        asked = pool.submit(ask_all, probes)
        _says(server, "asked")
        world.publish(web, [world.web3])
        assert server.stdin is not None
        server.stdin.write("answer\n")
        server.stdin.flush()
        answers = [one for (one,) in asked.result()]
    lost = [
        (probe.host.name, probe.target.address, one.detail)
        for probe, one in zip(probes, answers, strict=True)
        if not one.ok
    ]
    assert lost == []
