"""Endpoints meant for a zone or a node, and what changes them while traffic goes on."""

from __future__ import annotations

from collections.abc import Callable

from tests.behaviour.conftest import Publish
from tests.lib.manifests import Endpoint, Web, zone_of
from tests.lib.probing import BALANCER, CLUSTER_IP, NODE_PORT_1, Row, assert_held, table
from tests.lib.world import World

KINDS = (CLUSTER_IP, NODE_PORT_1, BALANCER)


def _hinted(world: World, *, zones: bool = False, nodes: bool = False) -> list[Endpoint]:
    """Every endpoint meant for the zone, or the node, it is in."""
    return [
        Endpoint(
            pod,
            zones=(zone_of(pod.node),) if zones else (),
            nodes=(pod.node.name,) if nodes else (),
        )
        for pod in world.webs
    ]


def _ask(world: World, web: Web, count: int = 10) -> list[Row]:
    """What node1 translates: for its pods, its own processes, and the outside."""
    askers = (world.shell1, world.sandbox1, world.cluster.nodes[0], world.cluster.client)
    return table(world, web, askers=askers, kinds=KINDS, count=count)


def _only(*names: str) -> Callable[[Row], bool]:
    return lambda row: row.ok and row.servers <= set(names)


def test_zone_hints_keep_traffic_in_the_zone_for_every_client(
    world: World, publish: Publish
) -> None:
    """All endpoints hinted: those for this zone alone serve, outside clients included (T7, T10)."""
    web = publish(_hinted(world, zones=True))
    assert_held(_ask(world, web), _only("web1", "web2"))


def test_node_hints_come_before_zone_hints(world: World, publish: Publish) -> None:
    """With both kinds of hints, endpoints of the node are used (T7)."""
    both = (zone_of(world.cluster.nodes[0]), zone_of(world.cluster.nodes[1]))
    web = publish(
        [
            Endpoint(world.web1, zones=both, nodes=("node1",)),
            Endpoint(world.web2, zones=both, nodes=("node2",)),
            Endpoint(world.web3, zones=both, nodes=("node2",)),
        ]
    )
    assert_held(_ask(world, web), _only("web1"))


def test_one_endpoint_without_a_hint_turns_hints_off(world: World, publish: Publish) -> None:
    """Whoever writes hints has not finished: everybody serves everybody (T7)."""
    hinted = _hinted(world, zones=True)
    web = publish([*hinted[:2], Endpoint(world.web3)])
    rows = _ask(world, web, count=20)
    assert_held(rows)
    assert set().union(*(row.servers for row in rows)) == {"web1", "web2", "web3"}


def test_endpoints_that_are_not_ready_need_no_hint(world: World, publish: Publish) -> None:
    """Only ready endpoints say whether hints are complete (T9)."""
    hinted = _hinted(world, zones=True)
    web = publish([hinted[0], Endpoint(world.web2, ready=False), hinted[2]])
    assert_held(_ask(world, web), _only("web1"))


def test_zone_without_an_endpoint_is_served_by_all(world: World, publish: Publish) -> None:
    """Hints for other zones only are no hints (T8)."""
    elsewhere = (zone_of(world.cluster.nodes[1]),)
    web = publish([Endpoint(pod, zones=elsewhere) for pod in world.webs])
    rows = _ask(world, web, count=20)
    assert_held(rows)
    assert set().union(*(row.servers for row in rows)) == {"web1", "web2", "web3"}


def test_hints_come_and_go_while_traffic_flows(world: World, publish: Publish) -> None:
    """Each change of the hints decides about the next connection (T7)."""
    web = publish(_hinted(world, zones=True))
    assert_held(_ask(world, web), _only("web1", "web2"))
    world.publish(web, _hinted(world, nodes=True))
    assert_held(_ask(world, web), _only("web1", "web2"))
    world.publish(web, [Endpoint(pod) for pod in world.webs])
    rows = _ask(world, web, count=20)
    assert_held(rows)
    assert "web3" in set().union(*(row.servers for row in rows))


def test_hints_do_not_narrow_policy_local(world: World, publish: Publish) -> None:
    """The Local list is every endpoint of the node, meant for it or not (T3)."""
    elsewhere = (zone_of(world.cluster.nodes[1]),)
    web = publish(
        [
            Endpoint(world.web1, zones=elsewhere),
            Endpoint(world.web2, zones=(zone_of(world.cluster.nodes[0]),)),
            Endpoint(world.web3, zones=elsewhere),
        ],
        external_local=True,
    )
    rows = table(world, web, askers=[world.cluster.client], kinds=[NODE_PORT_1], count=20)
    assert_held(rows, _only("web1", "web2"))
    assert set().union(*(row.servers for row in rows)) == {"web1", "web2"}


def test_not_ready_endpoints_published_as_ready_serve(world: World, publish: Publish) -> None:
    """publishNotReadyAddresses reaches us as `ready` alone (E11): such an endpoint serves, while
    terminating too.
    """
    web = publish([Endpoint(world.web3, ready=True, serving=False, terminating=True)])
    assert_held(_ask(world, web, count=2), _only("web3"))


def test_lists_fall_back_to_terminating_endpoints_apart(world: World, publish: Publish) -> None:
    """A remote endpoint is ready, the local one serves its last: Cluster goes there, Local stays
    here (T4).
    """
    last = Endpoint(world.web1, ready=False, serving=True, terminating=True)
    web = publish([last, Endpoint(world.web3)], external_local=True)
    inside = table(world, web, askers=[world.shell1], kinds=[CLUSTER_IP], count=10)
    assert_held(inside, _only("web3"))
    outside = table(world, web, askers=[world.cluster.client], kinds=[NODE_PORT_1], count=10)
    assert_held(outside, _only("web1"))
