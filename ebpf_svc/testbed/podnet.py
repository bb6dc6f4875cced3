"""How pods are attached to a node and nodes reach each other's pods: three CNIs in miniature.

BRIDGE   pod ── veth… ─ cni0 (the gateway) ─ routes between the nodes       (bridge CNI)
ROUTED   pod ── cali… ─ a route per pod, gateway 169.254.1.1 on every link  (Calico)
OVERLAY  pod ── veth… ─ cni0 ─ flannel.1 ═ vxlan between the nodes          (flannel)
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Protocol

from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing
from ebpf_svc.testbed.addressing import PREFIX_LENGTH
from ebpf_svc.testbed.host import Node, Pod
from ebpf_svc.testbed.links import (
    HOST_LENGTH,
    RTNH_F_ONLINK,
    SCOPE_LINK,
    add_address,
    add_default_route,
    add_neighbour,
    add_veth,
    index_of,
    route_pods_by_node,
    set_up_eth0,
)

OVERLAY_MTU = 1450
VXLAN_ID = 1
VXLAN_PORT = 8472
ROUTED_GATEWAY = {Family.V4: "169.254.1.1", Family.V6: "fe80::ecee:eeff:feee:eeee"}
ROUTED_GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"


class PodNetwork(StrEnum):
    """The three ways."""

    BRIDGE = "bridge"
    ROUTED = "routed"
    OVERLAY = "overlay"


class PodWiring(Protocol):
    """One way of attaching pods."""

    def prepare(self, nodes: Iterable[Node]) -> None:
        """Set every node up, before there are pods."""

    def attach(self, node: Node, pod: Pod) -> None:
        """Give a pod its eth0 and set `pod.device`."""

    def detach(self, node: Node, pod: Pod) -> None:
        """Take it away again."""


def wiring(network: PodNetwork) -> PodWiring:
    """The wiring of a pod network."""
    if network is PodNetwork.ROUTED:
        return RoutedWiring()
    return BridgeWiring(overlay=network is PodNetwork.OVERLAY)


class BridgeWiring:
    """Pods behind a bridge that is their gateway; between nodes plain routes, or a vxlan device."""

    def __init__(self, *, overlay: bool) -> None:
        self._overlay = overlay
        self._mtu = OVERLAY_MTU if overlay else 1500

    def prepare(self, nodes: Iterable[Node]) -> None:
        nodes = tuple(nodes)
        for node in nodes:
            gateways = addressing.pod_gateways(node.number)
            with node.namespace.netlink() as ip:
                ip.link("add", ifname="cni0", kind="bridge", address=addressing.mac_of(gateways.v4))
                index = index_of(ip, "cni0")
                ip.link("set", index=index, mtu=self._mtu, state="up")
                for family in Family:
                    add_address(ip, index, gateways.of(family), PREFIX_LENGTH[family])
                others = [other for other in nodes if other is not node]
                if self._overlay:
                    self._add_tunnel(ip, node, others)
                else:
                    route_pods_by_node(ip, others)

    def _add_tunnel(self, ip: Any, node: Node, others: Iterable[Node]) -> None:
        own = addressing.tunnel_addresses(node.number)
        ip.link(
            "add", ifname="flannel.1", kind="vxlan", vxlan_id=VXLAN_ID, vxlan_port=VXLAN_PORT,
            vxlan_local=node.address(Family.V4), vxlan_link=index_of(ip, "eth0"),
            vxlan_learning=False, address=addressing.mac_of(own.v4),
        )  # fmt: skip
        index = index_of(ip, "flannel.1")
        ip.link("set", index=index, mtu=self._mtu, state="up")
        for family in Family:
            add_address(ip, index, own.of(family), HOST_LENGTH[family])
        for other in others:
            far = addressing.tunnel_addresses(other.number)
            mac = addressing.mac_of(far.v4)
            ip.fdb("append", ifindex=index, lladdr=mac, dst=other.address(Family.V4))
            for family in Family:
                add_neighbour(ip, index, far.of(family), mac)
                ip.route(
                    "add", dst=addressing.pod_cidrs(other.number).of(family),
                    gateway=far.of(family), oif=index, flags=RTNH_F_ONLINK,
                )  # fmt: skip

    def attach(self, node: Node, pod: Pod) -> None:
        pod.device = f"veth{secrets.token_hex(4)}"
        with node.namespace.netlink() as ip:
            index = add_veth(ip, pod.device, pod, _pod_mac(pod), mtu=self._mtu)
            ip.link("set", index=index, master=index_of(ip, "cni0"))
        gateways = addressing.pod_gateways(node.number)
        with pod.namespace.netlink() as ip:
            index = set_up_eth0(ip, pod, PREFIX_LENGTH)
            for family in Family:
                add_default_route(ip, family, gateways.of(family), index)

    def detach(self, node: Node, pod: Pod) -> None:
        _remove_link(node, pod.device)


class RoutedWiring:
    """A point-to-point link per pod; the node routes each pod's address to its link."""

    def prepare(self, nodes: Iterable[Node]) -> None:
        nodes = tuple(nodes)
        for node in nodes:
            with node.namespace.netlink() as ip:
                route_pods_by_node(ip, (other for other in nodes if other is not node))

    def attach(self, node: Node, pod: Pod) -> None:
        pod.device = f"cali{secrets.token_hex(5)}"
        with node.namespace.netlink() as ip:
            index = add_veth(ip, pod.device, pod, _pod_mac(pod), address=ROUTED_GATEWAY_MAC)
            for family in Family:
                address = pod.address(family)
                add_neighbour(ip, index, address, _pod_mac(pod))
                ip.route("add", dst=f"{address}/{HOST_LENGTH[family]}", oif=index, scope=SCOPE_LINK)
        node.namespace.sysctl({f"net/ipv4/conf/{pod.device}/proxy_arp": 1})
        with pod.namespace.netlink() as ip:
            index = set_up_eth0(ip, pod, HOST_LENGTH)
            ip.route("add", dst=f"{ROUTED_GATEWAY[Family.V4]}/32", oif=index, scope=SCOPE_LINK)
            for family in Family:
                add_neighbour(ip, index, ROUTED_GATEWAY[family], ROUTED_GATEWAY_MAC)
                add_default_route(ip, family, ROUTED_GATEWAY[family], index)

    def detach(self, node: Node, pod: Pod) -> None:
        _remove_link(node, pod.device)


def _pod_mac(pod: Pod) -> str:
    return addressing.mac_of(pod.addresses.v4)


def _remove_link(node: Node, device: str) -> None:
    """Delete a device of a node; it may be gone with its pod already."""
    with node.namespace.netlink() as ip:
        for index in ip.link_lookup(ifname=device):
            ip.link("del", index=index)
