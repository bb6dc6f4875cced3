"""Other devices than one plain NIC between the machines of a cluster."""

from __future__ import annotations

import json

import pytest

from ebpf_svc.errors import CommandError
from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing
from ebpf_svc.testbed.addressing import PREFIX_LENGTH, Addresses
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node

STACKED = ("vlan id 7", "macvlan mode bridge")
"""Devices that use another one's driver and have none."""
BOND, BOND_PORTS = "bond0", ("eth0", "eth1")


def second_lan(number: int) -> Addresses:
    """Addresses of a node there."""
    return Addresses(f"192.168.107.{10 + number}", f"fd00:192:168:107::{10 + number}")


def stack_nics(cluster: Cluster, name: str) -> None:
    """Make node1's NIC a bond where the kernel has bonds, and let nodes reach each other's pods by
    a device on top of their NICs, a VLAN where there are any.
    """
    _bond(cluster, cluster.nodes[0])
    for node in cluster.nodes:
        if not any(_adds(node, f"link {nic_of(node)} name {name} type {kind}") for kind in STACKED):
            pytest.skip("this kernel has neither VLANs nor macvlan")
        _up(node, name, second_lan(node.number))
    for node in cluster.nodes:
        for other in cluster.nodes:
            if other is not node:
                route_pods(node, other, second_lan(other.number))
        node.namespace.settle()


def nic_of(node: Node) -> str:
    """The device that has the node's address."""
    (found,) = json.loads(node.run(["ip", "-j", "addr", "show", "to", node.address(Family.V4)]))
    return str(found["ifname"])


def route_pods(node: Node, other: Node, gateways: Addresses) -> None:
    """Let a node reach another's pods by this address of the other."""
    for family in Family:
        prefix = addressing.pod_cidrs(other.number).of(family)
        _ip(node, f"route replace {prefix} via {gateways.of(family)}")


def _bond(cluster: Cluster, node: Node) -> None:
    """Join a node's NIC and a second one like it."""
    if not _adds(node, f"name {BOND} type bond mode active-backup miimon 50"):
        return
    second, there = f"{node.name}b", node.namespace.name
    _ip(cluster.router, f"link add {second} type veth peer {BOND_PORTS[1]} netns {there}")
    _ip(cluster.router, f"link set {second} master lan up")
    for port in BOND_PORTS:
        _ip(node, f"addr flush dev {port}")
        _ip(node, f"link set {port} down")
        _ip(node, f"link set {port} master {BOND}")
    _up(node, BOND, node.addresses)
    for family in Family:
        gateway = addressing.LAN_ROUTER.of(family)
        _ip(node, f"route add {addressing.EVERYTHING.of(family)} via {gateway}")


def _adds(node: Node, words: str) -> bool:
    """Make a device; False where the kernel does not know its kind."""
    try:
        _ip(node, f"link add {words}")
    except CommandError as error:
        if "Unknown device type" not in str(error):
            raise
        return False
    return True


def _up(node: Node, device: str, addresses: Addresses) -> None:
    _ip(node, f"link set {device} up")
    for family in Family:
        _ip(node, f"addr replace {addresses.of(family)}/{PREFIX_LENGTH[family]} dev {device}")


def _ip(host: Host, words: str) -> None:
    host.run(["ip", *words.split()])
