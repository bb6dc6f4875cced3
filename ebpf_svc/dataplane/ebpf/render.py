"""Work out what one plan changes in the kernel: ids and slots taken, entries to write and to drop.

Reads the kernel's arrays, which are mapped, and the index where a backend may share its address
with another; writes nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from ebpf_svc.dataplane.ebpf import entries
from ebpf_svc.dataplane.ebpf.constants import BACKEND_CHAIN_MAX, NO_BACKEND
from ebpf_svc.dataplane.ebpf.entries import ListName, MaglevOptions, SlotRange
from ebpf_svc.dataplane.ebpf.state import FamilyState, HeldList, Record
from ebpf_svc.dataplane.ebpf.table import ArrayTable
from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.desired import Backend, ServicePlan

_FLAGS = tuple(
    tuple(entries.backend_flags(Backend("", 0, in_cluster, in_local)) for in_local in (False, True))
    for in_cluster in (False, True)
)
"""Flags by membership of the Cluster and of the Local list."""


@dataclass(slots=True)
class Change:
    """What a plan changes; the writer carries it out, first `puts` then `drops`."""

    plan: ServicePlan
    record: Record
    """As it will be."""
    backend_puts: list[tuple[int, bytes]] = field(default_factory=list)
    """First id, and values end to end."""
    flag_puts: list[tuple[int, int]] = field(default_factory=list)
    revived: list[int] = field(default_factory=list)
    """Tombstones that serve again; a client that was with them stays."""
    links: dict[bytes, int] = field(default_factory=dict)
    """Heads of chains."""
    next_puts: list[tuple[int, int]] = field(default_factory=list)
    """Last backends of long chains, and what follows them now."""
    slot_puts: list[tuple[int, bytes]] = field(default_factory=list)
    range_puts: list[tuple[int, list[bytes]]] = field(default_factory=list)
    """New sets of source ranges and their keys."""
    frontend_puts: list[tuple[bytes, bytes]] = field(default_factory=list)
    frontend_drops: list[bytes] = field(default_factory=list)
    backend_drops: list[int] = field(default_factory=list)
    list_drops: list[SlotRange] = field(default_factory=list)
    error: Exception | None = None

    @property
    def drops_anything(self) -> bool:
        return bool(
            self.frontend_drops or self.backend_drops or self.list_drops or self.record.retired
        )

    @property
    def writes_anything(self) -> bool:
        # New lists and source ranges show in the frontends that point at them.
        return bool(
            self.frontend_puts or self.backend_puts or self.flag_puts or self.drops_anything
        )


class Renderer:
    """Renders plans of one family, many before the writer writes them together."""

    def __init__(
        self, state: FamilyState, slots: ArrayTable, *, use_maglev: bool, options: MaglevOptions
    ) -> None:
        self._state, self._codec, self._chains = state, state.codec, state.chains
        self._slots, self._use_maglev, self._options = slots, use_maglev, options
        self._heads: dict[bytes, int] = {}
        """Backends rendered and not yet in the index."""
        self._chains_so_far: dict[bytes, list[int]] = {}
        """Chains as they will be; not there = the one backend in `_heads`."""

    def written(self) -> None:
        """What was rendered so far is in the kernel."""
        self._heads.clear()
        self._chains_so_far.clear()

    def render(self, plan: ServicePlan) -> Change:
        """Work out one plan.

        Raises:
            DataplaneError: no id or no room is left; nothing is taken then.
        """
        state = self._state
        keys = [self._codec.key(frontend.key) for frontend in plan.frontends]
        record, orphan = state.records.get(plan.key), None
        taken = _Taken(state)
        if record is not None:
            old_keys = keys if self._same_frontends(record, plan) else state.frontends_of(record)
        elif claim := state.claim(keys):
            service, orphan = claim
            record = Record(
                service,
                None,
                orphan.backend_ids,
                orphan.lists,
                orphan.retired,
                orphan.is_complete,
            )
            old_keys = orphan.frontends
        else:
            old_keys = []
            record = Record(taken.service(), None, array("I"))  # nothing is taken if this raises
        try:
            change = Change(plan, Record(record.service, plan, array("I"), retired=record.retired))
            linking = self._render_backends(change, record, taken)
            self._render_lists(change, record, taken)
            self._render_frontends(change, keys, taken)
        except (DataplaneError, ValueError) as error:
            taken.give_back()
            if orphan is not None:
                state.orphans[record.service] = orphan
            if isinstance(error, DataplaneError):
                raise
            raise DataplaneError(str(error)) from error
        # Last: plans to come find it in their chains, so nothing may fail behind it.
        self._link(change, *linking)
        if old_keys is not keys:
            still = set(keys)
            change.frontend_drops = [key for key in old_keys if key not in still]
        return change

    def slots_of(self, record: Record, held: HeldList) -> bytes:
        """What a list of an applied plan holds, to be written again."""
        if record.plan is None:
            return b""
        members = entries.needed_lists(record.plan, use_maglev=self._use_maglev)[held.name]
        return self._slots_of(record.plan, held.name, members, record.backend_ids)

    def _slots_of(
        self, plan: ServicePlan, name: ListName, members: Sequence[int], ids: Sequence[int]
    ) -> bytes:
        return entries.slots_of(
            name, members, backends=plan.backends, ids=ids, options=self._options
        ).tobytes()

    def _same_frontends(self, record: Record, plan: ServicePlan) -> bool:
        return record.plan is not None and record.plan.frontends == plan.frontends

    def _render_backends(
        self, change: Change, record: Record, taken: _Taken
    ) -> tuple[Sequence[int], Sequence[bytes], Sequence[int]]:
        """Give each backend an id; returns positions to be linked, and all ats and flags."""
        backends, service = change.plan.backends, record.service
        protocol = change.plan.key.port_name.protocol.number
        ats = self._codec.ats(backends, protocol)
        flags = [_FLAGS[each.in_cluster][each.in_local] for each in backends]
        if record.backend_ids or service in self._state.dead:
            ids, missing = self._known_backends(change, record, ats, flags)
        else:
            ids, missing = array("I", taken.backends(len(ats))), range(len(ats))
        for i in missing:
            if ids[i] == NO_BACKEND:
                (ids[i],) = taken.backends(1)
        change.record.backend_ids = ids
        return missing, ats, flags

    def _known_backends(
        self, change: Change, record: Record, ats: Sequence[bytes], flags: Sequence[int]
    ) -> tuple[array[int], Sequence[int]]:
        """Find the ids endpoints have already.

        Returns:
            ids, 0 for endpoints that need one; and positions of those not in the index.
        """
        ids, missing = array("I"), []
        held = self._held(record, change.plan.key.port_name.protocol.number)
        dead_ids = self._state.dead.get(record.service, ())
        dead = {self._state.at_of(each): each for each in dead_ids}
        for i, at in enumerate(ats):
            known = held.pop(at, NO_BACKEND)
            is_linked = known != NO_BACKEND and record.is_complete
            if not known and at in dead:
                known = dead[at]
                change.revived.append(known)
            ids.append(known)
            if known and self._chains.flags(known) != flags[i]:
                change.flag_puts.append((known, flags[i]))
            if not is_linked and not (known and known in self._chains.walk(at)):
                missing.append(i)
        change.backend_drops.extend(held.values())
        return ids, missing

    def _link(
        self, change: Change, missing: Sequence[int], ats: Sequence[bytes], flags: Sequence[int]
    ) -> None:
        """Put backends at the heads of their chains, or at the ends of long ones."""
        if not missing:
            return
        service = change.record.service
        new_ats = [ats[i] for i in missing]
        new_ids = array("I", [change.record.backend_ids[i] for i in missing])
        tails = {each: self._codec.tail(service, NO_BACKEND, each) for each in set(flags)}
        values = [ats[i] + tails[flags[i]] for i in missing]
        change.links = dict(zip(new_ats, new_ids, strict=True))
        for at, position in self._state.note_linked(new_ats):
            chain, new = self._chain(at), new_ids[position]
            if len(chain) < BACKEND_CHAIN_MAX:
                head = chain[0] if chain else NO_BACKEND
                values[position] = at + self._codec.tail(service, head, flags[missing[position]])
                chain.insert(0, new)
            else:
                change.next_puts.append((chain[-1], new))
                del change.links[at]
                chain.append(new)
        self._heads |= change.links
        first = new_ids[0]
        if new_ids == array("I", range(first, first + len(new_ids))):
            change.backend_puts.append((first, b"".join(values)))
        else:
            change.backend_puts.extend(zip(new_ids, values, strict=True))

    def _held(self, record: Record, protocol: int) -> dict[bytes, int]:
        """The backends a record has, by where they answer."""
        if record.plan is None:
            return {self._state.at_of(each): each for each in record.backend_ids}
        ats = self._codec.ats(record.plan.backends, protocol)
        return dict(zip(ats, record.backend_ids, strict=True))

    def _chain(self, at: bytes) -> list[int]:
        """The backends with this `at` so far, to be added to."""
        chain = self._chains_so_far.get(at)
        if chain is None:
            head = self._heads.get(at)
            chain = self._chains.walk(at) if head is None else [head]
            self._chains_so_far[at] = chain
        return chain

    def _render_lists(self, change: Change, record: Record, taken: _Taken) -> None:
        plan, ids = change.plan, change.record.backend_ids
        held = {each.name: each for each in record.lists}
        lists: list[HeldList] = []
        for name, members in entries.needed_lists(plan, use_maglev=self._use_maglev).items():
            data = self._slots_of(plan, name, members, ids)
            length = len(data) // 4
            old = held.pop(name, None)
            if (
                old is not None
                and old.length == length
                and self._slots.read(old.first, old.length) == data
            ):
                lists.append(old._replace(digest=hash(data)))
                continue
            first = taken.slots(length)
            change.slot_puts.append((first, data))
            lists.append(HeldList(name, first, length, hash(data)))
            if old is not None:
                change.list_drops.append(old.slots)
        change.list_drops.extend(each.slots for each in held.values())
        change.record.lists = tuple(lists)

    def _render_frontends(self, change: Change, keys: Sequence[bytes], taken: _Taken) -> None:
        plan, service = change.plan, change.record.service
        lists = {each.name: each.slots for each in change.record.lists}
        for frontend, key in zip(plan.frontends, keys, strict=True):
            ranges = 0
            if frontend.source_ranges is not None:
                ranges, is_new = taken.range_set(frontend.source_ranges)
                if is_new:
                    pack = self._codec.range_key
                    change.range_puts.append(
                        (ranges, [pack(ranges, prefix) for prefix in frontend.source_ranges])
                    )
            value = self._codec.frontend(
                entries.frontend_value(
                    plan,
                    frontend,
                    service=service,
                    lists=lists,
                    ranges=ranges,
                    use_maglev=self._use_maglev,
                )
            )
            if self._state.frontends.get(key) != value:
                change.frontend_puts.append((key, value))


class _Taken:
    """What rendering one plan took, to be given back when it cannot be finished."""

    def __init__(self, state: FamilyState) -> None:
        self._state = state
        self._service = 0
        self._backends: list[int] = []
        self._slots: list[SlotRange] = []
        self._range_sets: list[int] = []

    def service(self) -> int:
        self._service = self._state.services.take()
        return self._service

    def backends(self, count: int) -> Sequence[int]:
        pool, room = self._state.backends, self._state.tables.backends.max_entries - 1
        if len(pool) + count > room:
            # Not tried: what is given back rests, and plans that would fit could not be written.
            raise DataplaneError(f"{count} backends more than {len(pool)} of {room} do not fit")
        take, taken = pool.take, self._backends
        start = len(taken)
        for _ in range(count):
            taken.append(take())
        return taken[start:]

    def slots(self, length: int) -> int:
        first = self._state.slots.take(length)
        self._slots.append(SlotRange(first, length))
        return first

    def range_set(self, prefixes: tuple[str, ...]) -> tuple[int, bool]:
        set_id, is_new = self._state.range_sets.find_or_take(prefixes)
        if is_new:
            self._range_sets.append(set_id)
        return set_id, is_new

    def give_back(self) -> None:
        if self._service:
            self._state.services.release(self._service)
        for backend in self._backends:
            self._state.backends.release(backend)
        for slots in self._slots:
            self._state.slots.release(*slots)
        for set_id in self._range_sets:
            self._state.range_sets.forget(set_id)
