"""The netlink verbs the wiring is made of; `ip` is a pyroute2 IPRoute in the namespace meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing

if TYPE_CHECKING:
    from ebpf_svc.testbed.host import Host, Node

NUD_PERMANENT = 0x80
RTNH_F_ONLINK = 4
SCOPE_LINK = 253
HOST_LENGTH = {Family.V4: 32, Family.V6: 128}


def add_veth(ip: Any, device: str, host: Host, mac: str, *, mtu: int = 1500, **options: Any) -> int:
    """Join a host, as its eth0 with that MAC, to the namespace of `ip`; returns the near index."""
    peer = {"ifname": "eth0", "net_ns_fd": host.namespace.fd, "address": mac, "mtu": mtu}
    ip.link("add", ifname=device, kind="veth", peer=peer, mtu=mtu, **options)
    index = index_of(ip, device)
    ip.link("set", index=index, state="up")
    return index


def index_of(ip: Any, device: str) -> int:
    """Index of a device that exists."""
    index: int = ip.link_lookup(ifname=device)[0]
    return index


def set_up_eth0(ip: Any, host: Host, lengths: Mapping[Family, int]) -> int:
    """Give a host's eth0 its addresses and bring it up; returns the index."""
    index = index_of(ip, "eth0")
    ip.link("set", index=index, state="up")
    for family in Family:
        add_address(ip, index, host.address(family), lengths[family])
    return index


def add_address(ip: Any, index: int, address: str, length: int) -> None:
    """Give a device an address; `Namespace.settle` waits until it may be used."""
    ip.addr("add", index=index, address=address, prefixlen=length)


def add_neighbour(ip: Any, index: int, address: str, mac: str) -> None:
    """Write a neighbour down for good: no resolution, hence no first packet that waits for one."""
    ip.neigh("replace", dst=address, lladdr=mac, ifindex=index, state=NUD_PERMANENT)


def add_default_route(ip: Any, family: Family, gateway: str, index: int) -> None:
    """Send everything else to a gateway on that device."""
    ip.route("add", dst=addressing.EVERYTHING.of(family), gateway=gateway, oif=index)


def route_pods_by_node(ip: Any, nodes: Iterable[Node]) -> None:
    """Send each node's pod prefixes to that node's address."""
    for node in nodes:
        for family in Family:
            prefix = addressing.pod_cidrs(node.number).of(family)
            ip.route("replace", dst=prefix, gateway=node.address(family))
