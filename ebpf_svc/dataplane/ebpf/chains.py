"""Chains of backends that answer from the same address and port, as programs walk them.

The index names the first, each backend the next. Reads and writes the kernel's maps alone.
"""

from __future__ import annotations

from ebpf_svc.dataplane.ebpf.codec import Codec, number
from ebpf_svc.dataplane.ebpf.constants import BACKEND_CHAIN_MAX, NO_BACKEND
from ebpf_svc.dataplane.ebpf.tables import FamilyTables
from ebpf_svc.errors import DataplaneError


class ChainFullError(DataplaneError):
    """The egress program would not walk a longer chain to its end; `at` is what its backends share.

    Not on the node's list of failures unless every link is in use: see `oldest_tombstone`.
    """

    def __init__(self, at: bytes, address: str, port: int) -> None:
        super().__init__(
            f"{BACKEND_CHAIN_MAX} service ports have endpoint {address} port {port} already"
        )
        self.at = at


class Chains:
    """The chains of one family."""

    def __init__(self, codec: Codec, tables: FamilyTables) -> None:
        self._codec, self._backends, self._index = codec, tables.backends, tables.backend_index

    def walk(self, at: bytes) -> list[int]:
        """The backends with this `at`, in the order programs walk them."""
        head = self._index.lookup(at)
        chain: list[int] = []
        following = number(head) if head else NO_BACKEND
        while following != NO_BACKEND and len(chain) <= BACKEND_CHAIN_MAX:
            chain.append(following)
            following = self._words(following)[1]
        return chain

    def flags(self, backend: int) -> int:
        """What a backend is; 0 = a tombstone."""
        return self._words(backend)[2]

    def oldest_tombstone(self, at: bytes) -> tuple[int, int] | None:
        """The tombstone that has been in a chain longest, and its service: links go in in front."""
        for backend in reversed(self.walk(at)):
            service, _, flags = self._words(backend)
            if not flags:
                return backend, service
        return None

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
