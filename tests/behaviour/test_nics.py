"""Devices between nodes that are not one plain NIC each: VLANs, bonds, a NIC that stops being one.

With the fast path on, and XDP where a driver can.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ebpf_svc.model.net import Family
from ebpf_svc.testbed.host import Node
from ebpf_svc.testbed.podnet import PodNetwork
from ebpf_svc.testbed.traffic import Answer, Connection, connection
from tests.lib.manifests import PROTOCOLS
from tests.lib.nics import BOND, BOND_PORTS, nic_of, route_pods, stack_nics
from tests.lib.probing import (
    CLUSTER_IP,
    NODE_PORT_1,
    assert_held,
    sent_by_driver,
    table,
)
from tests.lib.waiting import eventually
from tests.lib.world import World

KINDS = (CLUSTER_IP, NODE_PORT_1)
LATER = 10
"""Requests on an open connection: a driver that forwards has them, not the first."""


@pytest.fixture(scope="module")
def stacked(artifact_cache: Path, no_leftovers: None) -> Iterator[World]:
    """Nodes reach each other's pods by a device on top of their NICs, which alone have drivers;
    node1's NIC is a bond where the kernel has bonds.
    """
    world = World(
        PodNetwork.BRIDGE,
        cache_dir=artifact_cache,
        ebpf={"fast_path": True, "xdp": True},
        prepare=lambda cluster: stack_nics(cluster, "eth7"),
    )
    yield world
    world.close()


def _runs_xdp(node: Node, device: str) -> bool:
    (link,) = json.loads(node.run(["ip", "-j", "link", "show", device]))
    return "xdp" in link


@contextmanager
def _far_connections(world: World) -> Iterator[list[Connection]]:
    """The outside client's to a backend on node2, through node1; open, of each kind."""
    web = world.new_web()
    world.publish(web, [world.web3])
    client, node = world.cluster.client, world.cluster.nodes[0]
    with ExitStack() as stack:
        opened = [
            stack.enter_context(connection(client, web.at_node(node, family, protocol)))
            for family in Family
            for protocol in PROTOCOLS
        ]
        assert all(each.ping().ok for each in opened)
        yield opened
    world.withdraw(web)


def _lost(opened: Iterable[Connection]) -> list[Answer]:
    """What of later requests was not answered by that backend."""
    answers = [each.ping() for each in opened for _ in range(LATER)]
    return [answer for answer in answers if answer.server != "web3"]


def test_services_are_reached_over_vlan_and_bond(stacked: World) -> None:
    """P1, P6, P8: by everyone, at cluster IPs and node ports, here and on the other node."""
    web = stacked.new_web()
    stacked.publish(web, stacked.webs)
    assert_held(table(stacked, web, askers=stacked.askers, kinds=KINDS))
    stacked.withdraw(web)


def test_driver_hands_no_frame_to_a_device_without_one(stacked: World) -> None:
    """P6: the backend is behind a VLAN (or a macvlan) of the NIC, whose driver could forward to
    other NICs; what it hands to a device that has no driver is lost, so that is left to tc.
    """
    node = stacked.cluster.nodes[0]
    assert _runs_xdp(node, nic_of(node))
    assert not _runs_xdp(node, "eth7")
    with _far_connections(stacked) as opened:
        assert _lost(opened) == []


def test_nic_that_is_none_any_more_gives_its_program_up(stacked: World) -> None:
    """A device that is renamed keeps no program of ours in its driver, as it keeps no filter."""
    node = stacked.cluster.nodes[0]
    node.run(["ip", "link", "add", "eth8", "type", "veth", "peer", "far8"])
    eventually(lambda: _runs_xdp(node, "eth8"))
    node.run(["ip", "link", "set", "eth8", "name", "uplink8"])
    eventually(lambda: not _runs_xdp(node, "uplink8"))
    node.run(["ip", "link", "del", "uplink8"])


def test_drivers_of_a_bond_forward_and_flows_outlive_one_of_its_ports(stacked: World) -> None:
    """P6: the program given to the bond runs in its ports, and goes on when one of them fails."""
    node, other = stacked.cluster.nodes
    if nic_of(node) != BOND:
        pytest.skip("this kernel has no bonds")
    route_pods(node, other, other.addresses)
    with _far_connections(stacked) as opened:
        before = sent_by_driver(node, *BOND_PORTS)
        assert _lost(opened) == []
        # Both ways.
        assert sent_by_driver(node, *BOND_PORTS) - before >= 2 * LATER * len(opened)
        node.run(["ip", "link", "set", BOND_PORTS[0], "down"])
        eventually(lambda: all(each.ping().ok for each in opened))
        assert _lost(opened) == []
