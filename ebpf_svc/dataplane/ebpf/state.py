"""What the agent knows it has put into the kernel: the actual state, by family.

Owns ids and slots. Writes nothing: the writer tells it what it wrote. Small, because it is there
for as long as the agent runs: an endpoint costs its 4-byte id, and its address stands only in the
plan.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

from ebpf_svc.dataplane.ebpf.chains import Chains
from ebpf_svc.dataplane.ebpf.codec import Codec, number
from ebpf_svc.dataplane.ebpf.constants import NO_BACKEND
from ebpf_svc.dataplane.ebpf.entries import (
    FrontendValue,
    ListName,
    SlotRange,
    is_draining,
    lists_of_value,
)
from ebpf_svc.dataplane.ebpf.ids import GRACE_S, IdPool, RangePool
from ebpf_svc.dataplane.ebpf.ranges import RangeSets
from ebpf_svc.dataplane.ebpf.tables import FamilyTables
from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.desired import PlanKey, ServicePlan
from ebpf_svc.model.net import Family, Protocol

_KNOWN_BYTES = 1 << 18
_KNOWN_MASK = _KNOWN_BYTES - 1


class HeldList(NamedTuple):
    """A slot list in the kernel."""

    name: ListName
    first: int
    length: int
    digest: int
    """Hash of the content, so that a look at the kernel builds no table; 0 = not known."""

    @property
    def slots(self) -> SlotRange:
        return SlotRange(self.first, self.length)


@dataclass(slots=True)
class Record:
    """One service port as the kernel holds it."""

    service: int
    plan: ServicePlan | None
    """What was applied; None when an earlier plan, or an earlier run, left this behind."""
    backend_ids: array[int]
    """In the order of `plan.backends`."""
    lists: tuple[HeldList, ...] = ()
    retired: tuple[SlotRange, ...] = ()
    """Replaced lists that a frontend may still point at, because a write failed."""
    is_complete: bool = True
    """False: something could not be written; the next apply looks at everything again."""


@dataclass(slots=True)
class Orphan:
    """A service id without a plan: to be claimed by one that has its frontends, else wound up."""

    backend_ids: array[int] = field(default_factory=lambda: array("I"))
    """Those that still serve."""
    frontends: list[bytes] = field(default_factory=list)
    lists: tuple[HeldList, ...] = ()
    retired: tuple[SlotRange, ...] = ()
    is_complete: bool = True
    """False: some of its backends may be missing in the index."""
    is_wound_up: bool = False
    """Only tombstones and draining frontends are left, for the sweeper."""


class FamilyState:
    """Everything of one family."""

    def __init__(
        self, family: Family, *, codec: Codec, tables: FamilyTables, slots: RangePool
    ) -> None:
        """Start empty.

        Args:
            slots: shared by both families, as the map is.
        """
        self.family, self.codec, self.tables, self.slots = family, codec, tables, slots
        name = family.label
        entries = tables.frontends.max_entries + tables.backends.max_entries
        self.services = IdPool(f"{name} services", entries, grace_s=GRACE_S)
        self.backends = IdPool(f"{name} backends", tables.backends.max_entries - 1, grace_s=GRACE_S)
        self.range_sets = RangeSets(f"{name} source ranges", tables.source_ranges.max_entries)
        self.chains = Chains(codec, tables)
        self.records: dict[PlanKey, Record] = {}
        self.orphans: dict[int, Orphan] = {}
        self.frontends: dict[bytes, bytes] = {}
        """Key and value of every entry in the kernel, draining ones included."""
        self.draining: set[bytes] = set()
        self.dead: dict[int, list[int]] = {}
        """Tombstones: service -> backend ids."""
        self.fresh_dead: set[int] = set()
        self.fresh_draining: set[bytes] = set()
        """Tombstones and draining frontends the sweeper has not seen yet: a program that read them
        before they became that may still be about to open a flow."""
        self.lost_udp: list[tuple[float, int]] = []
        """Backends of UDP that died, and when, by a monotonic clock; sockets may be connected to
        them until the sweeper has looked. Oldest first."""
        self.damage: list[str] = []
        """What `adopt` could not make sense of; a look at the kernel must mend it."""
        self._known: bytearray = bytearray(_KNOWN_BYTES)

    def recycle(self, now_s: float) -> None:
        """Free what has rested, by a monotonic clock."""
        # No program counts under an id that has rested; who gets it next starts from zero.
        self.tables.service_counters.clear(self.services.recycle(now_s))
        self.backends.recycle(now_s)
        self.range_sets.recycle(now_s)

    def service_of(self, value: bytes) -> int:
        """The service a frontend's value names."""
        return self.codec.frontend_value(value).service

    def note_linked(self, ats: Iterable[bytes]) -> list[tuple[bytes, int]]:
        """Remember that the index has, or will have, these keys.

        Returns:
            those that it may have had already, with their positions: one of them that it had not
            costs a look-up, none that it had is missing.
        """
        known, suspects = self._known, []
        for position, at in enumerate(ats):
            spot = crc32(at)  # not hash(): what is suspected should not differ from run to run
            byte, bit = spot >> 3 & _KNOWN_MASK, 1 << (spot & 7)
            if known[byte] & bit:
                suspects.append((at, position))
            else:
                known[byte] |= bit
        return suspects

    def put_frontend(self, key: bytes, value: bytes) -> None:
        """Note an entry that was written."""
        parsed = self.codec.frontend_value(value)
        self._forget(key)
        self.frontends[key] = value
        if parsed.ranges:
            self.range_sets.use(parsed.ranges)
        if is_draining(parsed.flags):
            self.draining.add(key)
            self.fresh_draining.add(key)
        else:
            self.draining.discard(key)

    def remove_frontend(self, key: bytes) -> None:
        """Note an entry that was deleted."""
        self._forget(key)
        self.frontends.pop(key, None)
        self.draining.discard(key)

    def bury(self, service: int, backends: Sequence[int], *, is_udp: bool) -> None:
        """Note backends that became tombstones."""
        if backends:
            self.dead.setdefault(service, []).extend(backends)
            self.fresh_dead.update(backends)
            if is_udp:
                now_s = time.monotonic()
                self.lost_udp.extend((now_s, backend) for backend in backends)

    def exhume(self, service: int, backends: Sequence[int]) -> None:
        """Take tombstones out of their chains for good, whatever flows still name them."""
        for backend in backends:
            self.chains.unlink(backend, self.at_of(backend))
            self.backends.release(backend)
        self.revive(service, backends)

    def take_lost(self, before_s: float) -> list[int]:
        """Hand over the backends of UDP that had died by then, once."""
        found = [backend for died_s, backend in self.lost_udp if died_s <= before_s]
        del self.lost_udp[: len(found)]
        return found

    def revive(self, service: int, backends: Iterable[int]) -> None:
        """Note tombstones that serve again, or are gone for good."""
        back = set(backends)
        if back:
            self.lost_udp = [each for each in self.lost_udp if each[1] not in back]
            left = [each for each in self.dead[service] if each not in back]
            self.fresh_dead -= back
            if left:
                self.dead[service] = left
            else:
                del self.dead[service]

    def _forget(self, key: bytes) -> None:
        old = self.frontends.get(key)
        if old is not None:
            ranges = self.codec.frontend_value(old).ranges
            if ranges:
                self.range_sets.leave(ranges)

    def claim(self, keys: Iterable[bytes]) -> tuple[int, Orphan] | None:
        """Take over the service id some of these frontends already have, if nobody else has it.

        So ids, and with them flows, survive a restart of the agent, and a service that comes back.
        """
        if not self.orphans:
            return None
        for key in keys:
            value = self.frontends.get(key)
            if value is None:
                continue
            service = self.service_of(value)
            orphan = self.orphans.pop(service, None)
            if orphan is not None:
                return service, orphan
        return None

    def abandon(self, key: PlanKey) -> None:
        """Turn the record of a plan that is gone into an orphan."""
        record = self.records.pop(key)
        self.orphans[record.service] = Orphan(
            record.backend_ids,
            self.frontends_of(record),
            record.lists,
            record.retired,
            record.is_complete,
        )

    def frontends_of(self, record: Record) -> list[bytes]:
        """The keys a record's plan wrote or tried to write."""
        if record.plan is None:
            return []
        return [self.codec.key(frontend.key) for frontend in record.plan.frontends]

    def at_of(self, backend: int) -> bytes:
        """The `at` of a backend in the kernel."""
        table, start = self.tables.backends, backend * self.tables.backends.stride
        return bytes(table.view(backend + 1)[start : start + self.codec.at_size])

    def adopt(self) -> None:
        """Rebuild from the pinned maps what an earlier run left: every service is an orphan."""
        for key, value in self.tables.frontends.items():
            parsed = self.codec.frontend_value(value)
            orphan = self._orphan(parsed.service)
            if orphan is None:
                continue
            orphan.frontends.append(key)
            self.put_frontend(key, value)
            self._adopt_lists(orphan, parsed)
        self._adopt_backends()
        self._forget_counts()
        by_set: dict[int, list[str]] = {set_id: [] for set_id in self.range_sets.users}
        for key, _ in self.tables.source_ranges.items():
            set_id, prefix = self.codec.prefix(key)
            by_set.setdefault(set_id, []).append(prefix)
        for set_id, prefixes in by_set.items():
            try:
                self.range_sets.adopt(set_id, tuple(sorted(prefixes)))
            except DataplaneError as error:
                self.damage.append(str(error))

    def _forget_counts(self) -> None:
        """Zero the counters of ids an earlier run gave back and did not see free."""
        counters = self.tables.service_counters
        counting = counters.totals(range(counters.max_entries))
        counters.clear([service for service in counting if service not in self.orphans])

    def _orphan(self, service: int) -> Orphan | None:
        orphan = self.orphans.get(service)
        if orphan is None:
            try:
                self.services.adopt(service)
            except DataplaneError as error:
                self.damage.append(str(error))
                return None
            orphan = self.orphans[service] = Orphan()
        return orphan

    def _adopt_lists(self, orphan: Orphan, value: FrontendValue) -> None:
        for name, slots in lists_of_value(value).items():
            if any(other.slots == slots for other in orphan.lists) or slots in orphan.retired:
                continue
            try:
                self.slots.adopt(*slots)
            except DataplaneError as error:
                self.damage.append(str(error))
                continue
            if any(other.name == name for other in orphan.lists):
                # A crash between two frontends of one service: which list is the newer one, nobody
                # knows; both stay until every frontend points elsewhere.
                orphan.retired += (slots,)
            else:
                orphan.lists += (HeldList(name, *slots, 0),)

    def _adopt_backends(self) -> None:
        table, stride = self.tables.backends, self.tables.backends.stride
        words = self.codec.backend_words
        for at, head in self.tables.backend_index.items():
            self.note_linked((at,))
            backend = number(head)
            while backend != NO_BACKEND:
                start = backend * stride
                try:
                    self.backends.adopt(backend)
                except DataplaneError as error:  # beyond the array, or a chain that bites its tail
                    self.damage.append(str(error))
                    break
                view = table.view(backend + 1)
                service, following, flags = words(view, start)
                orphan = self._orphan(service)
                if orphan is None or view[start : start + len(at)] != at:
                    self.damage.append(f"backend {backend} is not where the index says")
                    self.backends.release(backend)
                    break
                if flags:
                    orphan.backend_ids.append(backend)
                else:
                    is_udp = self.codec.protocol(at) == Protocol.UDP.number
                    self.bury(service, [backend], is_udp=is_udp)
                backend = following
