"""The text handed to nft."""

from __future__ import annotations

from itertools import pairwise

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.ebpf.constants import NAT_PORTS
from ebpf_svc.host.nft import PORTS, render

SOCKETS = range(32_768, 61_000)
"""What Linux gives to sockets, unless told otherwise."""


def test_rules_carry_the_mark_they_were_given() -> None:
    """Masquerade (both families: the table is inet), then clear the bit and only that bit (I16)."""
    assert render(0x4000).splitlines() == [
        "add table inet ebpf-svc",
        "add chain inet ebpf-svc postrouting"
        " { type nat hook postrouting priority srcnat; policy accept; }",
        "add chain inet ebpf-svc clear"
        " { type filter hook postrouting priority srcnat + 10; policy accept; }",
        "flush table inet ebpf-svc",
        "add rule inet ebpf-svc postrouting"
        " meta mark & 0x00004000 == 0x00004000"
        " meta l4proto { tcp, udp, sctp } masquerade to :1024-29999 fully-random",
        "add rule inet ebpf-svc clear meta mark & 0x00004000 == 0x00004000"
        " meta mark set meta mark & 0xffffbfff",
    ]


def test_ports_of_masquerade_node_ports_sockets_and_programs_are_apart() -> None:
    """B9, and two connections of a node to one endpoint, by another node's node port and straight
    to it, that must not come from one port.
    """
    first, last = Settings().node_port_range
    kinds = [range(PORTS[0], PORTS[1] + 1), range(first, last + 1), SOCKETS, NAT_PORTS]
    for kind, following in pairwise(kinds):
        assert kind.stop <= following.start
