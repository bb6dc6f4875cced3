"""Read a BPF ring buffer (BPF_MAP_TYPE_RINGBUF, Linux 5.8): its pages are mapped and walked here.

The kernel writes records and moves the producer's position; we read them and move the consumer's,
which is the one word of the ring that user space writes. A ring has one consumer.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_LENGTH = _DISCARDED - 1
_HEADER = struct.Struct("=II")
"""Length with two flags on top, and a page offset that only the kernel needs."""


class RingBuffer:
    """The consumer's side of one ring; `close` gives the mappings back, not the descriptor."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Map the ring.

        Args:
            fd: the map; poll(2) it for reading to wait for records.
            size_bytes: its `max_entries`.

        Raises:
            OSError: it cannot be mapped.
        """
        page = mmap.PAGESIZE
        self._mask = size_bytes - 1
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            # The data is mapped twice in a row: a record that wraps reads as one piece.
            self._shared = mmap.mmap(
                fd, page + 2 * size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except BaseException:
            self._consumer.close()
            raise
        # One load or store of eight bytes each, so nobody sees half a position.
        self._consumed = memoryview(self._consumer)[:8].cast("Q")
        self._produced = memoryview(self._shared)[:8].cast("Q")
        self._data_at = page

    def read(self) -> Iterator[bytes]:
        """Every record that is complete, oldest first; its place is free once the next is asked
        for.
        """
        position = self._consumed[0]
        while position < self._produced[0]:
            at = self._data_at + (position & self._mask)
            word, _ = _HEADER.unpack_from(self._shared, at)
            if word & _BUSY:  # a program is still writing it
                return
            length = word & _LENGTH
            if not word & _DISCARDED:
                start = at + _HEADER.size
                yield self._shared[start : start + length]
            position += (length + _HEADER.size + 7) & ~7
            self._consumed[0] = position

    def skip(self) -> int:
        """Throw away what is there; returns how many records."""
        return sum(1 for _ in self.read())

    def close(self) -> None:
        """Unmap; what was not read stays for the next consumer."""
        self._consumed.release()
        self._produced.release()
        self._consumer.close()
        self._shared.close()
