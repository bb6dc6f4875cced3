"""Every number C and Python share. Python owns them; `defines()` hands them to the compiler as -D.

`bpf/lib/config.h` refuses to compile when one is missing, so no number stands in two places.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from enum import IntEnum, IntFlag

from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.model.net import Family, Sources, family_of

LAYOUT_VERSION = 6
"""Raise it whenever a struct of bpf/lib/types.h or a flag below changes meaning: it is part of the
pin path.
"""

FRONTEND_KIND_SHIFT = 12
FRONTEND_KIND_MASK = 0x3
"""`FrontendKind` in a frontend's flags, once they are shifted."""
MASQUERADE_SHIFT = 3
"""`Sources` bits in a frontend's flags: bits 0-2 = Local list, bits 3-5 = masquerade."""


class FrontendFlag(IntFlag):
    """Bits of `frontend_value.flags` besides the two `Sources` fields and the kind."""

    REJECT = 1 << 6
    """No endpoint anywhere: refuse (P2)."""
    MAGLEV = 1 << 7
    """Slots are a Maglev table: the client's hash chooses, not a random number."""
    SOURCE_RANGES = 1 << 8
    """Only sources in the `source_ranges` trie may connect (P10)."""
    DRAINING = 1 << 9
    """The frontend is gone: flows it has live on, new ones are none of our business (P12)."""


class BackendFlag(IntFlag):
    """Bits of `backend_value.flags`; none set = gone, kept only while flows refer to it."""

    SERVING = 1
    """May hold UDP flows (C5)."""
    IN_CLUSTER = 2
    IN_LOCAL = 4


class FlowFlag(IntFlag):
    """Bits of `flow_value.flags`."""

    HAIRPIN = 1
    """The backend is the client itself: its source becomes the hairpin address."""
    MASQUERADE = 2
    """Packets towards the backend carry the masquerade mark."""
    FAST = 4
    """Both directions go past the stack, see bpf/lib/route.h."""
    SNAT = 8
    """The backend sees an address and port of the node, kept in `reverse`."""
    PORT = 16
    """The backend sees another port of the client, kept in `reverse`: it has a connection from the
    client's own port already."""
    HOST = 32
    """The client is a process of the node, translated by packet (bpf/lib/host.h)."""


class LinkKind(IntEnum):
    """What a device is to the fast path, `link_value.kind`."""

    PEER = 1
    """A pod is at its other end: packets can be put there at once."""
    NIC = 2
    """Leads to other machines: packets leave with a neighbour's address."""
    BRIDGE = 3
    """Pods are at its ports: the same, but XDP cannot send through it."""
    TUNNEL = 4
    """The stack wraps its packets, so it is no fast path; host processes are seen there under
    its address."""
    DRIVER = 5
    """A NIC whose driver runs an XDP program, so another's can hand frames to it."""


NO_LINK = 0
"""The key in `links` of the address for devices that have none there."""


class FlowState(IntFlag):
    """What a TCP flow has shown so far, `flow_value.state`."""

    CLIENT_FIN = 1
    BACKEND_FIN = 2
    RESET = 4
    ESTABLISHED = 8
    """The backend has answered."""


class Drop(IntEnum):
    """Why a packet of a service was not forwarded; the index into the `drops` counters."""

    NO_LOCAL_ENDPOINT = 0
    NO_ENDPOINT = 1
    SOURCE_RANGE = 2
    FLOW_TABLE = 3
    CLIENT_PORT_CLASH = 4
    REWRITE_FAILED = 5
    DISCARDED = 6


class EventKind(IntEnum):
    """What happened to a flow, `event.kind`."""

    OPENED = 0
    ENDING = 1
    """One side of a TCP flow sent a FIN or a reset."""
    DROPPED = 2


NAT_PORTS = range(61_000, 65_536)
"""Ports of the node that stand for clients of the fast path, and of clients that stand for a port
they already use: above those Linux gives to sockets by default, and not among those netfilter
masquerades to (host/nft.py).
"""
NAT_TRIES = 8
"""How many of them a flow tries: who runs out is rare, and told so."""
BESIDE_TRIES = 8
"""How many slots beside its own a flow tries for another backend."""
DIRECT_SERVICE = 0
"""The service of calls to endpoints themselves in the keys of flows: ids begin above it."""
DIRECT_LEASE = 0
"""In this slot of the notes is when a packet of a direct call last had another port: while there
are none, no packet pays for a search."""
UDP_IDLE_S = 120
"""A UDP flow unused this long picks anew, as netfilter's udp_timeout_stream would have it."""
SYN_IDLE_S = 60
"""A half-open TCP flow unused this long picks anew."""
TCP_IDLE_S = 86_400
"""A TCP flow unused this long is over: netfilter's default would have it live five days, but a
client that is silent for a day sends keep-alives."""
DIRECT_NOTES = 65_536
"""Notes of calls to endpoints themselves, each family: an array by hash, so that one costs a store.
"""
BACKEND_CHAIN_MAX = 16
"""Service ports of one endpoint address and port that a reply looks through; flows of an endpoint
that has more are found by `reverse`.
"""
SOCKET_ENTRIES = 4
"""Service addresses one UDP socket may talk to at a time without losing the way back."""
NO_BACKEND = 0
"""Backend id 0 is never given out: it ends chains."""

HAIRPIN_ADDRESS = {Family.V4: "169.254.42.1", Family.V6: "fd42:6562:7066::1"}
"""What a backend sees as source when it calls itself through a service (P9)."""
DISCARD_ADDRESS = {Family.V4: "169.254.42.2", Family.V6: "fd42:6562:7066::2"}
"""Where a socket hook sends what must be dropped silently (P3); the egress program discards it."""
MASQUERADE_MARK = 0x4000
"""Kube-proxy's default mark (I16), unless settings name another; one netfilter rule masquerades
packets that carry it."""


def _words(address: str, family: Family) -> str:
    """An address as the C initialiser of `struct addr`, in wire order."""
    packed = ipaddress.ip_address(address).packed
    words = [int.from_bytes(packed[i : i + 4], "little") for i in range(0, len(packed), 4)]
    return "{{" + ",".join(f"{word:#x}" for word in words) + "}}"


HELD_BYTES = 1500
"""The largest fragment that is held for the first of its datagram: Ethernet's MTU."""
HELD_SLOTS = 8
"""Fragments of one datagram that are held."""
FRAGMENT_S = 2
"""How many seconds apart the fragments of a datagram may come. It is microseconds, and a client
with a socket for each question takes the same id for another datagram soon."""

CSUM_IPV6_FLAG = 1 << 7
"""BPF_F_IPV6 of bpf_l4_csum_replace, Linux 6.16: without it CHECKSUM_COMPLETE of IPv6 packets goes
wrong.
"""


def node_defines(
    family: Family,
    *,
    cluster_cidrs: Sequence[str],
    translate_pods: bool,
    kernel: tuple[int, int],
    masquerade_mark: int = MASQUERADE_MARK,
    fast_path: bool = False,
    xdp: bool = False,
    host_packets: bool = False,
) -> dict[str, str]:
    """What is compiled in for this node: its pods' prefix, its kernel's abilities, its options.

    Args:
        family: the family of the unit.
        cluster_cidrs: prefixes of pods; the first of the family counts (D1).
        translate_pods: the socket hooks act for pods, not only for host processes.
        kernel: major and minor version.
        masquerade_mark: the bit of the mark that asks for masquerading.
        fast_path: flows may go past the stack.
        xdp: those between other machines do so before the stack has made a buffer of a packet.
        host_packets: no socket hooks: host processes are translated by packet.
    """
    flag = CSUM_IPV6_FLAG if family is Family.V6 and kernel >= (6, 16) else 0
    node = {
        "CSUM_FAMILY_FLAG": str(flag),
        "HAVE_COARSE_CLOCK": str(int(kernel >= (5, 11))),
        "HAVE_PEER_SCRUB": str(int(kernel >= (6, 15))),
        "HAVE_SET_RETVAL": str(int(kernel >= (5, 18))),
        "SOCKET_LB_PODS": str(int(translate_pods)),
        "MASQUERADE_MARK": hex(masquerade_mark),
        "FAST_PATH": str(int(fast_path)),
        "XDP": str(int(fast_path and xdp)),
        "HOST_PACKETS": str(int(host_packets)),
    }
    for prefix in cluster_cidrs:
        if family_of(prefix) is family:
            network = ipaddress.ip_network(prefix)
            node["CLUSTER_CIDR_ADDRESS"] = _words(str(network.network_address), family)
            node["CLUSTER_CIDR_MASK"] = _words(str(network.netmask), family)
            break
    return node


def defines(family: Family) -> dict[str, str]:
    """Every -D the C sources of that family need, besides `node_defines`."""
    numbers: dict[str, str] = {
        "IP_FAMILY": str(int(family)),
        "FRONTEND_KIND_SHIFT": str(FRONTEND_KIND_SHIFT),
        "FRONTEND_KIND_MASK": hex(FRONTEND_KIND_MASK),
        "MASQUERADE_SHIFT": str(MASQUERADE_SHIFT),
        "UDP_IDLE_S": str(UDP_IDLE_S),
        "SYN_IDLE_S": str(SYN_IDLE_S),
        "TCP_IDLE_S": str(TCP_IDLE_S),
        "DIRECT_NOTES": str(DIRECT_NOTES),
        "DIRECT_SERVICE": str(DIRECT_SERVICE),
        "DIRECT_LEASE": str(DIRECT_LEASE),
        "NAT_TRIES": str(NAT_TRIES),
        "BESIDE_TRIES": str(BESIDE_TRIES),
        "BACKEND_CHAIN_MAX": str(BACKEND_CHAIN_MAX),
        "SOCKET_ENTRIES": str(SOCKET_ENTRIES),
        "NO_BACKEND": str(NO_BACKEND),
        "HAIRPIN_ADDRESS": _words(HAIRPIN_ADDRESS[family], family),
        "DISCARD_ADDRESS": _words(DISCARD_ADDRESS[family], family),
        "MASQUERADE_MARK": hex(MASQUERADE_MARK),
        "DROP_REASONS": str(len(Drop)),
        "NO_LINK": str(NO_LINK),
        "NAT_PORT_FIRST": str(NAT_PORTS.start),
        "NAT_PORT_COUNT": str(len(NAT_PORTS)),
        "HELD_BYTES": str(HELD_BYTES),
        "HELD_SLOTS": str(HELD_SLOTS),
        "FRAGMENT_S": str(FRAGMENT_S),
    }
    numbers.update({f"SOURCE_{source.name}": str(int(source)) for source in Sources})
    for prefix, flags in (
        ("FRONTEND", FrontendFlag),
        ("KIND", FrontendKind),
        ("BACKEND", BackendFlag),
        ("FLOW", FlowFlag),
        ("STATE", FlowState),
        ("DROP", Drop),
        ("EVENT", EventKind),
        ("LINK", LinkKind),
    ):
        numbers.update({f"{prefix}_{flag.name}": str(int(flag)) for flag in flags})
    return numbers
