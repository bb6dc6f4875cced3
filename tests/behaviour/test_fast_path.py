"""The fast path: packets of services past netfilter, and the same answers as ever.

That everything else holds on it too is for the suite's variant `ebpf-fast` to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.dataplane.ebpf.constants import NAT_PORTS
from ebpf_svc.host import conntrack_table
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.podnet import PodNetwork
from ebpf_svc.testbed.traffic import Answer, Target, ask, connection
from tests.lib.manifests import Web
from tests.lib.probing import sent_by_driver
from tests.lib.world import World

every_family = pytest.mark.parametrize("family", list(Family), ids=lambda family: family.label)


@pytest.fixture(scope="module", params=[PodNetwork.BRIDGE, PodNetwork.ROUTED], ids=str)
def fast(
    request: pytest.FixtureRequest, artifact_cache: Path, no_leftovers: None
) -> Iterator[World]:
    """A cluster with the fast path on: pods' packets meet tc."""
    world = World(
        request.param,
        cache_dir=artifact_cache,
        ebpf={"fast_path": True},
    )
    yield world
    world.close()


@pytest.fixture(scope="module")
def web(fast: World) -> Web:
    """Two endpoints on node1, one on node2."""
    web = fast.new_web()
    fast.publish(web, fast.webs)
    return web


def tracked(node: Node, *ends: str) -> list[conntrack_table.Entry]:
    """What the node's netfilter has seen of TCP to these addresses."""
    with node.namespace.entered():
        return [
            entry
            for family in Family
            for entry in conntrack_table.entries(
                family, Protocol.TCP, lambda to, answers_from: to[0] in ends
            )
        ]


def seen(fast: World, *frontends: str) -> list[conntrack_table.Entry]:
    """What node1's netfilter has seen of these frontends and of all endpoints."""
    pods = (pod.address(family) for pod in fast.webs for family in Family)
    return tracked(fast.cluster.nodes[0], *frontends, *pods)


REQUESTS = 48
"""So many miss one of three endpoints by chance once in ten million."""


def asked(asker: Host, target: Target) -> list[Answer]:
    answers = ask(asker, target.address, target.port, target.protocol, count=REQUESTS)
    assert all(answer.ok and answer.peer == target.address for answer in answers), answers
    return answers


@pytest.fixture(scope="module")
def driver(artifact_cache: Path, no_leftovers: None) -> Iterator[World]:
    """The same with XDP on the nodes' NICs."""
    world = World(
        PodNetwork.BRIDGE, cache_dir=artifact_cache, ebpf={"fast_path": True, "xdp": True}
    )
    yield world
    world.close()


@every_family
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP], ids=str)
def test_driver_forwards_to_remote_backends(
    driver: World, family: Family, protocol: Protocol
) -> None:
    """P6: what an established flow of an outside client says to a backend on another node, and
    hears from it, never becomes a buffer of node1's; the backend sees node1.
    """
    node = driver.cluster.nodes[0]
    web = driver.new_web()
    driver.publish(web, [driver.web3])
    target = web.at_node(node, family, protocol)
    with connection(driver.cluster.client, target) as opened:
        first = opened.ping()
        before = sent_by_driver(node)
        answers = [opened.ping() for _ in range(20)]
    assert all(answer.ok and answer.server == "web3" for answer in (first, *answers)), answers
    assert {answer.client for answer in answers} <= driver.own_addresses(node)
    # Both ways: the requests to node2 and its answers to the router.
    assert sent_by_driver(node) - before >= 40
    driver.withdraw(web)


@every_family
def test_pod_reaches_a_cluster_ip_past_netfilter(fast: World, web: Web, family: Family) -> None:
    """P8: a pod keeps its address, and node1's netfilter sees neither request nor answer."""
    target = web.at_cluster_ip(family, Protocol.TCP)
    answers = asked(fast.shell1, target)
    assert {answer.client for answer in answers} == {fast.shell1.address(family)}
    assert {answer.server for answer in answers} == {"web1", "web2", "web3"}
    assert seen(fast, target.address) == []


@every_family
def test_outside_client_at_a_node_port_goes_past_netfilter(
    fast: World, web: Web, family: Family
) -> None:
    """P6: every backend sees an address of node1, and node1's netfilter sees nothing."""
    node = fast.cluster.nodes[0]
    target = web.at_node(node, family, Protocol.TCP)
    answers = asked(fast.cluster.client, target)
    assert {answer.client for answer in answers} <= fast.own_addresses(node)
    assert {answer.server for answer in answers} == {"web1", "web2", "web3"}
    assert {answer.client_port for answer in answers} <= set(NAT_PORTS)
    assert seen(fast, target.address) == []


@every_family
def test_external_policy_local_keeps_the_address_past_netfilter(
    fast: World, family: Family
) -> None:
    """P7: the endpoint sees the outside client, and node1's netfilter sees nothing."""
    local = fast.new_web(external_local=True)
    fast.publish(local, fast.webs)
    target = local.at_balancer(family, Protocol.TCP)
    answers = asked(fast.cluster.client, target)
    assert {answer.client for answer in answers} == {fast.cluster.client.address(family)}
    assert {answer.server for answer in answers} == {"web1", "web2"}
    assert seen(fast, target.address) == []
    fast.withdraw(local)
