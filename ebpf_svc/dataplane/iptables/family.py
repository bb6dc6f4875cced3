"""One family's rules in the kernel: what was written, what is written next, what to do on failure.

A change is written as the difference of two renderings of its service port; nothing is read for it.
Whenever that is in doubt - at the start, after a failure, when somebody may have changed rules -
everything is read and compared instead (I20, I23).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ebpf_svc.dataplane.iptables import fixed
from ebpf_svc.dataplane.iptables.chains import FILTER, MANGLE, NAT
from ebpf_svc.dataplane.iptables.difference import (
    Comparison,
    Expected,
    change_last,
    change_service,
)
from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.dataplane.iptables.script import Script
from ebpf_svc.dataplane.iptables.services import ServiceRules, render, served_frontends
from ebpf_svc.errors import ApplyError, CommandError
from ebpf_svc.host.iptables import Variant
from ebpf_svc.host.kubeproxy import CANARY
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import FrontendKind, HealthCheck, PlanKey, ServicePlan

LARGE_ENDPOINT_COUNT = 1000
"""Above, rules of endpoints have no comments, and reading all of them back is rare (I21)."""
READ_BACK_S = 3600.0
"""How often all is read back even so."""
CHAINS_AT_ONCE = 400
"""iptables-nft takes time in the square of the chains it is told of at once; the kernel about 20 ms
for each transaction."""

log = get_logger(__name__)

_NOTHING = ServiceRules()


@dataclass(slots=True)
class Counts:
    """What metrics tell about one family."""

    restore_failures: int = 0
    partial_restore_failures: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    """Table -> rules of ours."""
    written: Counter[str] = field(default_factory=Counter)
    """Table -> rules of the last write."""


@dataclass(slots=True)
class Outcome:
    """What one apply did to a family."""

    writes: int = 0
    changed: int = 0
    failed: list[ApplyError] = field(default_factory=list)
    failed_keys: set[PlanKey] = field(default_factory=set)
    repaired: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Written:
    """A service port as it is in the kernel."""

    plan: ServicePlan
    comments: bool


class FamilyRules:
    """Keeps one family's tables as the plans want them."""

    def __init__(self, variant: Variant, options: RuleOptions) -> None:
        self.variant, self.options = variant, options
        self.counts = Counts()
        self._written: dict[PlanKey, _Written] = {}
        self._checks: tuple[HealthCheck, ...] = ()
        self._addresses: Counter[str] = Counter()
        """Where node ports answer -> service ports that do."""
        self._endpoint_count = 0
        self._in_doubt = True
        self._adopting = True
        """What is found stems from a run before us, so differences are no damage."""
        self._read_at = -READ_BACK_S

    def apply(
        self,
        plans: Mapping[PlanKey, ServicePlan],
        changed: Sequence[PlanKey],
        checks: tuple[HealthCheck, ...],
        *,
        resync: bool,
    ) -> Outcome:
        """Make the kernel hold these plans.

        Args:
            plans: all of this family, or more.
            changed: which of them may differ from what was written, gone ones included.
            checks: of any family.
            resync: look whether the kernel still holds what was written.

        Raises:
            CommandError: nothing could be written at all, or nobody knows what was.
        """
        outcome = Outcome()
        wanted = self._render_changed(plans, changed, outcome)
        if not self._in_doubt and not (resync and self._needs_reading()):
            try:
                self._write_changes(wanted, checks, outcome)
            except CommandError as error:
                self.counts.restore_failures += 1
                self.counts.partial_restore_failures += 1
                log.warning("iptables.partial", family=self.options.family.label, error=str(error))
                self._in_doubt = True
            else:
                return outcome
        damaged = not self._adopting and not self._in_doubt
        try:
            repaired = self._write_all(wanted, checks, outcome)
        except CommandError as error:
            self.counts.restore_failures += 1
            self._in_doubt = True
            if not wanted:
                raise
            log.warning("iptables.isolating", family=self.options.family.label, error=str(error))
            self._isolate(wanted, checks, outcome)
            return outcome
        outcome.repaired += repaired if damaged else ()
        self._in_doubt = self._adopting = False
        return outcome

    # -- what to write -----------------------------------------------------------------------------

    def _render_changed(
        self,
        plans: Mapping[PlanKey, ServicePlan],
        changed: Iterable[PlanKey],
        outcome: Outcome,
    ) -> dict[PlanKey, tuple[_Written | None, ServiceRules]]:
        """New shapes of service ports; those no chain can express are left as they are."""
        wanted: dict[PlanKey, tuple[_Written | None, ServiceRules]] = {}
        count = self._endpoint_count + sum(
            len(plans[key].backends) for key in changed if key in plans and key not in self._written
        )
        for key in changed:
            plan = plans.get(key)
            before = self._written.get(key)
            # Crossing the threshold is no reason to write a service port's rules anew.
            comments = before.comments if before else count <= LARGE_ENDPOINT_COUNT
            if plan is None:
                wanted[key] = None, ServiceRules()
                continue
            try:
                rules = render(plan, self.options, comments=comments)
            except ApplyError as error:
                outcome.failed.append(error)
                outcome.failed_keys.add(key)
            else:
                wanted[key] = _Written(plan, comments), rules
        return wanted

    def _rules_of(self, key: PlanKey) -> ServiceRules:
        """A service port as it was written last."""
        written = self._written.get(key)
        if written is None:
            return ServiceRules()
        return render(written.plan, self.options, comments=written.comments)

    def _write_changes(
        self,
        wanted: Mapping[PlanKey, tuple[_Written | None, ServiceRules]],
        checks: tuple[HealthCheck, ...],
        outcome: Outcome,
    ) -> None:
        script, options = Script(), self.options
        rules: Counter[str] = Counter()
        changed = 0
        addresses = Counter(self._addresses)
        for key, (now, new) in wanted.items():
            old = self._rules_of(key)
            changed += change_service(script, old, new)
            rules += _rule_counts(new)
            rules.subtract(_rule_counts(old))
            before = self._written.get(key)
            addresses.subtract(self._node_addresses(before.plan) if before else ())
            addresses.update(self._node_addresses(now.plan) if now else ())
        for table, old_last, new_last in (
            (
                NAT,
                fixed.node_port_jumps(_present(self._addresses)),
                fixed.node_port_jumps(_present(addresses)),
            ),
            (
                FILTER,
                fixed.entries(options, FILTER, self._checks),
                fixed.entries(options, FILTER, checks),
            ),
        ):
            change_last(script, table, old_last, new_last)
            rules[table] += len(new_last) - len(old_last)
        self._write(script)
        outcome.writes += script.rule_count
        outcome.changed += changed
        for key, (now, _) in wanted.items():
            self._remember(key, now)
        self._checks = checks
        self.counts.rules.update(rules)

    def _write_all(
        self,
        wanted: Mapping[PlanKey, tuple[_Written | None, ServiceRules]],
        checks: tuple[HealthCheck, ...],
        outcome: Outcome,
        undecided: Mapping[PlanKey, ServiceRules] = MappingProxyType({}),
    ) -> list[str]:
        """Read, compare and mend; returns what was amiss."""
        spared = {*undecided, *outcome.failed_keys}
        shapes = {key: each for key, each in self._written.items() if key not in spared}
        shapes |= {key: now for key, (now, _) in wanted.items() if now is not None}
        for key, (now, _) in wanted.items():
            if now is None:
                shapes.pop(key, None)
        addresses = Counter(
            address for each in shapes.values() for address in self._node_addresses(each.plan)
        )
        expected = Expected(self.options, _present(addresses), checks)
        for key in shapes:
            new = wanted.get(key)
            expected.add(new[1] if new else self._rules_of(key))
        for key in spared:
            expected.spare(self._rules_of(key))
            expected.spare(undecided.get(key, _NOTHING))
        compared = Comparison(expected, self.variant.save())
        self._write(compared.script)
        outcome.writes += compared.script.rule_count
        outcome.changed += sum(self._written.get(key) != now for key, (now, _) in wanted.items())
        for key, (now, _) in wanted.items():
            self._remember(key, now)
        self._addresses, self._checks = addresses, checks
        self._read_at = time.monotonic()
        self.counts.rules = self._all_counts(expected)
        return compared.found

    def _isolate(
        self,
        wanted: Mapping[PlanKey, tuple[_Written | None, ServiceRules]],
        checks: tuple[HealthCheck, ...],
        outcome: Outcome,
    ) -> None:
        """Find the service ports the kernel refuses, and write the others.

        Raises:
            CommandError: it is not about any service port.
        """
        undecided = {key: rules for key, (_, rules) in wanted.items()}
        self._write_all({}, checks, outcome, undecided)
        waiting = [list(wanted)]
        while waiting:
            part = waiting.pop()
            later = {key: undecided[key] for keys in waiting for key in keys}
            later |= {key: undecided[key] for key in outcome.failed_keys & undecided.keys()}
            try:
                self._write_all({key: wanted[key] for key in part}, checks, outcome, later)
            except CommandError as error:
                if len(part) > 1:
                    middle = len(part) // 2
                    waiting += [part[middle:], part[:middle]]
                    continue
                outcome.failed.append(ApplyError(str(part[0]), error.stderr.strip()))
                outcome.failed_keys.add(part[0])
        self._in_doubt = bool(outcome.failed)
        self._adopting = False

    # -- what is known -----------------------------------------------------------------------------

    def _remember(self, key: PlanKey, now: _Written | None) -> None:
        before = self._written.pop(key, None)
        if before is not None:
            self._endpoint_count -= len(before.plan.backends)
            self._addresses.subtract(self._node_addresses(before.plan))
        if now is not None:
            self._written[key] = now
            self._endpoint_count += len(now.plan.backends)
            self._addresses.update(self._node_addresses(now.plan))

    def _node_addresses(self, plan: ServicePlan) -> set[str]:
        return {
            frontend.key.address
            for frontend in served_frontends(plan, self.options)
            if frontend.kind is FrontendKind.NODE_PORT
        }

    def _needs_reading(self) -> bool:
        """Whether all rules are to be read back now; in large clusters a few tell about the rest
        (I24).
        """
        if self._endpoint_count <= LARGE_ENDPOINT_COUNT:
            return True
        if time.monotonic() - self._read_at >= READ_BACK_S:
            return True
        try:
            held = {
                table: self.variant.rules(table, chain)
                for table, chain in ((NAT, "POSTROUTING"), (FILTER, "FORWARD"), (MANGLE, CANARY))
            }
        except CommandError:
            return True  # a chain is gone
        return any(
            rule not in held[table]
            for table, chain in ((NAT, "POSTROUTING"), (FILTER, "FORWARD"))
            for rule in fixed.jumps(self.options, table)
            if rule.startswith(f"{chain} ")
        )

    # -- writing -----------------------------------------------------------------------------------

    def _write(self, script: Script) -> None:
        """Tell the kernel; each piece is whole or not at all, table by table."""
        at_once = None if self.variant.backend == "legacy" else CHAINS_AT_ONCE
        for text in script.texts(at_once):
            self.variant.restore(text)
        if script.rule_count:
            self.counts.written = Counter(
                {table: changes.rule_count for table, changes in script.tables.items()}
            )

    def _all_counts(self, expected: Expected) -> Counter[str]:
        options = self.options
        counts = Counter({NAT: sum(map(len, expected.chains.values()))})
        counts[NAT] += len(fixed.node_port_jumps(expected.node_addresses))
        for table in (FILTER, NAT):
            counts[table] += len(expected.entries[table]) + len(fixed.jumps(options, table))
            counts[table] += len(fixed.entries(options, table, expected.checks))
            counts[table] += sum(map(len, fixed.contents(options, table).values()))
        return counts


def _rule_counts(rules: ServiceRules) -> Counter[str]:
    counts = Counter({table: len(entries) for table, entries in rules.entries.items()})
    counts[NAT] += sum(map(len, rules.chains.values()))
    return counts


def _present(addresses: Counter[str]) -> list[str]:
    return [address for address, count in addresses.items() if count > 0]
