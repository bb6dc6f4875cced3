"""The ways that are compared, and which of them this machine has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebpf_svc.bench.figures import Variant
from ebpf_svc.bench.serving import reason_against
from ebpf_svc.config import Settings
from ebpf_svc.modes import MODES, make_dataplane

DIRECT, TRACKED = "direct", "conntrack"
"""Without a Service: the limit, and the limit of a node on which anybody has the kernel track
connections, be it with one NAT or state rule of a CNI's: nearly every one.
"""


@dataclass(frozen=True, slots=True)
class Way:
    """A variant before it is known whether it runs here."""

    name: str
    title: str
    mode: str | None
    """Of the agent; None = no agent."""
    asker: str = "pod"
    """Who asks inside the cluster."""
    site: str = ""
    """Ways of one site share a cluster; empty = one of its own."""
    update: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ."""
    xdp_wires: bool = False
    """Hosts compute checksums themselves and the router's devices run a program, without which a
    veth takes nothing from XDP; the other variants have it easier.
    """
    tracked: bool = False
    """Without an agent: let the kernel track connections all the same."""

    is_kube_proxy: bool = False
    """The real kube-proxy serves, in that mode."""

    @property
    def relays(self) -> bool:
        """The agent itself carries the traffic: its CPU time is part of the way."""
        return self.mode == "userspace"

    @property
    def place(self) -> str:
        """The site's name."""
        return self.site or self.name


WAYS = (
    Way(DIRECT, "direct, no Service", None),
    Way(TRACKED, "direct, connection tracking on", None, tracked=True),
    Way("ebpf", "eBPF, socket hooks", "ebpf"),
    Way("ebpf-tc", "eBPF, tc only", "ebpf", asker="sandbox", site="ebpf"),
    Way("ebpf-fast", "eBPF, tc, fast path", "ebpf",
        update={"ebpf": {"fast_path": True}}),
    Way("ebpf-xdp", "eBPF, tc, fast path, XDP", "ebpf",
        update={"ebpf": {"fast_path": True, "xdp": True}}, xdp_wires=True),
    Way("nftables", "nftables", "nftables"),
    Way("iptables", "iptables", "iptables"),
    Way("ipvs", "ipvs", "ipvs"),
    Way("userspace", "userspace", "userspace"),
    *(
        Way(f"kube-proxy-{mode}", f"kube-proxy, {mode}", mode, is_kube_proxy=True)
        for mode in ("nftables", "iptables", "ipvs")
    ),
)  # fmt: skip
KUBE_PROXIES = tuple(way.name for way in WAYS if way.is_kube_proxy)
DEFAULT = tuple(
    way.name for way in WAYS if way.name not in ("ebpf-xdp", "userspace", *KUBE_PROXIES)
)


def choose(
    names: Sequence[str], settings: Settings, kube_proxy: Path | None = None
) -> tuple[list[Way], list[Variant]]:
    """The ways of these names that run here, and all of them as variants, with reasons.

    Args:
        settings: what agents will be told, as far as it decides whether they run.
        kube_proxy: the real one's binary, if there is one.

    Raises:
        KeyError: there is no way of that name.
    """
    by_name = {way.name: way for way in WAYS}
    ways, variants = [], []
    reasons: dict[str | None, str] = {}
    for name in names:
        way = by_name[name]
        if way.mode not in reasons:
            reasons[way.mode] = _reason_against(way.mode, settings)
        reason = reasons[way.mode]
        if way.is_kube_proxy and way.mode and not reason:
            reason = reason_against(kube_proxy, way.mode)
        variants.append(Variant(way.name, way.title, reason))
        if not reason:
            ways.append(way)
    return ways, variants


def _reason_against(mode: str | None, settings: Settings) -> str:
    """Why a mode cannot be measured here; empty = it can."""
    if mode is None:
        return ""
    if mode not in MODES:
        return "this version has no such mode"
    support = make_dataplane(mode, settings).check()
    return "" if support.ok else "; ".join(support.missing)
