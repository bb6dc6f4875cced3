"""Find out what to tell the kernel: from two plans of a service port, or from what was saved. Pure.

A change of one service port names its own chains only, and its own rules in the chains it shares
with others, so it costs the same text however many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ebpf_svc.dataplane.iptables import chains, fixed, words
from ebpf_svc.dataplane.iptables.chains import NAT
from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.dataplane.iptables.script import Script, TableChanges
from ebpf_svc.dataplane.iptables.services import ServiceRules
from ebpf_svc.host.iptables import Table
from ebpf_svc.model.desired import HealthCheck

REWRITE_ABOVE = 64
"""So many rules to take out of a chain one by one cost more than writing the chain anew."""


def change_service(script: Script, old: ServiceRules, new: ServiceRules) -> bool:
    """Add what leads from one shape of a service port to another; whether anything does."""
    before = script.rule_count
    nat = script.of(NAT)
    for chain, rules in new.chains.items():
        if old.chains.get(chain) != rules:
            nat.fill[chain] = rules
            nat.drop.discard(chain)
    nat.drop |= old.chains.keys() - new.chains.keys() - nat.fill.keys()
    for table in new.entries:
        gone, come = old.entries[table], new.entries[table]
        if gone != come:
            changes = script.of(table)
            changes.delete += (rule for rule in gone if rule not in come)
            changes.first += (rule for rule in come if rule not in gone)
    return script.rule_count != before


def change_last(script: Script, table: str, old: Iterable[str], new: Iterable[str]) -> None:
    """Add what leads from some rules at the end of shared chains to others."""
    before, after = list(old), list(new)
    if before != after:
        changes = script.of(table)
        changes.delete += (rule for rule in before if rule not in after)
        changes.last += (rule for rule in after if rule not in before)


@dataclass(slots=True)
class Expected:
    """All that the kernel is to hold of one family, collected service port by service port."""

    options: RuleOptions
    node_addresses: Iterable[str]
    checks: Iterable[HealthCheck]
    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Chains of service ports, in nat."""
    entries: dict[str, list[str]] = field(
        default_factory=lambda: {each: [] for each in fixed.TABLES}
    )
    spared: ServiceRules = field(default_factory=ServiceRules)
    """What may be there and may be missing: service ports nobody decides about now."""
    is_complete: bool = True
    """No service port is spared, so chains nobody wants are stale (I22)."""

    def add(self, rules: ServiceRules) -> None:
        """One more service port."""
        self.chains |= rules.chains
        for table, entries in rules.entries.items():
            self.entries[table] += entries

    def spare(self, rules: ServiceRules) -> None:
        """Leave a service port as it is found."""
        self.is_complete = False
        self.spared.chains |= rules.chains
        for table, entries in rules.entries.items():
            self.spared.entries[table] += entries


class Comparison:
    """What is there against what should be; `script` mends the difference, `found` says it."""

    def __init__(self, expected: Expected, tables: Mapping[str, Table]) -> None:
        self.script = Script()
        self.found: list[str] = []
        """What was missing, changed or foreign, in words."""
        self._expected, self._options = expected, expected.options
        for name in fixed.TABLES:
            table = tables.get(name) or Table(name)
            by_chain: dict[str, list[str]] = {}
            for rule in table.rules:
                by_chain.setdefault(rule.chain, []).append(rule.text)
            self._table(name, table, by_chain)

    def _table(self, name: str, table: Table, by_chain: Mapping[str, list[str]]) -> None:
        wanted = dict(fixed.contents(self._options, name))
        if name == NAT:
            wanted |= self._expected.chains
        changes = self.script.of(name)
        for chain, rules in wanted.items():
            if chain not in table.chains:
                self._note(name, f"chain {chain} was missing")
            elif not _same(by_chain.get(chain, []), rules):
                self._note(name, f"chain {chain} was changed")
            else:
                continue
            changes.fill[chain] = rules
        if name == NAT and self._expected.is_complete:
            stale = {each for each in table.chains if chains.is_per_service(each)}
            changes.drop |= stale - wanted.keys()
            for chain in sorted(changes.drop):
                self._note(name, f"chain {chain} was foreign")
        self._shared(name, table, by_chain, changes)
        self._jumps(name, table, by_chain, changes)

    def _shared(
        self,
        name: str,
        table: Table,
        by_chain: Mapping[str, list[str]],
        changes: TableChanges,
    ) -> None:
        """Compare chains that hold rules of many, whose order matters only for the last ones."""
        expected, options = self._expected, self._options
        entries = expected.entries[name] + fixed.entries(options, name, expected.checks)
        last = fixed.node_port_jumps(expected.node_addresses) if name == NAT else []
        by_owner: dict[str, list[str]] = {}
        for rule in entries:
            by_owner.setdefault(rule.partition(" ")[0], []).append(rule)
        for chain in chains.SHARED.get(name, ()):
            wanted = by_owner.get(chain, [])
            ending = last if chain == chains.SERVICES else []
            held = by_chain.get(chain, [])
            if chain not in table.chains:
                self._note(name, f"chain {chain} was missing")
                changes.fill[chain] = (*wanted, *ending)
            elif held != [*wanted, *ending]:
                spared = expected.spared.entries.get(name, [])
                self._mend(name, chain, (held, wanted, ending), spared, changes)

    def _mend(
        self,
        name: str,
        chain: str,
        rules: tuple[list[str], list[str], list[str]],
        spared: Iterable[str],
        changes: TableChanges,
    ) -> None:
        held, wanted, ending = rules
        foreign, missing = _unlike(held, [*wanted, *ending], spared)
        is_ordered = not ending or not _after_first(held, set(ending)) - set(ending)
        if not foreign and not missing and is_ordered:
            return
        words_of = [
            f"{len(each)} rules {what}"
            for each, what in ((missing, "missing"), (foreign, "foreign"))
            if each
        ]
        self._note(name, f"chain {chain}: {', '.join(words_of) or 'rules out of order'}")
        if len(foreign) > REWRITE_ABOVE or not is_ordered:
            kept = [each for each in spared if each in set(held)]
            changes.fill[chain] = (*wanted, *kept, *ending)
            return
        changes.delete += foreign
        changes.first += (each for each in missing if each not in ending)
        changes.last += (each for each in ending if each in missing)

    def _jumps(
        self,
        name: str,
        table: Table,
        by_chain: Mapping[str, list[str]],
        changes: TableChanges,
    ) -> None:
        options = self._options
        guards = fixed.guards(options, name)
        if guards and chains.FIREWALL not in table.chains:
            self._note(name, f"chain {chains.FIREWALL} was missing")
            changes.fill[chains.FIREWALL] = guards
        elif guards:
            absent = _unlike(by_chain.get(chains.FIREWALL, []), guards, ())[1]
            changes.last += absent
            self._note_missing(name, absent)
        wanted = fixed.jumps(options, name)
        chains_with_jumps = {each.partition(" ")[0] for each in wanted}
        held = [rule for chain in chains_with_jumps for rule in by_chain.get(chain, [])]
        absent = _unlike(held, wanted, ())[1]
        changes.first += absent
        self._note_missing(name, absent)

    def _note_missing(self, table: str, rules: Iterable[str]) -> None:
        for rule in rules:
            words_of = rule.split()
            self._note(table, f"jump from {words_of[0]} to {words_of[-1]} was missing")

    def _note(self, table: str, what: str) -> None:
        self.found.append(f"{self._options.family.label} {table}: {what}")


def _same(held: list[str], wanted: Iterable[str]) -> bool:
    rules = list(wanted)
    if held == rules:
        return True
    if len(held) != len(rules):
        return False
    return list(map(words.meaning, held)) == list(map(words.meaning, rules))


def _unlike(
    held: list[str], wanted: Iterable[str], spared: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Rules that are there and should not be, in their own words, and those that are missing."""
    missing, may_be = Counter(wanted), set(spared)
    left = []
    for rule in held:
        if missing[rule] > 0:
            missing[rule] -= 1
        elif rule not in may_be:
            left.append(rule)
    absent = list(missing.elements())
    if not left or not absent:
        return left, absent
    by_meaning: dict[tuple[str, ...], list[str]] = {}
    for rule in absent:
        by_meaning.setdefault(words.meaning(rule), []).append(rule)
    foreign = []
    for rule in left:
        same = by_meaning.get(words.meaning(rule))
        if same:
            same.pop()
        else:
            foreign.append(rule)
    return foreign, [rule for rules in by_meaning.values() for rule in rules]


def _after_first(held: list[str], ending: set[str]) -> set[str]:
    """Rules that stand behind the first of those that are to be last."""
    start = next((number for number, rule in enumerate(held) if rule in ending), len(held))
    return set(held[start:])
