"""What the behaviour suite runs with: every dataplane, and the eBPF one under its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ebpf_svc.config import SocketLB


@dataclass(frozen=True, slots=True)
class Variant:
    """A dataplane with settings; a column of docs/behaviours.md."""

    name: str
    mode: str
    ebpf: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Fields of `EbpfSettings` that differ from the testbed's."""
    is_asked_for: bool = False
    """Runs only with `--variant NAME`: another variant covers most of it."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ebpf", "ebpf"),
        # Pods' packets all meet tc, as those of sandboxes do in every variant.
        Variant(*("ebpf-host-only", "ebpf"), {"socket_lb": SocketLB.HOST_ONLY}, is_asked_for=True),
        # And go past the stack, or stay in the NIC's driver, where they can.
        Variant("ebpf-fast", "ebpf", {"fast_path": True, "xdp": True}),
        Variant("nftables", "nftables"),
        Variant("ipvs", "ipvs"),
        Variant("iptables", "iptables"),
        Variant("userspace", "userspace"),
    )
}
