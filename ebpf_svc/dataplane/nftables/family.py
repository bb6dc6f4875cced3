"""One family's table: what was written to it, and how it comes to hold what is wanted."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.dataplane.nftables import adopt
from ebpf_svc.dataplane.nftables.compare import Whole, compare, difference
from ebpf_svc.dataplane.nftables.content import Change, Content, Owned, Owner, steps
from ebpf_svc.dataplane.nftables.layout import Layout
from ebpf_svc.dataplane.nftables.render import Ranges, cluster_ends, local_ends, maps_of, render
from ebpf_svc.dataplane.nftables.slots import Slots
from ebpf_svc.dataplane.nftables.writer import Writer
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host.nf_dump import read_table
from ebpf_svc.host.nf_tables import DELCHAIN
from ebpf_svc.host.nfnetlink import Refused
from ebpf_svc.model.desired import PlanKey, ServicePlan

Plans = Mapping[PlanKey, ServicePlan]
STALE_CHAIN_S = 1.0
"""How long chains that could not go yet are left alone (X18)."""
_TRIES = 5


class Blamed(Exception):
    """The kernel refused what these service ports need, and nothing was written."""

    def __init__(self, owners: Mapping[PlanKey, str]) -> None:
        super().__init__(next(iter(owners.values())))
        self.owners = owners


class NotTaken(Exception):
    """This kernel cannot give a set that stands another timeout, as we know now."""


@dataclass(slots=True)
class Written:
    """What one apply did to a table."""

    writes: int = 0
    changed: set[PlanKey] = field(default_factory=set)
    repaired: tuple[str, ...] = ()
    details: dict[str, int] = field(default_factory=dict)


class FamilyTable:
    """The table of one family.

    Args:
        layout: of the family.
        writer: of the calling thread's network namespace.
        pods: how a pod is told; None = it cannot be.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        layout: Layout,
        writer: Writer,
        *,
        pods: PodMatch | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._writer, self._pods = layout, writer, pods
        self._clock = clock
        self._slots = Slots()
        self._ranges: dict[PlanKey, Ranges] = {}
        self._maps: set[str] = set()
        """Maps of endpoints that are there; they stay while we run."""
        self._counts: dict[str, dict[bytes, int]] = {}
        """Set -> key -> how many service ports have that element."""
        self._can_retime = True
        self._waiting: dict[str, float] = {}
        """Chains that were emptied and could not go -> since when."""
        self._is_adopted = False
        self.sync_failures = 0
        """Transactions the kernel refused."""
        self.cleanup_failures = 0
        """Times that chains could not be removed (X18)."""

    def update(self, keys: Iterable[PlanKey], old: Plans, new: Plans) -> Written:
        """Write what changed.

        Args:
            keys: service ports that changed.
            old: what was written last.
            new: what is wanted.

        Raises:
            Refused: the table is not as we know it; nothing was changed.
            NotTaken: this kernel wrote only part of it; `write_whole` does the rest.
        """
        change, changed = Change(), set[PlanKey]()
        ranges: dict[PlanKey, Ranges] = {}
        counts: dict[tuple[str, bytes], int] = {}
        for key in keys:
            before = self._render(old.get(key), self._ranges.get(key))
            ranges[key] = self._fit(new.get(key), self._ranges.get(key))
            after = self._render(new.get(key), ranges[key])
            if difference(before, after, change, key, can_retime=self._can_retime):
                changed.add(key)
            _count(before, -1, counts)
            _count(after, 1, counts)
        maps = maps_of(ranges.values())
        for name in sorted(maps - self._maps):
            change.sets[name] = (self._layout.endpoints_map(name), None)
        for (name, place), delta in counts.items():
            had = self._counts.get(name, {}).get(place, 0)
            if not had and delta > 0:
                change.put_keys.setdefault(name, []).append(place)
            elif had and had + delta == 0:
                change.remove(name, place)
        self._commit(change)
        self._maps |= maps
        for key, now in ranges.items():
            self._keep(key, now)
        for (name, place), delta in counts.items():
            _add(self._counts.setdefault(name, {}), place, delta)
        if not self._took_timeouts(change):
            raise NotTaken
        return Written(change.count, changed, details=change.by_kind())

    def write_whole(self, frame: Content, plans: Plans) -> Written:
        """Read the table and make it hold just this.

        Args:
            frame: what does not depend on service ports.
            plans: every service port of the family.

        Raises:
            Blamed: some service ports were refused; nothing was written.
            DataplaneError: the kernel refused the rest.
        """
        try:
            return self._write_whole(frame, plans)
        except NotTaken:
            self._is_adopted = False  # what is found now is no news
            return self._write_whole(frame, plans)

    def _write_whole(self, frame: Content, plans: Plans) -> Written:
        held = read_table(self._writer.socket, self._layout.table)
        if not self._is_adopted and held is not None:
            self._slots, self._ranges = adopt.ranges(held, self._layout, plans)
            self._maps = adopt.maps(held)
        whole = Whole()
        whole.include(frame, None)
        ranges: dict[PlanKey, Ranges] = {}
        for key, plan in plans.items():
            ranges[key] = self._fit(plan, self._ranges.get(key))
            whole.include(self._render(plan, ranges[key]), key)
        maps = maps_of(ranges.values()) | self._maps
        for name in sorted(maps):
            whole.sets[name] = (self._layout.endpoints_map(name), None)
        change, wrong = compare(held, whole, can_retime=self._can_retime, waiting=self._waiting)
        try:
            self._commit(change)
        except Refused as refused:
            self._blame(change, refused)
        for key in self._ranges.keys() - ranges.keys():
            self._keep(key, Ranges())
        for key, now in ranges.items():
            self._keep(key, now)
        self._counts, self._maps = whole.shared, maps
        was_adopted, self._is_adopted = self._is_adopted, True
        if not self._took_timeouts(change):
            raise NotTaken
        owners = {owner for _, owner in (*change.chains.values(), *change.rules.values())}
        return Written(
            change.count,
            {owner for owner in owners if owner is not None},
            tuple(f"table {self._name}: {what}" for what in wrong) if was_adopted else (),
            change.by_kind(),
        )

    def tidy(self) -> None:
        """Remove chains that could not go when they were emptied."""
        now = self._clock()
        old = [name for name, since in self._waiting.items() if now - since > STALE_CHAIN_S]
        for name in old:
            try:
                self._writer.commit([self._layout.table.remove_chain(name)])
            except Refused as refused:
                if not refused.has_only(errno.ENOENT):
                    self.cleanup_failures += 1
                    self._waiting[name] = now
                    continue
            del self._waiting[name]

    @property
    def _name(self) -> str:
        kind = {4: "ip", 6: "ip6"}[self._layout.family]
        return f"{kind} {self._layout.table.name}"

    def _render(self, plan: ServicePlan | None, ranges: Ranges | None) -> Content:
        if plan is None:
            return Content()
        return render(plan, self._layout, ranges=ranges or Ranges(), pods=self._pods)

    def _fit(self, plan: ServicePlan | None, last: Ranges | None) -> Ranges:
        if plan is None or plan.affinity_s:
            return Ranges()
        last = last or Ranges()
        return Ranges(
            self._slots.fit(last.cluster, cluster_ends(plan)),
            self._slots.fit(last.local, local_ends(plan)),
        )

    def _keep(self, key: PlanKey, now: Ranges) -> None:
        """Remember the numbers a service port has now, and give back those it had."""
        for last, one in zip(self._ranges.get(key, Ranges()), now, strict=True):
            if last is not None and (one is None or one.start != last.start):
                self._slots.give_back(last)
        if now == Ranges():
            self._ranges.pop(key, None)
        else:
            self._ranges[key] = now

    # -- transactions ------------------------------------------------------------------------------

    def _commit(self, change: Change, *, apart: bool = False) -> None:
        """Write a change; raises Refused."""
        for name in change.chains.keys() & self._waiting.keys():
            del self._waiting[name]
        switched: list[Owned] = []
        try:
            for switched in steps(self._layout.table, change, apart=apart):
                self._writer.commit([request for request, _ in switched])
        except Refused as refused:
            if not change.gone_chains or not _is_about_chains_in_use(refused, switched):
                self.sync_failures += 1
                raise
            self.cleanup_failures += 1
            # Kernels before 6.2: what led to them is still there for a moment.
            self._waiting |= dict.fromkeys(change.gone_chains, self._clock())
            change.emptied |= change.gone_chains
            change.gone_chains = set()
            self._commit(change, apart=apart)

    def _blame(self, change: Change, refused: Refused) -> None:
        """Find out who is refused; raises Blamed, DataplaneError."""
        requests: list[Owned] = []
        try:
            for requests in steps(self._layout.table, change, apart=True):
                self._writer.commit([request for request, _ in requests])
        except Refused as again:
            refused = again
        else:
            return
        owners: dict[PlanKey, str] = {}
        for index, failure in refused.failures:
            owner: Owner = requests[index][1] if index is not None else None
            if owner is not None:
                owners.setdefault(owner, failure.reason)
        if not owners:
            raise DataplaneError(f"table {self._name}: {refused}") from refused
        raise Blamed(owners)

    def _took_timeouts(self, change: Change) -> bool:
        """Whether sets took their new timeouts; before Linux 6.3 they do not (X19)."""
        if change.retimed:
            sets = adopt.timeouts(self._writer.socket, self._layout.table)
            if any(sets.get(name) != timeout_s for name, timeout_s in change.retimed.items()):
                self._can_retime = False
                self._writer.doubt()
                return False
        return True


def _is_about_chains_in_use(refused: Refused, requests: list[Owned]) -> bool:
    return refused.has_only(errno.EBUSY) and all(
        index is not None and requests[index][0].kind == DELCHAIN for index, _ in refused.failures
    )


def _count(content: Content, by: int, counts: dict[tuple[str, bytes], int]) -> None:
    for name, keys in content.shared.items():
        for key in keys:
            counts[name, key] = counts.get((name, key), 0) + by


def _add(counts: dict[bytes, int], key: bytes, by: int) -> None:
    count = counts.get(key, 0) + by
    if count:
        counts[key] = count
    else:
        counts.pop(key, None)
