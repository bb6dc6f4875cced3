"""Decide which devices carry programs, and which programs. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from fnmatch import fnmatchcase

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.options import translates_host_packets
from ebpf_svc.host.links import Link, Side

_LOOPBACK_FLAG = 0x8  # IFF_LOOPBACK
_ETHERNET = 1  # ARPHRD_ETHER
_BARE_IP = frozenset({519, 768, 769, 776, 778, 823, 0xFFFE})
"""ARPHRD_* of devices whose packets start with the IP header: RAWIP, TUNNEL, TUNNEL6, SIT, IPGRE,
IP6GRE, NONE (WireGuard, tun). Others, e.g. InfiniBand, have headers the programs do not know."""
_POD_KINDS = frozenset({"veth", "netkit"})
_NEVER_KINDS = frozenset({"bridge", "ifb", "dummy", "nlmon", "vcan"})
_COVERED_BY_MASTER = frozenset({"bond", "team"})
"""Their ports' packets pass the master too: once is enough."""


class DeviceRole(Enum):
    """What a device is to us; the value names the programs of its two sides."""

    POD = ("pod_ingress", "egress")
    """The host's end of a pod's interface."""
    NODE = ("node_ingress", "egress")
    """Leads to other machines, with Ethernet headers."""
    NODE_L3 = ("node_ingress_l3", "egress_l3")
    """Leads to other machines, without Ethernet headers."""

    LOOPBACK = ("", "egress")
    """The node's own, where its processes are translated by packet."""

    def program(self, side: Side) -> str:
        """The C function for one side; empty = none."""
        return self.value[0] if side is Side.INGRESS else self.value[1]


def role_of(link: Link, settings: EbpfSettings) -> DeviceRole | None:
    """The role of a device, or None when it is none of ours.

    Node patterns win, so that a node which is itself a pod (its NIC a veth named eth0) is served.
    """
    if link.flags & _LOOPBACK_FLAG or link.kind in _NEVER_KINDS:
        is_ours = link.flags & _LOOPBACK_FLAG and translates_host_packets(settings)
        return DeviceRole.LOOPBACK if is_ours else None
    if _matches(link.name, settings.node_devices):
        if link.slave_kind in _COVERED_BY_MASTER:
            return None
        if link.type == _ETHERNET:
            return DeviceRole.NODE
        return DeviceRole.NODE_L3 if link.type in _BARE_IP else None
    if link.kind in _POD_KINDS and _matches(link.name, settings.pod_devices):
        return DeviceRole.POD if link.type == _ETHERNET else None
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
