"""Which source address a backend sees: the masquerade matrix of kube-proxy."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ebpf_svc.testbed.host import Host, Pod
from tests.behaviour.conftest import Publish
from tests.lib.probing import (
    BALANCER,
    CLUSTER_IP,
    EXTERNAL_IP,
    LOCALHOST,
    NODE_PORT_1,
    Row,
    assert_held,
    every_pod_network,
    table,
)
from tests.lib.world import World

HERE = (NODE_PORT_1, EXTERNAL_IP, BALANCER)
"""External frontends that node1 translates."""


def _pods_of_node1(world: World) -> tuple[Pod, Pod]:
    return world.shell1, world.sandbox1


def _keeps_source(row: Row) -> bool:
    return row.ok and row.clients == {row.asker.address(row.family)}


def _assert_seen(rows: Iterable[Row], world: World, *, masqueraded: bool) -> None:
    """Backends saw an address of node1 when masqueraded, the asker's own otherwise."""
    own = world.own_addresses(world.cluster.nodes[0])
    assert_held(rows, (lambda row: row.ok and row.clients <= own) if masqueraded else _keeps_source)


@every_pod_network
def test_pod_keeps_its_address_at_cluster_ips(world: World, publish: Publish) -> None:
    """A pod that calls a cluster IP is seen under its own address (P8)."""
    web = publish()
    rows = table(world, web, askers=_pods_of_node1(world), kinds=[CLUSTER_IP], count=6)
    _assert_seen(rows, world, masqueraded=False)


@every_pod_network
def test_external_frontends_masquerade_everyone(world: World, publish: Publish) -> None:
    """eTP Cluster: whoever calls, the backend sees the node, so the reply comes back (P6)."""
    web = publish()
    askers: tuple[Host, ...] = (*_pods_of_node1(world), world.cluster.client)
    rows = table(world, web, askers=askers, kinds=HERE, count=6)
    _assert_seen(rows, world, masqueraded=True)


@every_pod_network
def test_outside_client_at_a_cluster_ip_is_masqueraded(world: World, publish: Publish) -> None:
    """Traffic to cluster IPs that does not come from a pod is masqueraded (P8)."""
    web = publish()
    rows = table(world, web, askers=[world.cluster.client], kinds=[CLUSTER_IP], count=6)
    _assert_seen(rows, world, masqueraded=True)


@pytest.mark.smoke
@every_pod_network
def test_external_policy_local_keeps_the_client_address(world: World, publish: Publish) -> None:
    """eTP Local: a local endpoint sees the outside client itself (P7)."""
    web = publish([world.web1, world.web2], external_local=True)
    rows = table(world, web, askers=[world.cluster.client], kinds=HERE, count=6)
    _assert_seen(rows, world, masqueraded=False)


@every_pod_network
def test_external_policy_local_keeps_pod_addresses(world: World, publish: Publish) -> None:
    """eTP Local: a pod that calls an external frontend keeps its address (P5)."""
    web = publish(external_local=True)
    rows = table(world, web, askers=_pods_of_node1(world), kinds=HERE, count=6)
    _assert_seen(rows, world, masqueraded=False)


@pytest.mark.parametrize("policy", ["cluster", "external_local", "internal_local"])
def test_node_is_seen_under_an_address_of_its_own(
    world: World, publish: Publish, policy: str
) -> None:
    """A node process is seen under an address of its node, never 127.0.0.1 or a VIP (P8, P14)."""
    web = publish(
        internal_local=policy == "internal_local", external_local=policy == "external_local"
    )
    kinds = (CLUSTER_IP, *HERE, LOCALHOST)
    rows = table(world, web, askers=[world.cluster.nodes[0]], kinds=kinds, count=6)
    _assert_seen(rows, world, masqueraded=True)


@pytest.mark.smoke
@every_pod_network
def test_pod_reaches_itself_through_its_service(world: World, publish: Publish) -> None:
    """The only endpoint of a service may call that service by any address (P9)."""
    web = publish([world.web1])
    rows = table(world, web, askers=[world.web1], count=3)
    assert_held(rows, lambda row: row.ok and row.servers == {"web1"})


@every_pod_network
def test_sandboxed_pod_reaches_itself_through_its_service(world: World, publish: Publish) -> None:
    """On the packet path the pod sees a caller other than itself, so its reply comes back (P9)."""
    pod = world.sandbox1
    web = publish([pod])
    rows = table(world, web, askers=[pod], count=3)
    assert_held(rows, lambda row: row.ok and row.clients.isdisjoint({pod.address(row.family)}))
