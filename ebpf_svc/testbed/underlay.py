"""The wires between client, router and nodes.

Every neighbour is written down, so no first packet waits for a resolution. What the router does not
know it drops, as an internet would: no answer, not even an ICMP error.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing
from ebpf_svc.testbed.addressing import PREFIX_LENGTH
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.links import (
    add_address,
    add_default_route,
    add_neighbour,
    add_veth,
    index_of,
    set_up_eth0,
)

_FORWARD = {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1}
_LAN_MAC = "02:00:00:00:64:01"
_OUTSIDE_MAC = "02:00:00:00:71:01"


def wire(client: Host, router: Host, nodes: Sequence[Node]) -> None:
    """Join everything to the router: the nodes through its bridge `lan`, the client by a link."""
    router.namespace.sysctl(_FORWARD)
    with router.namespace.netlink() as ip:
        ip.link("add", ifname="lan", kind="bridge", address=_LAN_MAC, br_mcast_snooping=0)
        lan = index_of(ip, "lan")
        ip.link("set", index=lan, state="up")
        for node in nodes:
            port = add_veth(ip, node.name, node, _nic_mac(node))
            ip.link("set", index=port, master=lan)
        outside = add_veth(ip, "client", client, _nic_mac(client), address=_OUTSIDE_MAC)
        for family in Family:
            length = PREFIX_LENGTH[family]
            add_address(ip, lan, addressing.LAN_ROUTER.of(family), length)
            add_address(ip, outside, addressing.OUTSIDE_ROUTER.of(family), length)
            add_neighbour(ip, outside, client.address(family), _nic_mac(client))
            for node in nodes:
                add_neighbour(ip, lan, node.address(family), _nic_mac(node))
            ip.route("add", type="blackhole", dst=addressing.EVERYTHING.of(family))
    _set_up_nic(client, addressing.OUTSIDE_ROUTER, _OUTSIDE_MAC)
    for node in nodes:
        node.namespace.sysctl(_FORWARD)
        _set_up_nic(node, addressing.LAN_ROUTER, _LAN_MAC)
        with node.namespace.netlink() as ip:
            nic = index_of(ip, "eth0")
            for other in nodes:
                for family in Family:
                    if other is not node:
                        add_neighbour(ip, nic, other.address(family), _nic_mac(other))


def set_rp_filter(node: Node, value: int) -> None:
    """Set the reverse path filter of a node's devices, those to come included."""
    for scope in ("all", "default", "eth0"):
        node.namespace.sysctl({f"net/ipv4/conf/{scope}/rp_filter": value})


def masquerade_pods(node: Node) -> None:
    """Do what most CNIs do for pods that talk to something outside the cluster."""
    cidrs = addressing.pod_cidrs(node.number)
    inside4, inside6 = addressing.CLUSTER_CIDRS
    rules = f"""
        table inet cni {{
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                ip saddr {cidrs.v4} ip daddr != {{ {inside4}, 224.0.0.0/4 }} masquerade
                ip6 saddr {cidrs.v6} ip6 daddr != {{ {inside6}, ff00::/8 }} masquerade
            }}
        }}
    """
    node.run(["nft", "-f", "-"], stdin=rules)


def _set_up_nic(host: Host, gateways: addressing.Addresses, gateway_mac: str) -> None:
    with host.namespace.netlink() as ip:
        index = set_up_eth0(ip, host, PREFIX_LENGTH)
        for family in Family:
            add_neighbour(ip, index, gateways.of(family), gateway_mac)
            add_default_route(ip, family, gateways.of(family), index)


def _nic_mac(host: Host) -> str:
    return addressing.mac_of(host.addresses.v4, prefix="02:01")
