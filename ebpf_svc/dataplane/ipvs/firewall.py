"""Our iptables rules in the kernel: written when they differ, removed with their tables.

How iptables-save words a rule differs between its versions, so what it prints of rules just written
is what later readings are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.inspect import KernelPart
from ebpf_svc.dataplane.ipvs import rules
from ebpf_svc.dataplane.ipvs.rules import RuleOptions
from ebpf_svc.dataplane.netfilter import tools
from ebpf_svc.errors import CommandError
from ebpf_svc.host import iptables
from ebpf_svc.host.iptables import Table, Variant
from ebpf_svc.model.net import Family


class Firewall:
    """The rules of every family served."""

    def __init__(self, settings: Settings, families: Iterable[Family]) -> None:
        chosen = tools.choose(tuple(families))
        self._options: Mapping[Variant, RuleOptions] = {
            variant: RuleOptions.from_settings(settings, family)
            for family, variant in chosen.items()
        }
        self._wording: dict[Variant, rules.Wording] = {}
        self.failure_counts = dict.fromkeys(chosen, 0)
        """Times the tool refused, by family."""

    def apply(self) -> tuple[int, tuple[str, ...]]:
        """Write what is missing or changed; returns how many rules, and what was amiss in words.

        Raises:
            CommandError: a tool of the host failed.
        """
        count = 0
        found: list[str] = []
        for variant, options in self._options.items():
            wording = self._wording.get(variant, {})
            changes = rules.difference(options, variant.save(), wording)
            if changes.text:
                self._restore(variant, changes.text)
                self._wording[variant] = rules.wording_of(options, variant.save())
            count += changes.count
            found += changes.found
        return count, tuple(found)

    def _restore(self, variant: Variant, text: str) -> None:
        try:
            variant.restore(text)
        except CommandError:
            self.failure_counts[variant.family] += 1
            raise


def ours() -> Iterator[tuple[Variant, Mapping[str, Table]]]:
    """Where rules of this mode and of our agent stand."""
    for variant in iptables.variants(tuple(Family)):
        if rules.is_ours(variant.save(rules.NAT)):
            yield variant, variant.save()


def remove(variant: Variant, *, marker: bool) -> None:
    """Remove our chains, or once they are gone the sign that they are ours; raises CommandError."""
    text = rules.removal(variant.save(), marker=marker)
    if text:
        variant.restore(text)
    if marker:
        tools.remove_bare_tables(variant, rules.TABLES)


def parts(variant: Variant, tables: Mapping[str, Table]) -> Iterator[KernelPart]:
    """Our chains by table."""
    for name, owned in rules.OURS.items():
        table = tables.get(name)
        mine = {chain for chain in owned if table and chain in table.chains}
        if table is not None and mine:
            count = sum(rule.chain in mine for rule in table.rules)
            where = f"{name} of {variant.family.label}"
            yield KernelPart("table", where, str(variant), f"{len(mine)} chains, {count} rules")
