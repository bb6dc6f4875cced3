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
    modules: frozenset[str] = frozenset()
    """Test modules that run with it unless it is asked for by `--variant`, where another variant
    covers the others; none = all.
    """

    def runs(self, module: str) -> bool:
        """Whether it is usual for a test module, by its last name."""
        return not self.modules or module in self.modules


MATRIX = frozenset(
    {"test_affinity", "test_frontends", "test_node_ports", "test_refusal", "test_source"}
)
"""Who reaches what, from where and as whom: what depends on where packets are translated."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("ebpf", "ebpf"),
        # Pods' packets all meet tc, as those of sandboxes do in every variant.
        Variant(*("ebpf-host-only", "ebpf"), {"socket_lb": SocketLB.HOST_ONLY}, modules=MATRIX),
        # And go past the stack, or stay in the NIC's driver, where they can.
        Variant("ebpf-fast", "ebpf", {"fast_path": True, "xdp": True}),
        # And host processes' packets where they leave.
        Variant(
            *("ebpf-no-sockets", "ebpf"),
            {"socket_lb": SocketLB.OFF},
            modules=MATRIX | {"test_explain"},
        ),
        Variant("nftables", "nftables"),
        Variant("ipvs", "ipvs"),
        Variant("iptables", "iptables"),
        Variant("userspace", "userspace"),
    )
}
