"""The text handed to nft."""

from __future__ import annotations

from ebpf_svc.host.nft import render


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
        " meta l4proto { tcp, udp, sctp } masquerade to :32768-60999 fully-random",
        "add rule inet ebpf-svc clear meta mark & 0x00004000 == 0x00004000"
        " meta mark set meta mark & 0xffffbfff",
    ]
