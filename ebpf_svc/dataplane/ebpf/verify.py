"""Compare what a family's maps hold with what was written, and put right what others changed.

Everything is read, nothing is trusted but the agent's memory. A repair is worth a sentence each, up
to a limit: whoever clears a whole map need not be told ten thousand times.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from ebpf_svc.dataplane.ebpf import entries
from ebpf_svc.dataplane.ebpf.codec import number
from ebpf_svc.dataplane.ebpf.constants import NO_BACKEND
from ebpf_svc.dataplane.ebpf.render import Renderer
from ebpf_svc.dataplane.ebpf.state import FamilyState
from ebpf_svc.dataplane.ebpf.table import ArrayTable, HashTable

SENTENCES_MAX = 20
"""Repairs of one kind named one by one."""


class FamilyVerifier:
    """Verifies one family."""

    def __init__(self, state: FamilyState, renderer: Renderer, slots: ArrayTable) -> None:
        self._state, self._renderer, self._slots = state, renderer, slots
        self._tables, self._codec = state.tables, state.codec

    def verify(self) -> list[str]:
        """Repair every deviation, in the order of an apply.

        Returns:
            a sentence for each.
        """
        return [
            *_summary("backend", self._backends()),
            *_summary("backend", self._index()),
            *_summary("slots", self._lists()),
            *_summary("source range", self._source_ranges()),
            *_summary("frontend", self._frontends()),
        ]

    def _frontends(self) -> Iterator[str]:
        wanted, name = self._state.frontends, self._codec.readable
        puts, foreign = _differences(self._tables.frontends, wanted)
        self._tables.frontends.update(puts)
        self._tables.frontends.delete(foreign)
        yield from (f"{name(key)} written again" for key, _ in puts)
        yield from (f"{name(key)} is not ours, removed" for key in foreign)

    def _source_ranges(self) -> Iterator[str]:
        pack, value = self._codec.range_key, self._codec.word(entries.ALLOWED)
        wanted = {
            pack(set_id, prefix): value
            for set_id, prefixes in self._state.range_sets.content.items()
            for prefix in prefixes
        }
        puts, foreign = _differences(self._tables.source_ranges, wanted)
        self._tables.source_ranges.update(puts)
        self._tables.source_ranges.delete(foreign)
        yield from (f"{self._codec.prefix(key)[1]} written again" for key, _ in puts)
        yield from (f"{self._codec.prefix(key)[1]} is not ours, removed" for key in foreign)

    def _lists(self) -> Iterator[str]:
        for record in self._state.records.values():
            for held in record.lists:
                data = self._slots.read(held.first, held.length)
                if hash(data) == held.digest or not record.is_complete:
                    continue
                self._slots.write(held.first, self._renderer.slots_of(record, held))
                yield f"{held.name.name} of {record.plan and record.plan.key} written again"

    def _backends(self) -> Iterator[str]:
        """The array, chains aside: their links are the index's to verify."""
        codec, table = self._codec, self._tables.backends
        stride, words = table.stride, codec.backend_words
        for record in self._state.records.values():
            plan = record.plan
            if plan is None:
                continue
            ats = codec.ats(plan.backends, plan.key.port_name.protocol.number)
            for backend, at, endpoint in zip(record.backend_ids, ats, plan.backends, strict=True):
                view, start = table.view(backend + 1), backend * stride
                service, following, flags = words(view, start)
                wanted = entries.backend_flags(endpoint)
                if (
                    flags == wanted
                    and service == record.service
                    and view[start : start + len(at)] == at
                ):
                    continue
                table.write(backend, at + codec.tail(record.service, following, wanted))
                yield f"{endpoint.address} port {endpoint.port} of {plan.key} written again"
        for backends in self._state.dead.values():
            for backend in backends:
                if words(table.view(backend + 1), backend * stride)[2]:
                    table.write_word(backend, codec.flags_offset, 0)
                    yield f"{backend} is gone and served again"

    def _index(self) -> Iterator[str]:
        """Every backend hangs in the chain of its address, and nothing else does."""
        codec, table, index = self._codec, self._tables.backends, self._tables.backend_index
        unlinked = self._all_backends()
        foreign, cut = [], []
        for at, head in index.items():
            before, here = NO_BACKEND, number(head)
            while here != NO_BACKEND:
                if not (here < len(unlinked) and unlinked[here]) or self._state.at_of(here) != at:
                    cut.append((at, before))
                    break
                unlinked[here] = 0
                before = here
                here = codec.backend_words(table.view(here + 1), here * table.stride)[1]
        for at, before in cut:
            if before == NO_BACKEND:
                foreign.append(at)
            else:
                table.write_word(before, codec.next_offset, NO_BACKEND)
            address, port = codec.endpoint(at)
            yield f"{address} port {port}: what followed is not ours, cut off"
        index.delete(foreign)
        backend = unlinked.find(1)
        while backend >= 0:
            at = self._state.at_of(backend)
            self._state.chains.link(backend, at)
            self._state.note_linked((at,))
            address, port = codec.endpoint(at)
            yield f"{address} port {port} linked again"
            backend = unlinked.find(1, backend + 1)

    def _all_backends(self) -> bytearray:
        """A byte for each backend id: 1 when it must be in the index."""
        known = bytearray(self._tables.backends.max_entries)
        held = [record.backend_ids for record in self._state.records.values()]
        held += (orphan.backend_ids for orphan in self._state.orphans.values())
        for backend in chain.from_iterable(held):
            known[backend] = 1
        for backends in self._state.dead.values():
            for backend in backends:
                known[backend] = 1
        return known


def _differences(
    table: HashTable, wanted: dict[bytes, bytes]
) -> tuple[list[tuple[bytes, bytes]], list[bytes]]:
    """Entries to write, and keys to delete, so that the table holds what is wanted."""
    foreign, seen, wrong = [], set(), []
    for key, value in table.items():
        right = wanted.get(key)
        if right is None:
            foreign.append(key)
            continue
        seen.add(key)
        if right != value:
            wrong.append((key, right))
    if len(seen) < len(wanted):
        wrong += [(key, value) for key, value in wanted.items() if key not in seen]
    return wrong, foreign


def _summary(kind: str, sentences: Iterator[str]) -> Iterator[str]:
    """Name the first few; carry out and count the others."""
    count = 0
    for sentence in sentences:
        count += 1
        if count <= SENTENCES_MAX:
            yield f"{kind} {sentence}"
    if count > SENTENCES_MAX:
        yield f"{kind}: {count - SENTENCES_MAX} more like these"
