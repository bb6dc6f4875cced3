"""ICMP errors of a service's packets reach the socket they are about, with the addresses it knows.

    client ── router ──┬── node1 ── shell1 sandbox1
                       └── node2 ── web3

Both ends of each connection believe in 1,500 bytes; a hop between them has less, each way another.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.patience import PATIENCE
from ebpf_svc.testbed.traffic import Answer, Probe, Target, ask_all, stop_serving
from tests.behaviour.conftest import Publish
from tests.lib.probing import CLUSTER_IP, KINDS, NODE_PORT_1, Row, assert_held, table, targets
from tests.lib.world import World

every_family = pytest.mark.parametrize("family", list(Family), ids=lambda family: family.label)

NARROW = 1_280
"""Bytes; no IPv6 link has less."""
LARGE = 200_000
TRANSFER_S = 10.0

EXPIRES = """
import errno, os, socket, struct, sys
address, port, hops, wait_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
six = ":" in address
asker = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM)
asker.settimeout(wait_s)
level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
asker.setsockopt(level, 25 if six else 11, 1)  # IPV6_RECVERR, IP_RECVERR
asker.setsockopt(level, socket.IPV6_UNICAST_HOPS if six else socket.IP_TTL, hops)
asker.connect((address, port))
asker.send(b"{}")
try:
    asker.recv(100)
    print("answered")
except OSError as error:
    print(errno.errorcode.get(error.errno, type(error).__name__))
    if error.errno == errno.EHOSTUNREACH:
        print(asker.recvmsg(100, 500, socket.MSG_ERRQUEUE)[3][0])
"""
"""Say how a datagram with that many hops to live ends, and whom its error is about."""


@contextmanager
def narrow_hops(world: World, family: Family) -> Iterator[None]:
    """Less room on the last hop of each way: node2 to its pod, node1 to its own, router to client.

    Routes have it, not devices: a device would also refuse what comes in.
    """
    node1, node2 = world.cluster.nodes
    client, router = world.cluster.client, world.cluster.router
    length = ipaddress.ip_address(client.address(family)).max_prefixlen
    hops: list[tuple[Host, Host]] = [(node2, world.web3), (router, client)]
    hops += [(node1, world.shell1), (node1, world.sandbox1)]
    ip = ["ip", "-6"] if family is Family.V6 else ["ip", "-4"]
    routes = []
    for at, to in hops:
        device = (
            at.run([*ip, "-o", "route", "get", to.address(family)]).split(" dev ")[1].split()[0]
        )
        narrow = [f"{to.address(family)}/{length}", "dev", device, "mtu", str(NARROW)]
        routes.append((at, [*ip, "route", "{}", *narrow, "metric", "1"]))
    forget_paths(world, family)
    try:
        for at, argv in routes:
            at.run([word.format("add") for word in argv])
        yield
    finally:
        for at, argv in routes:
            at.run([word.format("del") for word in argv])
        forget_paths(world, family)


def forget_paths(world: World, family: Family) -> None:
    """Let every host forget what it learned of paths."""
    for host in (*world.askers, *world.webs, world.cluster.router):
        host.run(["ip", "-6" if family is Family.V6 else "-4", "route", "flush", "cache"])


@every_family
@pytest.mark.parametrize("way", ["request", "reply"])
def test_large_transfers_pass_a_narrow_hop(
    world: World, publish: Publish, family: Family, way: str
) -> None:
    """Fragmentation needed and packet too big reach the sender, whichever end it is (P6, P7)."""
    web = publish([world.web3])
    large = {f"{way}_bytes": LARGE, "timeout_s": TRANSFER_S}
    rows = []
    for kind, askers in (
        (CLUSTER_IP, (world.shell1, world.sandbox1, world.cluster.nodes[0])),
        (NODE_PORT_1, (world.cluster.client, world.sandbox1)),
    ):
        for asker in askers:
            for of, target in targets(world, web, kind, **large):
                if of is family and target.protocol is Protocol.TCP:
                    rows.append(Row(asker, kind, family, target))
    # One after another: what one has learned of the path must not serve the next.
    done = []
    for row in rows:
        with narrow_hops(world, family):
            answers = ask_all([Probe(row.asker, row.target)])[0]
        done.append(Row(row.asker, row.kind, row.family, row.target, answers))
    assert_held(done, lambda row: row.ok and all(map(_is_whole, row.answers)))


def _is_whole(answer: Answer) -> bool:
    return max(answer.request_bytes, answer.reply_bytes) >= LARGE


def test_closed_port_of_the_endpoint_refuses_for_the_service(
    world: World, publish: Publish
) -> None:
    """Port unreachable and reset from a pod come from the address that was called, as refusals."""
    web = publish([world.web1, world.web3])
    for pod in (world.web1, world.web3):
        stop_serving(pod, tcp=[web.target_port], udp=[web.target_port])
    rows = table(world, web, askers=world.askers, kinds=KINDS, count=2, timeout_s=TRANSFER_S)
    assert_held(rows, lambda row: row.refused)


@every_family
def test_datagram_that_outlives_its_hops_is_reported_to_its_socket(
    world: World, publish: Publish, family: Family
) -> None:
    """Time exceeded beyond the translation finds the socket, which knows the service alone."""
    web = publish([world.web3])
    node1 = world.cluster.nodes[0]
    ways: list[tuple[Host, Target, int]] = [
        (world.shell1, web.at_cluster_ip(family, Protocol.UDP), 2),
        (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP), 1),
        (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP), 2),
        (world.cluster.client, web.at_node(node1, family, Protocol.UDP), 2),
        (world.cluster.client, web.at_node(node1, family, Protocol.UDP), 3),
    ]
    for asker, target, hops in ways:
        wait_s = str(TRANSFER_S * PATIENCE)
        argv = [sys.executable, "-ISc", EXPIRES, target.address, str(target.port), str(hops)]
        said = asker.run([*argv, wait_s]).split()
        assert said[0] == "EHOSTUNREACH", (asker, target, hops, said)
