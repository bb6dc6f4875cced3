"""Services without endpoints refuse; services whose policy leaves none here drop."""

from __future__ import annotations

import pytest

from ebpf_svc.model.net import Protocol
from ebpf_svc.testbed.patience import PATIENCE
from tests.behaviour.conftest import Publish
from tests.lib.manifests import Endpoint
from tests.lib.probing import (
    BALANCER,
    CLUSTER_IP,
    EXTERNAL_IP,
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
from tests.lib.world import World

AT_ONCE_MS = 100 * PATIENCE
"""Far below the second after which TCP would try again (P2)."""
DROP_S = 0.4
"""Long enough to tell silence from an answer that takes its time."""


def _refused_at_once(row: Row) -> bool:
    return row.refused and all(one.latency_ms < AT_ONCE_MS for one in row.answers)


def _dropped(row: Row) -> bool:
    return row.dropped


@pytest.mark.smoke
@every_pod_network
def test_service_without_endpoints_refuses_at_once(world: World, publish: Publish) -> None:
    """Nobody waits for a service that nobody serves: every address refuses, TCP and UDP (P2)."""
    web = publish([])
    rows = table(world, web, askers=world.askers, kinds=(*KINDS, LOCALHOST), count=2)
    assert_held(rows, _refused_at_once)


def test_endpoints_that_are_not_ready_refuse(world: World, publish: Publish) -> None:
    """Endpoints that neither are ready nor serve while terminating do not count (T5)."""
    web = publish([Endpoint(world.web1, ready=False), Endpoint(world.web3, False, False, True)])
    assert_held(table(world, web, askers=world.askers), _refused_at_once)


def test_service_serves_as_soon_as_it_has_endpoints(world: World, publish: Publish) -> None:
    """Refusal ends with the first endpoint and begins again with the last one's end."""
    web = publish([])
    askers = (world.shell1, world.sandbox1, world.cluster.client)
    assert_held(table(world, web, askers=askers), _refused_at_once)
    world.publish(web, [world.web3])
    assert_held(table(world, web, askers=askers))
    world.publish(web, [])
    assert_held(table(world, web, askers=askers), _refused_at_once)


def test_internal_policy_local_drops_without_a_local_endpoint(
    world: World, publish: Publish
) -> None:
    """iTP Local: a node without an endpoint drops traffic to the cluster IP alone (P1, P3)."""
    web = publish([world.web3], internal_local=True)
    node1, node2 = world.cluster.nodes
    here = (world.shell1, world.sandbox1, node1)
    rows = table(world, web, askers=here, kinds=[CLUSTER_IP], timeout_s=DROP_S)
    assert_held(rows, _dropped)
    assert_held(table(world, web, askers=[world.shell2, node2], kinds=[CLUSTER_IP]))
    assert_held(table(world, web, askers=world.askers, kinds=EXTERNAL_KINDS))


@pytest.mark.smoke
def test_internal_policy_local_keeps_to_the_node(world: World, publish: Publish) -> None:
    """iTP Local: the cluster IP uses local endpoints only, external frontends use all (P1)."""
    web = publish(internal_local=True)
    node1 = world.cluster.nodes[0]
    rows = table(
        world, web, askers=[world.shell1, world.sandbox1, node1], kinds=[CLUSTER_IP], count=12
    )
    assert_held(rows, lambda row: row.ok and row.servers <= {"web1", "web2"})
    rows = table(world, web, askers=[node1], kinds=[NODE_PORT_1], count=20)
    assert {server for row in rows for server in row.servers} == {"web1", "web2", "web3"}


@pytest.mark.smoke
@every_pod_network
def test_external_policy_local_drops_without_a_local_endpoint(
    world: World, publish: Publish
) -> None:
    """eTP Local: outside traffic is dropped by a node without endpoints (P4), served by others."""
    web = publish([world.web3], external_local=True)
    client = world.cluster.client
    # The router sends VIPs to node1, which has no endpoint.
    rows = table(
        world, web, askers=[client], kinds=[NODE_PORT_1, EXTERNAL_IP, BALANCER], timeout_s=DROP_S
    )
    assert_held(rows, _dropped)
    rows = table(world, web, askers=[client], kinds=[NODE_PORT_2], count=3)
    assert_held(rows)


@every_pod_network
def test_external_policy_local_spares_the_cluster_itself(world: World, publish: Publish) -> None:
    """eTP Local: pods and the node reach external frontends through any endpoint (P5)."""
    web = publish([world.web3], external_local=True)
    node1 = world.cluster.nodes[0]
    rows = table(
        world, web, askers=[world.shell1, world.sandbox1, node1],
        kinds=[CLUSTER_IP, NODE_PORT_1, EXTERNAL_IP, BALANCER, LOCALHOST], count=2,
    )  # fmt: skip
    assert_held(rows)


def test_local_policies_without_any_endpoint_refuse(world: World, publish: Publish) -> None:
    """With no endpoint anywhere even Local policies refuse rather than drop (P2)."""
    web = publish([], internal_local=True, external_local=True)
    rows = table(world, web, askers=world.askers, kinds=(*KINDS, LOCALHOST))
    assert_held(rows, _refused_at_once)


def test_terminating_endpoints_serve_when_nothing_else_does(world: World, publish: Publish) -> None:
    """A rolling restart loses nothing: endpoints on their way out serve until others do (T2)."""
    leaving = Endpoint(world.web1, ready=False, serving=True, terminating=True)
    web, unasked = publish([leaving]), publish([leaving])
    rows = table(world, web, askers=world.askers)
    assert_held(rows, lambda row: row.ok and row.servers == {"web1"})
    for each in (web, unasked):
        world.publish(each, [leaving, world.web3])
    # A flow of UDP stays, and a client may by chance take the port of an earlier request (C5).
    rows = [
        *table(world, web, askers=world.askers, protocols=[Protocol.TCP], count=4),
        *table(world, unasked, askers=world.askers, protocols=[Protocol.UDP], count=4),
    ]
    assert_held(rows, lambda row: row.ok and row.servers == {"web3"})
