"""Chains of backends that answer from the same address and port, as programs walk them.

The index names the first, each backend the next. A program walks BACKEND_CHAIN_MAX of them, and a
flow opened while there were no more is found by no other way: so a backend among the first stays
among them, and what a longer chain gets is put at its end. Reads and writes the kernel's maps
alone.
"""

from __future__ import annotations

from ebpf_svc.dataplane.ebpf.codec import Codec, number
from ebpf_svc.dataplane.ebpf.constants import BACKEND_CHAIN_MAX, NO_BACKEND
from ebpf_svc.dataplane.ebpf.tables import FamilyTables


class Chains:
    """The chains of one family."""

    def __init__(self, codec: Codec, tables: FamilyTables) -> None:
        self._codec, self._backends, self._index = codec, tables.backends, tables.backend_index

    def walk(self, at: bytes) -> list[int]:
        """The backends with this `at`, in the order programs walk them."""
        head = self._index.lookup(at)
        chain: dict[int, None] = {}
        following = number(head) if head else NO_BACKEND
        # What somebody else wrote may bite its tail.
        while following != NO_BACKEND and following not in chain:
            chain[following] = None
            following = self._words(following)[1]
        return list(chain)

    def flags(self, backend: int) -> int:
        """What a backend is; 0 = a tombstone."""
        return self._words(backend)[2]

    def link(self, backend: int, at: bytes) -> None:
        """Put a backend into the chain of its address."""
        chain = self.walk(at)
        if len(chain) < BACKEND_CHAIN_MAX:
            following = chain[0] if chain else NO_BACKEND
            self._backends.write_word(backend, self._codec.next_offset, following)
            self._index.update([(at, self._codec.word(backend))])
        else:
            self._backends.write_word(backend, self._codec.next_offset, NO_BACKEND)
            self._backends.write_word(chain[-1], self._codec.next_offset, backend)

    def unlink(self, backend: int, at: bytes) -> None:
        """Take a backend out of its chain; its `next` stays for programs that are there now."""
        following = self._words(backend)[1]
        chain = self.walk(at)
        if backend not in chain:
            return  # it never got into the index
        place = chain.index(backend)
        if place:
            self._backends.write_word(chain[place - 1], self._codec.next_offset, following)
        elif following != NO_BACKEND:
            self._index.update([(at, self._codec.word(following))])
        else:
            self._index.delete([at])

    def _words(self, backend: int) -> tuple[int, int, int]:
        table = self._backends
        return self._codec.backend_words(table.view(backend + 1), backend * table.stride)
