"""Carry out changes in an order in which no reader sees half of one.

Puts: backends, then the index that leads replies to them, slots in ranges nobody reads, source
ranges under an id nobody names, at last the frontends, each switched by one atomic update. Drops
come when every put of every plan is done: a frontend that moved to another service port is by then
the other's.

Each step writes all plans in one batch. A batch that fails is written again plan by plan, so that
only the plans that cannot be written fail.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from ebpf_svc.dataplane.ebpf import entries
from ebpf_svc.dataplane.ebpf.entries import SlotRange
from ebpf_svc.dataplane.ebpf.render import Change
from ebpf_svc.dataplane.ebpf.state import FamilyState, Orphan
from ebpf_svc.dataplane.ebpf.table import ArrayTable
from ebpf_svc.model.net import Protocol

_UDP = Protocol.UDP.number


class Writer:
    """Writes the maps of one family, and notes in its state what it wrote."""

    def __init__(self, state: FamilyState, slots: ArrayTable) -> None:
        self._state, self._tables, self._slots = state, state.tables, slots

    def put(self, changes: Sequence[Change]) -> None:
        """Write what `changes` add and switch; a plan that fails keeps why in `error`."""
        self._step(changes, self._put_backends)
        self._step(changes, self._put_links)
        self._step(changes, self._put_slots)
        self._step(changes, self._put_ranges)
        self._step(changes, self._put_frontends)
        for change in changes:
            self._note(change)

    def _step(self, changes: Sequence[Change], write: Callable[[Sequence[Change]], None]) -> None:
        going = [change for change in changes if change.error is None]
        try:
            write(going)
        except OSError:
            for change in going:
                try:
                    write((change,))
                except OSError as error:
                    change.error = error

    def _put_backends(self, changes: Sequence[Change]) -> None:
        table, offset = self._tables.backends, self._state.codec.flags_offset
        write_runs(table, [put for change in changes for put in change.backend_puts])
        for change in changes:
            for backend, flags in change.flag_puts:
                table.write_word(backend, offset, flags)

    def _put_links(self, changes: Sequence[Change]) -> None:
        # Within one batch a chain grows from its end: the last link of an address is its head.
        links: dict[bytes, int] = {}
        for change in changes:
            links |= change.links
        heads = array("I", links.values()).tobytes()
        words = [heads[i : i + 4] for i in range(0, len(heads), 4)]
        self._tables.backend_index.update(list(zip(links, words, strict=True)))
        table, offset = self._tables.backends, self._state.codec.next_offset
        for change in changes:
            for last, following in change.next_puts:
                table.write_word(last, offset, following)

    def _put_slots(self, changes: Sequence[Change]) -> None:
        write_runs(self._slots, [put for change in changes for put in change.slot_puts])

    def _put_ranges(self, changes: Sequence[Change]) -> None:
        keys = [key for change in changes for _, keys in change.range_puts for key in keys]
        if keys:
            self._tables.source_ranges.update(
                [(key, self._state.codec.word(entries.ALLOWED)) for key in keys]
            )

    def _put_frontends(self, changes: Sequence[Change]) -> None:
        puts = [put for change in changes for put in change.frontend_puts]
        try:
            self._tables.frontends.update(puts)
        except OSError:
            if len(changes) > 1:
                raise
            self._put_each_frontend(puts)
        else:
            for key, value in puts:
                self._state.put_frontend(key, value)

    def _put_each_frontend(self, puts: Sequence[tuple[bytes, bytes]]) -> None:
        """Write as many as possible of one plan, remember those, and raise for the others."""
        failure: OSError | None = None
        for put in puts:
            try:
                self._tables.frontends.update([put])
            except OSError as error:
                failure = error
            else:
                self._state.put_frontend(*put)
        if failure is not None:
            raise failure

    def _note(self, change: Change) -> None:
        state, record = self._state, change.record
        state.records[change.plan.key] = record
        state.revive(record.service, change.revived)
        if change.error is None:
            return
        record.is_complete = False
        # Frontends that could not be switched still point at the old lists.
        record.retired += tuple(change.list_drops)
        change.list_drops = []
        for set_id, keys in change.range_puts:
            if state.range_sets.users[set_id] <= 0:
                self._tables.source_ranges.delete(keys)
                state.range_sets.forget(set_id)

    def drop(self, changes: Sequence[Change]) -> None:
        """Remove what the puts of `changes` replaced."""
        for change in changes:
            record = change.record
            self.drop_frontends(record.service, change.frontend_drops)
            self.drop_backends(record.service, change.backend_drops)
            self._release(change.list_drops)
            if record.is_complete:
                self._release(record.retired)
                record.retired = ()

    def wind_up(self, service: int, orphan: Orphan) -> None:
        """Leave of a service without plan only what its flows need."""
        self.drop_frontends(service, orphan.frontends)
        self.drop_backends(service, orphan.backend_ids)
        orphan.backend_ids = orphan.backend_ids[:0]
        self._release([*(each.slots for each in orphan.lists), *orphan.retired])
        orphan.lists, orphan.retired = (), ()
        orphan.is_wound_up = True

    def drop_frontends(self, service: int, keys: Sequence[bytes]) -> None:
        """Let frontends drain, or delete those of UDP, unless they are another service's by now.

        Connections through a TCP or SCTP frontend outlive it (P12): the sweeper deletes it.
        """
        gone, draining = [], []
        codec, frontends = self._state.codec, self._state.frontends
        for key in keys:
            value = frontends.get(key)
            if value is None:
                continue
            parsed = codec.frontend_value(value)
            if parsed.service != service or key in self._state.draining:
                continue
            if codec.protocol(key) == _UDP:
                gone.append(key)
            else:
                after = entries.draining_value(service, parsed.flags)
                draining.append((key, codec.frontend(after)))
        self._tables.frontends.update(draining)
        for put in draining:
            self._state.put_frontend(*put)
        self._tables.frontends.delete(gone)
        for key in gone:
            self._state.remove_frontend(key)

    def drop_backends(self, service: int, backends: Sequence[int]) -> None:
        """Make backends tombstones: they serve no more and still lead replies to their flows."""
        codec = self._state.codec
        offset = codec.flags_offset
        for backend in backends:
            self._tables.backends.write_word(backend, offset, 0)
        is_udp = bool(backends) and codec.protocol(self._state.at_of(backends[0])) == _UDP
        self._state.bury(service, backends, is_udp=is_udp)

    def _release(self, ranges: Sequence[SlotRange]) -> None:
        for slots in ranges:
            self._state.slots.release(*slots)


def write_runs(table: ArrayTable, puts: Sequence[tuple[int, bytes]]) -> None:
    """Write values at indices, neighbours with one copy."""
    size = table.value.size
    run: list[bytes] = []
    first, following = 0, -1
    for index, data in sorted(puts):
        if index != following and run:
            table.write(first, b"".join(run))
            run = []
        if not run:
            first = index
        run.append(data)
        following = index + len(data) // size
    if run:
        table.write(first, b"".join(run))
