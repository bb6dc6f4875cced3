"""Our iptables rules in the kernel: written when they differ, removed with their tables.

How iptables-save words a rule differs between its versions, so what it prints of rules just written
is what later readings are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.inspect import KernelPart
from ebpf_svc.dataplane.ipvs import rules, ruleset, sets
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
        self._wording: dict[Variant, dict[tuple[str, str, ruleset.Rules], ruleset.Rules]] = {}
        self._about: dict[Variant, frozenset[str]] = {}
        """The sets that rules were last written for."""
        self.failure_counts = dict.fromkeys(chosen, 0)
        """Times the tool refused, by family."""

    def follow(self, occupied: frozenset[str]) -> int:
        """Write the rules of families whose occupied sets are others than last time.

        Args:
            occupied: the sets that have elements, of all families.

        Returns:
            How many rules were written.

        Raises:
            CommandError: a tool of the host failed.
        """
        return sum(
            self._write(variant, about).count
            for variant, about in self._parted(occupied)
            if self._about.get(variant) != about
        )

    def apply(self, occupied: frozenset[str]) -> tuple[int, tuple[str, ...]]:
        """Read all rules back and write what is missing or changed; arguments as of `follow`.

        Returns:
            How many rules were written, and what somebody had done to them, in words.

        Raises:
            CommandError: a tool of the host failed.
        """
        count = 0
        found: list[str] = []
        for variant, about in self._parted(occupied):
            is_as_left = self._about.get(variant) == about
            changes = self._write(variant, about)
            count += changes.count
            found += changes.found if is_as_left else ()
        return count, tuple(found)

    def _parted(self, occupied: frozenset[str]) -> Iterator[tuple[Variant, frozenset[str]]]:
        for variant in self._options:
            yield variant, occupied & sets.names_of(variant.family)

    def _write(self, variant: Variant, about: frozenset[str]) -> ruleset.Changes:
        options, wording = self._options[variant], self._wording.setdefault(variant, {})
        changes = ruleset.difference(options, variant.save(), about, wording)
        if changes.text:
            self._restore(variant, changes.text)
            wording.update(ruleset.wording_of(options, variant.save(), about))
        self._about[variant] = about
        return changes

    def _restore(self, variant: Variant, text: str) -> None:
        try:
            variant.restore(text)
        except CommandError:
            self.failure_counts[variant.family] += 1
            raise


def ours() -> Iterator[tuple[Variant, Mapping[str, Table]]]:
    """Where rules of this mode and of our agent stand."""
    for variant in iptables.variants(tuple(Family)):
        if ruleset.is_ours(variant.save(rules.NAT)):
            yield variant, variant.save()


def remove(variant: Variant, *, marker: bool) -> None:
    """Remove our chains, or once they are gone the sign that they are ours; raises CommandError."""
    text = ruleset.removal(variant.save(), marker=marker)
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
