"""Services work beside what else lives on a node: firewalls, CNI plugins, other agents, and pods,
devices and addresses that come and go under running flows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.host.links import Filter, Side
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed import drivers
from ebpf_svc.testbed.addressing import Addresses
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node, Pod
from ebpf_svc.testbed.traffic import (
    Connection,
    Probe,
    Target,
    ask,
    ask_all,
    connection,
    load,
    serve,
)
from tests.behaviour.conftest import Publish
from tests.lib.kernel import running_kernel
from tests.lib.manifests import PROTOCOLS, Web, node_manifests
from tests.lib.other_agent import ACCEPT, PRIOS, counting_filters, filters_of
from tests.lib.probing import (
    CLUSTER_IP,
    NODE_PORT_1,
    NODE_PORT_2,
    assert_held,
    every_pod_network,
    table,
)
from tests.lib.variants import Variant
from tests.lib.waiting import eventually
from tests.lib.world import World, write_manifests

KINDS = (CLUSTER_IP, NODE_PORT_1, NODE_PORT_2)
LARGE_BYTES = 200_000
"""Many packets of one connection."""
LEAST_PACKETS = 4
"""What two families and protocols, asked once each, send at least through a device."""


@contextmanager
def _sysctl(nodes: tuple[Node, ...], name: str, value: int) -> Iterator[None]:
    """A setting of the nodes that lasts for the block."""
    before = [node.run(["sysctl", "-n", name]).strip() for node in nodes]
    for node in nodes:
        node.run(["sysctl", "-qw", f"{name}={value}"])
    try:
        yield
    finally:
        for node, old in zip(nodes, before, strict=True):
            node.run(["sysctl", "-qw", f"{name}={old}"])


@every_pod_network
def test_strict_reverse_path_filter(world: World, publish: Publish) -> None:
    """A node that drops what comes the wrong way drops nothing of a service."""
    web = publish()
    with _sysctl(world.cluster.nodes, "net.ipv4.conf.all.rp_filter", 1):
        assert_held(table(world, web, askers=world.askers))


_FIREWALL = """
table inet firewall {
    chain forward {
        type filter hook forward priority filter;
        ct state invalid counter drop
    }
    chain input {
        type filter hook input priority filter;
        ct state invalid counter drop
    }
}
"""


@contextmanager
def _firewall(nodes: tuple[Node, ...]) -> Iterator[None]:
    """Nodes drop what connection tracking makes no sense of, and are strict about it (X13)."""
    with _sysctl(nodes, "net.netfilter.nf_conntrack_tcp_be_liberal", 0), ExitStack() as undo:
        for node in nodes:
            node.run(["nft", "-f", "-"], stdin=_FIREWALL)
            undo.callback(node.run, ["nft", "delete", "table", "inet", "firewall"])
        yield


@every_pod_network
@pytest.mark.parametrize("where", ["local", "remote"])
def test_firewall_that_drops_invalid_packets(world: World, publish: Publish, where: str) -> None:
    """Connection tracking sees both directions of a flow or neither, so nothing looks invalid."""
    web = publish([world.web1 if where == "local" else world.web3])
    with _firewall(world.cluster.nodes), ExitStack() as stack:
        conns = _connections(world, web, stack)
        assert_held(table(world, web, askers=world.askers, kinds=KINDS))
        large = table(
            *(world, web),
            askers=world.askers,
            kinds=KINDS,
            timeout_s=10.0,
            request_bytes=LARGE_BYTES,
            reply_bytes=LARGE_BYTES,
            protocols=[Protocol.TCP],
        )
        assert_held(large)
        assert set(_servers(conns).values()) == {"web1" if where == "local" else "web3"}


def _connections(world: World, web: Web, stack: ExitStack, **options: Any) -> dict[str, Connection]:
    """A TCP connection of every kind of client, both families; options are those of Target."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    return {
        f"{asker.name} {target.address}": stack.enter_context(connection(asker, target))
        for family in Family
        for asker, target in (
            (world.shell1, web.at_cluster_ip(family, Protocol.TCP, **options)),
            (world.sandbox1, web.at_cluster_ip(family, Protocol.TCP, **options)),
            (world.shell2, web.at_cluster_ip(family, Protocol.TCP, **options)),
            (node1, web.at_cluster_ip(family, Protocol.TCP, **options)),
            (client, web.at_node(node1, family, Protocol.TCP, **options)),
        )
    }


def _servers(conns: dict[str, Connection]) -> dict[str, str]:
    """Who answers each connection; what went wrong where nobody does."""
    answers = {name: conn.ping() for name, conn in conns.items()}
    return {name: one.server if one.ok else repr(one) for name, one in answers.items()}


@every_pod_network
def test_masquerade_of_the_cni(world: World, publish: Publish) -> None:
    """What a CNI hides behind its node stays hidden, what it does not stays seen; services work."""
    if not world.cluster.cni_masquerade:
        pytest.skip("pods of this network are routed: no CNI hides them")
    web = publish()
    node1, client = world.cluster.nodes[0], world.cluster.client
    serve(client, tcp=[web.target_port])
    for pod in (world.shell1, world.sandbox1):
        for family in Family:
            (outward,) = ask(pod, client.address(family), web.target_port)
            assert outward.client in world.own_addresses(node1), outward
            (across,) = ask(pod, world.web3.address(family), web.target_port)
            assert across.client == pod.address(family), across
    assert_held(table(world, web, askers=world.askers))


@pytest.mark.usefixtures("programs")
def test_filters_of_another_agent(artifact_cache: Path, variant: Variant) -> None:
    """Others' filters on our devices see what passes there, break nothing, and stay."""
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster, ExitStack() as stack:
        (node,) = cluster.nodes
        pod, asker, web = node.add_pod("web1"), node.add_sandbox_pod("sandbox1"), Web(1)
        serve(pod, tcp=[web.target_port], udp=[web.target_port])
        manifests = cluster.folder / "manifests"
        manifests.mkdir()
        write_manifests(manifests / "all.yaml", [*node_manifests([node]), *web.manifests([pod])])
        settings = cluster.settings(node, manifests)
        ebpf = settings.ebpf.model_copy(update=dict(variant.ebpf))
        agent = Agent(node, settings.model_copy(update={"ebpf": ebpf}), mode=variant.mode)
        if variant.ebpf.get("xdp"):
            drivers.prepare(cluster.router, (node, cluster.client, asker, pod))
        devices = ("eth0", asker.device)
        counters = {
            device: stack.enter_context(counting_filters(node, device)) for device in devices
        }
        theirs = {device: filters_of(node, device) for device in devices}
        with agent:
            before = [one.packets for held in counters.values() for one in held]
            for family in Family:
                for protocol in PROTOCOLS:
                    for host, target in (
                        (asker, web.at_cluster_ip(family, protocol)),
                        (cluster.client, web.at_node(node, family, protocol)),
                    ):
                        (answer,) = ask(host, target.address, target.port, protocol)
                        assert (answer.server, answer.peer) == ("web1", target.address)
        seen = [one for held in counters.values() for one in held]
        blind = [
            one.filter
            for one, old in zip(seen, before, strict=True)
            if one.packets - old < LEAST_PACKETS and not _is_passed_by(one.filter, variant)
        ]
        assert blind == []
        assert {device: filters_of(node, device) for device in devices} == theirs


def _is_passed_by(item: Filter, variant: Variant) -> bool:
    """The fast path sends packets on from where they come in, past all that would come behind."""
    return bool(variant.ebpf.get("fast_path")) and (
        item.side is Side.EGRESS or item.prio == PRIOS[ACCEPT]
    )


def test_pod_device_renamed_while_flows_run(world: World, publish: Publish) -> None:
    """A device keeps its programs and its flows whatever it is called."""
    if running_kernel() < (6, 2):
        pytest.skip("before Linux 6.2 a device that is up keeps its name")
    web = publish([world.web1])
    node, pods = world.cluster.nodes[0], (world.web1, world.sandbox1)
    with ExitStack() as stack:
        conns = _connections(world, web, stack)
        targets = [web.at_cluster_ip(family, one) for family in Family for one in PROTOCOLS]
        running = stack.enter_context(load(world.sandbox1, targets, workers=4))
        for pod in pods:
            stack.callback(_rename, node, pod, pod.device)
            _rename(node, pod, f"vethnew{pod.name[-4:]}")
        eventually(lambda: running.read().ok, until=lambda ok: ok > 50, within_s=15)
        assert set(_servers(conns).values()) == {"web1"}
        account = running.stop()
    assert (account.failed, account.failures) == (0, ())
    assert_held(table(world, web, askers=world.askers, kinds=KINDS))


def _rename(node: Node, pod: Pod, name: str) -> None:
    node.run(["ip", "link", "set", "dev", pod.device, "name", name])
    pod.device = name


def test_pod_deleted_in_mid_flow(world: World, publish: Publish) -> None:
    """Its open connections end, those to other pods go on, and nobody new is sent to it."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    leaver = node1.add_pod("leaver")
    going, staying = publish([leaver]), publish([world.web1, world.web3])
    with ExitStack() as stack:
        doomed = _connections(world, going, stack, timeout_s=0.5)
        others = _connections(world, staying, stack)
        assert set(_servers(doomed).values()) == {"leaver"}
        first = _servers(others)
        node1.remove_pod(leaver)
        for asker, target in (
            (world.shell1, going.at_cluster_ip(Family.V4, Protocol.TCP)),
            (client, going.at_node(node1, Family.V4, Protocol.TCP)),
        ):
            assert not ask(asker, target.address, target.port)[0].ok
        world.publish(going, [world.web2])
        assert "leaver" not in _servers(doomed).values()
        assert _servers(others) == first
        assert_held(table(world, going, askers=world.askers, kinds=KINDS))


def test_pod_that_returns_at_its_address_on_another_device(world: World, publish: Publish) -> None:
    """A UDP flow with a fixed port finds the new pod: no flow is tied to a device that is gone."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    pod = node1.add_pod("mayfly")
    web = publish([pod])
    with ExitStack() as stack:
        flows = {
            (asker.name, family.label): stack.enter_context(connection(asker, target))
            for family in Family
            for asker, target in (
                (world.shell1, web.at_cluster_ip(family, Protocol.UDP, connected=False)),
                (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP, connected=False)),
                (world.shell2, web.at_cluster_ip(family, Protocol.UDP, connected=False)),
                (client, web.at_node(node1, family, Protocol.UDP, connected=False)),
            )
        }
        # The second answer comes after the flow has learnt its devices.
        for _ in range(2):
            assert {flow.ping().server for flow in flows.values()} == {"mayfly"}
        node1.remove_pod(pod)
        addresses = Addresses(*pod.addresses)
        again = node1.add_pod("mayfly", addresses)
        stack.callback(node1.remove_pod, again)
        serve(again, tcp=[web.target_port], udp=[web.target_port], name="reborn")
        for flow in flows.values():
            eventually(lambda flow=flow: flow.ping().server, until="reborn".__eq__)  # type: ignore[misc]


def test_node_address_comes_and_goes(world: World, publish: Publish) -> None:
    """Node ports follow the addresses of the node, without a restart (N5)."""
    web = publish([world.web1, world.web3])
    node, client = world.cluster.nodes[0], world.cluster.client
    late = Addresses("192.168.100.77", "fd00:192:168:100::77")
    targets = [
        Target(late.of(family), web.node_port, protocol, timeout_s=0.3)
        for family in Family
        for protocol in PROTOCOLS
    ]

    def answering(host: Host) -> int:
        answers = ask_all([Probe(host, target) for target in targets])
        return sum(one.ok for (one,) in answers)

    assert answering(client) == 0
    node.run(["ip", "address", "add", f"{late.v4}/24", "dev", "eth0"])
    node.run(["ip", "address", "add", f"{late.v6}/64", "dev", "eth0"])
    try:
        eventually(lambda: answering(client), until=len(targets).__eq__)
        assert answering(node) == len(targets)
    finally:
        node.run(["ip", "address", "del", f"{late.v4}/24", "dev", "eth0"])
        node.run(["ip", "address", "del", f"{late.v6}/64", "dev", "eth0"])
    # Its own processes do not depend on what the router still believes.
    eventually(lambda: (answering(client), answering(node)), until=(0, 0).__eq__)
    assert_held(table(world, web, askers=world.askers, kinds=KINDS))
