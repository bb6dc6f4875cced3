"""Which of the host's iptables to write with, and whether a family can be served at all.

Rules of the legacy backend and of nf_tables do not see each other, and whoever else writes rules on
the host - kubelet, the CNI - uses one of them. Ours must stand beside theirs, never in both.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress

from ebpf_svc.errors import CommandError
from ebpf_svc.host import iptables, sysctl
from ebpf_svc.host.command import run
from ebpf_svc.host.iptables import Table, Variant
from ebpf_svc.host.kubeproxy import MARKER
from ebpf_svc.model.net import Family

HINTS = ("KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT")
"""Chains in mangle by which kubelet says which backend the host uses."""
_NFT_FIRST = ("nft", "legacy", "")
_NFT_FAMILY = {Family.V4: "ip", Family.V6: "ip6"}


def choose(families: Sequence[Family]) -> dict[Family, Variant]:
    """The tools to write each family with; a family without any is left out.

    Kubelet's hint decides, as in the wrapper of kube-proxy's image; then where our rules stand
    already; then where most rules are; then what plain `iptables` is.
    """
    found = iptables.variants(families)
    backends = sorted({each.backend for each in found}, key=_NFT_FIRST.index)
    if not backends:
        return {}
    backend = backends[0] if len(backends) == 1 else _backend_in_use(found, backends)
    return {each.family: each for each in found if each.backend == backend}


def _backend_in_use(found: Sequence[Variant], backends: Sequence[str]) -> str:
    for table, names in (("mangle", HINTS), ("nat", (MARKER,))):
        for backend in backends:
            for each in found:
                if each.backend == backend and has_chain(each, table, names):
                    return backend
    counts = {
        backend: sum(_rule_count(each) for each in found if each.backend == backend)
        for backend in backends
    }
    if len(set(counts.values())) > 1:
        return max(backends, key=lambda backend: counts[backend])
    return _default(backends)


def has_chain(variant: Variant, table: str, names: Sequence[str]) -> bool:
    """Whether a table has any of these chains; does not read the others, which may be many."""
    for name in names:
        with suppress(CommandError):
            variant.rules(table, name)
            return True
    return False


def _rule_count(variant: Variant) -> int:
    with suppress(CommandError):
        return sum(len(table.rules) for table in variant.save().values())
    return 0


def _default(backends: Sequence[str]) -> str:
    """What plain `iptables` is."""
    with suppress(CommandError):
        version = run([iptables.TOOLS[Family.V4], "--version"])
        if "nf_tables" not in version and "legacy" in backends:
            return "legacy"
    return backends[0]


def why_unusable(family: Family) -> str:
    """Why a family cannot be served on this host; empty when it can (I26)."""
    if family is Family.V4:
        return ""
    if sysctl.read("net/ipv6/conf/all/disable_ipv6") is None:
        return "this kernel has no IPv6"
    if sysctl.read("net/ipv6/conf/all/disable_ipv6") == "1":
        return "IPv6 is switched off (net.ipv6.conf.all.disable_ipv6)"
    return ""


def remove_bare_tables(variant: Variant, names: Collection[str]) -> None:
    """Remove tables that iptables-nft made and nobody uses any more; raises CommandError."""
    if variant.backend == "legacy" or not shutil.which("nft"):
        return
    for name, table in variant.save().items():
        if name in names and _is_bare(table):
            with suppress(CommandError):  # somebody uses it by now
                run(["nft", "delete", "table", _NFT_FAMILY[variant.family], name])


def _is_bare(table: Table) -> bool:
    """Whether a table holds nothing but the kernel's own chains, which let everything pass."""
    return not table.rules and set(table.chains.values()) <= {"ACCEPT"}
