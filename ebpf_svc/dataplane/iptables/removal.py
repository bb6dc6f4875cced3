"""Remove all rules of ours from one family's tables, whoever of us left them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress

from ebpf_svc.dataplane.iptables import chains
from ebpf_svc.dataplane.iptables.chains import FILTER, NAT
from ebpf_svc.dataplane.iptables.family import CHAINS_AT_ONCE
from ebpf_svc.dataplane.iptables.script import Script
from ebpf_svc.errors import CommandError
from ebpf_svc.host.command import run
from ebpf_svc.host.iptables import Table, Variant
from ebpf_svc.host.kubeproxy import MARKER
from ebpf_svc.model.net import Family

_SHARED_WITH_IPVS = {
    FILTER: frozenset({chains.FORWARD, chains.PROXY_FIREWALL}),
    NAT: frozenset({chains.SERVICES, chains.POSTROUTING, chains.MARK_MASQ, MARKER}),
}
"""Chains that ipvs mode has under the same names."""
_NFT_FAMILY = {Family.V4: "ip", Family.V6: "ip6"}


def remove(variant: Variant) -> None:
    """Take our jumps away, then our chains; raises CommandError.

    Tables that iptables-nft made for us go as well, where nobody else uses them.
    """
    tables = variant.save()
    script = render_removal(tables)
    for text in script.texts(None if variant.backend == "legacy" else CHAINS_AT_ONCE):
        variant.restore(text)
    if variant.backend != "legacy" and shutil.which("nft"):
        for name, table in variant.save().items():
            if name in chains.OURS and _is_bare(table):
                with suppress(CommandError):  # somebody uses it by now
                    run(["nft", "delete", "table", _NFT_FAMILY[variant.family], name])


def render_removal(tables: Mapping[str, Table]) -> Script:
    """What to write to be rid of us; pure.

    KUBE-FIREWALL stays where a kubelet is, which relies on it (Z5).
    """
    script = Script()
    for name, ours in chains.OURS.items():
        table = tables.get(name)
        if table is None:
            continue
        kept = _SHARED_WITH_IPVS.get(name, frozenset()) if _is_ipvs(tables) else frozenset()
        going = {each for each in table.chains if each in ours or chains.is_per_service(each)}
        going -= kept
        if name == FILTER and chains.FIREWALL in table.chains and not _has_kubelet(tables):
            going.add(chains.FIREWALL)
        changes = script.of(name)
        changes.drop |= going
        changes.delete += (
            rule.text for rule in table.rules if rule.target in going and rule.chain not in going
        )
    return script


def _is_ipvs(tables: Mapping[str, Table]) -> bool:
    """Whether ipvs mode has taken over: its rules look at sets."""
    nat = tables.get(NAT)
    return nat is not None and any(
        rule.chain == chains.SERVICES and "--match-set" in rule.text for rule in nat.rules
    )


def _has_kubelet(tables: Mapping[str, Table]) -> bool:
    return any(chains.KUBELET_CANARY in table.chains for table in tables.values())


def _is_bare(table: Table) -> bool:
    """Whether a table holds nothing but the kernel's own chains, which let everything pass."""
    return not table.rules and set(table.chains.values()) <= {"ACCEPT"}
