"""The testbed's address plan: who has which address.

Pure; the wiring, the drawing and the examples rely on it. Documentation ranges stand for the
outside world, private ones for the cluster.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from ebpf_svc.model.net import Family

CLUSTER_CIDRS = ("10.244.0.0/16", "fd00:10:244::/48")
"""Every pod address of the cluster."""
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
VIP_CIDRS = ("198.51.100.0/24", "198.18.0.0/16", "2001:db8:51::/64")
"""External and load balancer addresses: on no interface, the router sends them to a node."""

PREFIX_LENGTH = {Family.V4: 24, Family.V6: 64}
FIRST_POD = 10
"""Host number of the first pod that is not given an address."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """One address, or prefix, of each family."""

    v4: str
    v6: str

    def of(self, family: Family) -> str:
        return self.v4 if family is Family.V4 else self.v6

    def __iter__(self) -> Iterator[str]:
        return iter((self.v4, self.v6))


EVERYTHING = Addresses("0.0.0.0/0", "::/0")
OUTSIDE_ROUTER = Addresses("203.0.113.1", "2001:db8:203::1")
OUTSIDE_CLIENT = Addresses("203.0.113.10", "2001:db8:203::10")
LAN_ROUTER = Addresses("192.168.100.1", "fd00:192:168:100::1")


def node_addresses(number: int) -> Addresses:
    """Addresses of a node's NIC; nodes are numbered from 1."""
    return Addresses(f"192.168.100.{10 + number}", f"fd00:192:168:100::{10 + number}")


def pod_cidrs(number: int) -> Addresses:
    """Prefixes of a node's pods."""
    return Addresses(f"10.244.{number}.0/24", f"fd00:10:244:{number}::/64")


def pod_gateways(number: int) -> Addresses:
    """The bridge's addresses on a node."""
    return Addresses(f"10.244.{number}.1", f"fd00:10:244:{number}::1")


def tunnel_addresses(number: int) -> Addresses:
    """Addresses of a node's tunnel device: the first of the pod prefix, as flannel gives them."""
    return Addresses(f"10.244.{number}.0", f"fd00:10:244:{number}::")


def pod_addresses(number: int, host_number: int) -> Addresses:
    """Addresses of a node's pod that was given none."""
    return Addresses(f"10.244.{number}.{host_number}", f"fd00:10:244:{number}::{host_number}")


def mac_of(v4_address: str, prefix: str = "0a:58") -> str:
    """A MAC address made from an IPv4 address, as CNI plugins do: known before the device is."""
    octets = ipaddress.IPv4Address(v4_address).packed
    return prefix + "".join(f":{octet:02x}" for octet in octets)
