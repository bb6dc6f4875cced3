"""The traffic matrix under settings and fields that change it."""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_svc.model.net import Family
from ebpf_svc.testbed.addressing import LAN_ROUTER, PREFIX_LENGTH
from ebpf_svc.testbed.agent import Agent
from tests.behaviour.conftest import Publish
from tests.lib.manifests import PORT
from tests.lib.probing import (
    BALANCER,
    CLUSTER_IP,
    EXTERNAL_IP,
    NODE_PORT_1,
    NODE_PORT_2,
    Row,
    assert_held,
    table,
)
from tests.lib.world import World

SILENT_S = 0.4
LAN = tuple(f"{LAN_ROUTER.of(family)}/{PREFIX_LENGTH[family]}" for family in Family)
"""The nodes' network."""


def _assert_masqueraded(rows: Iterable[Row], world: World) -> None:
    own = world.own_addresses(world.cluster.nodes[0])
    assert_held(rows, lambda row: row.ok and row.clients <= own)


def _assert_kept(rows: Iterable[Row]) -> None:
    assert_held(rows, lambda row: row.ok and row.clients == {row.asker.address(row.family)})


def test_masquerade_all_hides_pods_at_cluster_ips(world: World, publish: Publish) -> None:
    """masqueradeAll: whoever calls a cluster IP is seen under the node's address; other frontends
    are as ever (D3).
    """
    web, local = publish(), publish(external_local=True)
    with world.configured(masquerade_all=True):
        askers = (world.shell1, world.sandbox1, world.cluster.client)
        _assert_masqueraded(table(world, web, askers=askers, kinds=[CLUSTER_IP], count=4), world)
        _assert_kept(table(world, local, askers=[world.cluster.client], kinds=[NODE_PORT_1]))


def test_without_a_detector_nobody_is_told_from_pods(world: World, publish: Publish) -> None:
    """No clusterCIDR: outside clients keep their address at cluster IPs, and pods get the Local
    list at external frontends like anybody else (D2).
    """
    web, local = publish([world.web1, world.web2]), publish(external_local=True)
    with world.configured(cluster_cidrs=[]):
        _assert_kept(table(world, web, askers=[world.cluster.client], kinds=[CLUSTER_IP], count=4))
        rows = table(world, local, askers=[world.cluster.client], kinds=[NODE_PORT_1], count=10)
        assert_held(rows, lambda row: row.ok and row.servers <= {"web1", "web2"})


def test_external_ips_can_be_forbidden(world: World, publish: Publish) -> None:
    """allowExternalIPs off: an external IP is nobody's, the other addresses serve (F8)."""
    web = publish()
    with world.configured(allow_external_ips=False):
        asker = [world.cluster.client]
        rows = table(world, web, askers=asker, kinds=[EXTERNAL_IP], timeout_s=SILENT_S)
        assert_held(rows, lambda row: not any(one.ok for one in row.answers))
        assert_held(table(world, web, askers=asker, kinds=[NODE_PORT_1, BALANCER]))


def test_external_ips_are_allowed_by_prefix(world: World, publish: Publish) -> None:
    """allowExternalIPs as a list: what is inside is served, the rest is nobody's, each family by
    its own prefixes; `explain` says why (F8).
    """
    web, other = publish(), publish()
    served = ((web, Family.V4), (other, Family.V6))
    allowed = [
        f"{each.external.v4}/32" if family is Family.V4 else f"{each.external.v6}/128"
        for each, family in served
    ]
    askers = [world.cluster.client, world.shell1]
    with world.configured(allow_external_ips=allowed):
        for each in (web, other):
            rows = table(world, each, askers=askers, kinds=[EXTERNAL_IP], timeout_s=SILENT_S)
            assert_held([row for row in rows if (each, row.family) in served])
            outside = [row for row in rows if (each, row.family) not in served]
            assert_held(outside, lambda row: not any(one.ok for one in row.answers))
        agent: Agent = world.agents[0]
        said = agent.command("explain", "outside", f"{other.external.v4}:{PORT}")
        assert f"an external IP of tests/{other.name}, but allowExternalIPs" in " ".join(
            said.split()
        )


def test_pod_reaches_an_external_ip_that_no_node_has(world: World, publish: Publish) -> None:
    """The service answers for the address wherever a pod is; its packets leave no node (F8)."""
    web = publish([world.web1])
    assert_held(table(world, web, askers=[world.shell1, world.sandbox1], kinds=[EXTERNAL_IP]))


def test_balancer_of_mode_proxy_is_left_alone(world: World, publish: Publish) -> None:
    """ipMode Proxy: traffic to the VIP goes to the load balancer itself (P11, F9)."""
    web = publish(ip_mode="Proxy")
    askers = [world.shell1, world.cluster.client]
    rows = table(world, web, askers=askers, kinds=[BALANCER], timeout_s=SILENT_S)
    assert_held(rows, lambda row: not any(one.ok for one in row.answers))
    assert_held(table(world, web, askers=askers, kinds=[CLUSTER_IP, NODE_PORT_1]))


def test_source_ranges_of_one_family_leave_the_other_open(world: World, publish: Publish) -> None:
    """Ranges count in their own family (F10, F11)."""
    web = publish(source_ranges=("203.0.113.99/32",))
    rows = table(world, web, askers=[world.cluster.client], kinds=[BALANCER], timeout_s=SILENT_S)
    assert_held([row for row in rows if row.family is Family.V4], lambda row: row.dropped)
    assert_held([row for row in rows if row.family is Family.V6])


def test_source_range_of_the_node_lets_the_node_in(world: World, publish: Publish) -> None:
    """A range with the node's own address: its processes pass, others do not (P10)."""
    web = publish(source_ranges=LAN)
    assert_held(table(world, web, askers=[world.cluster.nodes[0]], kinds=[BALANCER]))
    others = [world.sandbox1, world.cluster.client]
    rows = table(world, web, askers=others, kinds=[BALANCER], timeout_s=SILENT_S)
    assert_held(rows, lambda row: row.dropped)


def test_node_outside_the_ranges_is_dropped(world: World, publish: Publish) -> None:
    """Nothing bypasses the filter, processes of the node neither (P10)."""
    web = publish(source_ranges=("203.0.113.0/24", "2001:db8:71::/64"))
    node = [world.cluster.nodes[0]]
    rows = table(world, web, askers=node, kinds=[BALANCER], timeout_s=SILENT_S)
    assert_held(rows, lambda row: row.dropped)


def test_node_port_of_another_node_is_that_nodes(world: World, publish: Publish) -> None:
    """A packet to a foreign address is not touched because of its port (P15): with policy Local
    the other node answers with its own endpoints.
    """
    web = publish(external_local=True)
    rows = table(world, web, askers=[world.cluster.client], kinds=[NODE_PORT_2], count=6)
    assert_held(rows, lambda row: row.ok and row.servers == {"web3"})
