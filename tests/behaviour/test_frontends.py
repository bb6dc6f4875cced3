"""Every way to reach a service: each kind of frontend, from everyone, in each pod network.

client ── router ──┬── node1 ── web1 web2 shell1 sandbox1
                   └── node2 ── web3 shell2
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.traffic import Probe, Target, ask, ask_all, connection, spread
from tests.behaviour.conftest import Publish
from tests.lib.manifests import PROTOCOLS, Web
from tests.lib.probing import (
    CLUSTER_IP,
    EXTERNAL_KINDS,
    KINDS,
    LOCALHOST,
    NODE_PORT_1,
    NODE_PORT_2,
    Row,
    assert_held,
    every_pod_network,
    table,
)
from tests.lib.waiting import eventually
from tests.lib.world import World


@pytest.mark.smoke
@every_pod_network
def test_every_frontend_answers_everyone(world: World, publish: Publish) -> None:
    """Pods, sandboxed pods, nodes and the outside reach a service by each of its addresses (P1).

    The client sees the address it called, never the backend's.
    """
    web = publish()
    rows = table(world, web, askers=world.askers, kinds=(*KINDS, LOCALHOST), count=5)
    assert_held(rows)


@every_pod_network
def test_every_kind_of_frontend_uses_every_backend(world: World, publish: Publish) -> None:
    """Local and remote backends both serve, whichever address was called."""
    web = publish()
    rows = table(world, web, askers=world.askers, kinds=(*KINDS, LOCALHOST), count=10)
    reached: dict[str, set[str]] = {}
    for row in rows:
        reached.setdefault(row.kind, set()).update(row.servers)
    assert reached == {row.kind: {"web1", "web2", "web3"} for row in rows}


@pytest.fixture
def without_offload(world: World) -> Iterator[World]:
    """Every host computes checksums itself, and so verifies what arrives."""
    if world.uses_drivers:  # it never does otherwise there
        yield world
        return
    hosts = (*world.askers, *world.webs, world.cluster.router)
    for state in ("off", "on"):
        for host in hosts:
            for device in json.loads(host.run(["ip", "-j", "link"])):
                if device["link_type"] == "ether":
                    host.run(["ethtool", "-K", device["ifname"], "tx", state, "rx", state])
        if state == "off":
            yield world


def test_checksums_are_right_without_offload(without_offload: World, publish: Publish) -> None:
    """With offload a wrong checksum goes unseen between namespaces; without, nothing would arrive.

    The refusals made in the kernel are verified too.
    """
    world, web = without_offload, publish()
    assert_held(table(world, web, askers=world.askers, kinds=(*KINDS, LOCALHOST), count=3))
    closed = publish([])
    assert_held(table(world, closed, askers=world.askers), lambda row: row.refused)


@pytest.mark.parametrize("asker", ["shell1", "sandbox1", "node1", "client"])
def test_requests_spread_evenly(world: World, publish: Publish, asker: str) -> None:
    """Each of three backends gets a third of the connections, give or take chance (P12)."""
    web = publish()
    host = next(one for one in world.askers if one.name == asker)
    kind = NODE_PORT_1 if asker == "client" else CLUSTER_IP
    rows = table(world, web, askers=[host], kinds=[kind], count=150)
    for protocol in PROTOCOLS:
        servers: Counter[str] = Counter()
        for row in rows:
            if row.target.protocol is protocol:
                servers += spread(row.answers)
        assert set(servers) == {"web1", "web2", "web3"}
        # Five standard deviations of 300 throws at one in three.
        assert all(abs(count - 100) < 41 for count in servers.values()), servers


def test_client_gets_the_same_backend_through_either_node(
    world: World, publish: Publish, programs: None
) -> None:
    """Maglev: a balancer that sends a flow to another node moves it to no other backend."""
    web, client = publish(), world.cluster.client
    ways = [*product(Family, PROTOCOLS, range(23_000, 23_012))]
    chosen = [
        ask_all([
            Probe(client, web.at_node(node, family, protocol, source_port=port))
            for family, protocol, port in ways
        ])
        for node in world.cluster.nodes
    ]  # fmt: skip
    through1, through2 = ([answer.server for (answer,) in answers] for answers in chosen)
    assert through1 == through2
    assert set(through1) == {"web1", "web2", "web3"}


def test_nobody_answers_a_ping_for_a_service(world: World, publish: Publish) -> None:
    """P17: a service is its ports; what pings it waits or is refused, and harms nothing."""
    web = publish()
    for family in Family:
        address = web.cluster.of(family)
        for asker in (world.shell1, world.sandbox1, world.cluster.nodes[0]):
            argv = ["bash", "-c", f"! ping -n -c 2 -i 0.2 -W 1 {address}"]
            assert " 0 received" in asker.run(argv), (asker, address)
    assert_held(table(world, web, askers=[world.sandbox1], kinds=[CLUSTER_IP]))


def test_localhost_reaches_node_ports_only_on_the_node(world: World, publish: Publish) -> None:
    """A pod's own 127.0.0.1 is no node's: node ports do not answer there (P15)."""
    web = publish()
    for family in Family:
        target = web.at_localhost(family, Protocol.TCP)
        (answer,) = ask(world.shell1, target.address, target.port)
        assert answer.outcome.value == "refused"


def test_node_ports_answer_on_loopback_of_both_families(world: World, publish: Publish) -> None:
    """A process of the node reaches node ports on 127.0.0.1 and ::1."""
    web = publish()
    assert_held(table(world, web, askers=world.askers, kinds=[LOCALHOST], every=True))


def test_mapped_sockets_reach_ipv4_services(world: World, publish: Publish) -> None:
    """A dual-stack socket that calls an IPv4 service by its v4-mapped address is served."""
    web = publish()
    rows = [
        Row(asker, "mapped", Family.V4, target, ask(asker, *_place(target), count=4, mapped=True))
        for asker in (world.shell1, world.cluster.nodes[0])
        for protocol in PROTOCOLS
        for target in (
            web.at_cluster_ip(Family.V4, protocol),
            web.at_node(world.cluster.nodes[0], Family.V4, protocol),
        )
    ]
    assert_held(rows)


@pytest.mark.smoke
def test_unconnected_udp_sees_the_address_it_called(world: World, publish: Publish) -> None:
    """sendto and recvfrom on one socket: the answer comes from the service's address."""
    web = publish()
    rows = table(
        world, web, askers=world.askers, kinds=(*KINDS, LOCALHOST), count=3, connected=False
    )
    assert_held(row for row in rows if row.target.protocol is Protocol.UDP)


@every_pod_network
def test_large_datagrams_pass_through_services(world: World, publish: Publish) -> None:
    """Fragments of a datagram find the backend of the first one, there and back."""
    itself = tuple(zip(world.cluster.nodes, (NODE_PORT_1, NODE_PORT_2), strict=True))
    ways = [way for way in product(world.askers, KINDS) if way not in itself]
    assert_held(_ask_large(world, publish(), ways))


def test_large_datagrams_reach_a_node_port_of_the_node_itself(
    world: World, publish: Publish
) -> None:
    """They go by the loopback device, whose packets may be larger than those to the backend."""
    assert_held(_ask_large(world, publish(), [(world.cluster.nodes[0], NODE_PORT_1)]))


def _ask_large(world: World, web: Web, ways: Sequence[tuple[Host, str]]) -> list[Row]:
    """Askers and kinds of frontend, with datagrams above every MTU there and back."""
    hosts = list(dict.fromkeys(host for host, _ in ways))
    kinds = list(dict.fromkeys(kind for _, kind in ways))

    def ask_all() -> list[Row]:
        rows = table(
            *(world, web),
            askers=hosts, kinds=kinds, count=2, request_bytes=4000, reply_bytes=5000,
        )  # fmt: skip
        return [
            row
            for row in rows
            if row.target.protocol is Protocol.UDP and (row.asker, row.kind) in ways
        ]

    # A node's datagram that is translated where it leaves is cut for the way to the frontend.
    is_cut_before = world.mode == "ebpf" and world.translates_host_packets

    def is_taught(row: Row) -> bool:
        """Nothing of it was lost for teaching its sender a smaller MTU of the path, as the first
        IPv6 datagram may be, and the first to an endpoint that is further away. The kernel sends
        one lesson a second, and each frontend has its own: who is cut before may wait for it.
        """
        if world.mode == "ipvs":
            return True  # which teaches nobody: a gap, and not worth waiting for
        if is_cut_before and row.family is Family.V6 and isinstance(row.asker, Node):
            return row.ok
        return all(each.detail != "EMSGSIZE" for each in row.answers)

    ask_all()
    rows = eventually(ask_all, until=lambda rows: all(map(is_taught, rows)), within_s=15)
    answers = [each for row in rows for each in row.answers if each.ok]
    assert {(each.request_bytes, each.reply_bytes) for each in answers} == {(4000, 5000)}
    return rows


def test_service_port_alone_is_translated(world: World, publish: Publish) -> None:
    """A port the service does not have is no frontend (P16); a foreign node port neither (P15)."""
    web = publish()
    node2 = world.cluster.nodes[1]
    (answer,) = ask(world.sandbox1, web.cluster.v4, 81, timeout_s=0.3)
    assert not answer.ok
    # A node port number on an address that is no node's: nobody answers for the client.
    (answer,) = ask(world.sandbox1, world.cluster.client.address(Family.V4), web.node_port)
    assert answer.outcome.value == "refused"
    (answer,) = ask(world.sandbox1, node2.address(Family.V4), web.node_port)
    assert answer.ok


def test_two_services_share_their_backends(world: World, publish: Publish) -> None:
    """Replies of one pod behind two services come back from the one that was called."""
    one, other = publish(shared_port=7000), publish(shared_port=7000)
    rows = [
        *table(world, one, askers=world.askers, count=3),
        *table(world, other, askers=world.askers, count=3),
    ]
    assert_held(rows)


def test_pods_may_be_behind_many_services_in_turn(world: World, publish: Publish) -> None:
    """Services come and go on the same pods and port; what they leave behind is in nobody's way."""
    for _ in range(20):
        web = publish(shared_port=7001)
        rows = table(world, web, askers=[world.shell1, world.sandbox1])
        assert_held(rows)
        world.withdraw(web)


def test_forty_services_share_one_pod_and_port(world: World, publish: Publish) -> None:
    """However many services select a pod: each answers everyone from the address it was called by.

    The first ones too, that were there before the endpoint was crowded.
    """
    webs = [publish([world.web3], shared_port=7002) for _ in range(40)]
    for web in (webs[0], webs[20], webs[-1]):
        rows = table(world, web, askers=world.askers, count=2)
        assert_held(rows)


@pytest.mark.parametrize("asker", ["sandbox1", "client"])
def test_port_used_for_two_services_of_one_pod_has_two_connections(
    world: World, publish: Publish, asker: str
) -> None:
    """Two connections of one source port that meet at a pod are told apart there, as by conntrack.

    Both are open at once, and each goes on with the service it called.
    """
    webs = [publish([world.web3], shared_port=7003) for _ in range(2)]
    host = next(one for one in world.askers if one.name == asker)
    node1 = world.cluster.nodes[0]
    for family in Family:
        with ExitStack() as stack:
            connections = [
                stack.enter_context(
                    connection(host, replace(target, source_port=5100 + int(family)))
                )
                for target in (
                    webs[0].at_cluster_ip(family, Protocol.TCP),
                    webs[1].at_cluster_ip(family, Protocol.TCP),
                    webs[1].at_node(node1, family, Protocol.TCP),
                )
            ]
            for _ in range(2):
                for each in connections:
                    assert each.ping().ok


@pytest.mark.parametrize("asker", ["shell1", "sandbox1"])
def test_port_used_for_a_service_may_be_used_for_its_pod(
    world: World, publish: Publish, asker: str
) -> None:
    """One source port calls an external address, a cluster IP and the pod itself, in any order."""
    host = next(one for one in world.askers if one.name == asker)
    assert_held(_in_any_order(world, publish([world.web3]), host))


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.value)
@pytest.mark.parametrize("asker", ["shell1", "sandbox1"])
def test_port_used_for_two_addresses_of_a_service_may_return_to_the_first(
    world: World, publish: Publish, asker: str, protocol: Protocol
) -> None:
    """One source port calls a cluster IP, an external address and the cluster IP again."""
    host = next(one for one in world.askers if one.name == asker)
    web = publish([world.web3])
    rows = []
    for family in Family:
        vip, cluster_ip = web.at_external_ip(family, protocol), web.at_cluster_ip(family, protocol)
        port = 5300 + 2 * int(family) + PROTOCOLS.index(protocol)
        for target in (cluster_ip, vip, cluster_ip):
            answers = ask(host, *_place(target), source_port=port, timeout_s=0.5)
            rows.append(Row(host, "one port", family, target, answers))
    assert_held(rows)


def test_node_may_use_a_port_for_a_service_and_its_pod(world: World, publish: Publish) -> None:
    """The same for a process of the node."""
    assert_held(_in_any_order(world, publish([world.web3]), world.cluster.nodes[0]))


def _in_any_order(world: World, web: Web, host: Host) -> list[Row]:
    rows = []
    for family, protocol in product(Family, PROTOCOLS):
        pod = Target(world.web3.address(family), web.target_port, protocol)
        vip, cluster_ip = web.at_external_ip(family, protocol), web.at_cluster_ip(family, protocol)
        port = 5000 + 2 * int(family) + PROTOCOLS.index(protocol)
        for target in (vip, cluster_ip, pod, vip, pod, cluster_ip):
            answers = ask(host, *_place(target), source_port=port, timeout_s=0.5)
            rows.append(Row(host, "one port", family, target, answers))
    return rows


def test_source_ranges_guard_the_load_balancer_address_alone(
    world: World, publish: Publish
) -> None:
    """Sources outside the ranges are dropped at the VIP, and there only (P10)."""
    allowed = publish(source_ranges=("203.0.113.0/24", "2001:db8:203::/64"))
    closed = publish(source_ranges=("192.0.2.0/24", "2001:db8:ffff::/64"))
    client = world.cluster.client
    assert_held(table(world, allowed, askers=[client]))
    rows = table(world, closed, askers=[client], timeout_s=0.5)
    outcomes = {(row.kind, one.outcome.value) for row in rows for one in row.answers}
    assert outcomes == {
        (kind, "timeout" if kind == "loadBalancer" else "ok")
        for kind in (CLUSTER_IP, *EXTERNAL_KINDS)
    }


def _place(target: Target) -> tuple[str, int, Protocol]:
    return target.address, target.port, target.protocol
