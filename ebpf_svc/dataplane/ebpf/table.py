"""One open map, by kind: keyed tables, mapped arrays, per-CPU counters.

Each counts the entries it wrote. Errors of the kernel fly as OSError with the table's name.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence

from ebpf_svc.dataplane.ebpf.layout import Layout
from ebpf_svc.host import bpf

_BATCH = 16_384
_ONE_BY_ONE = 4
"""Up to this many entries single calls are as fast as a batch."""
_BLOCK_BYTES = 1 << 20
"""Of per-CPU values read at a time."""
_STEP_BYTES = 1 << 18
"""Mapped arrays grow by so much: a larger one is mapped anew each time."""


class Table:
    """A map: its descriptor, layouts and the count of entries written."""

    def __init__(self, name: str, fd: int, key: Layout, value: Layout) -> None:
        self.name, self.fd, self.key, self.value = name, fd, key, value
        self.max_entries = bpf.map_facts(fd).max_entries
        self.writes = 0

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def copy_from(self, old: Table) -> bool:
        """Take over the entries of a map of the same layout; both are closed.

        Returns:
            False when they do not all fit.
        """
        try:
            return self._copy(old)
        finally:
            self.close()
            old.close()

    def _copy(self, old: Table) -> bool:
        return True  # socket storage lives in the sockets: there is nothing to carry

    def _fail(self, error: OSError) -> OSError:
        return OSError(error.errno or 0, error.strerror, self.name)


class HashTable(Table):
    """A map of keys and values: hash, LRU hash, trie, or a small array."""

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        return bpf.lookup(self.fd, key, self.value.size)

    def update(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Write entries, in order.

        Raises:
            OSError: at the first entry that cannot be written, e.g. E2BIG when the map is full;
                those before it are written.
        """
        try:
            if len(items) <= _ONE_BY_ONE:
                self._update_singly(items)
                return
            for start in range(0, len(items), _BATCH):
                self._update_batch(items[start : start + _BATCH])
        except OSError as error:
            raise self._fail(error) from error

    def _update_singly(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        for key, value in items:
            bpf.update(self.fd, key, value)
            self.writes += 1

    def _update_batch(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        keys = b"".join([key for key, _ in items])
        values = b"".join([value for _, value in items])
        try:
            done = bpf.update_batch(self.fd, keys, values, len(items))
        except OSError as error:
            if not bpf.has_no_batch(error):
                raise
            done = 0
        self.writes += done
        if done < len(items):  # again from there, which also gives the true error
            self._update_singly(items[done:])

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete entries; keys that are missing are fine and not counted."""
        try:
            start = 0
            while len(keys) - start > _ONE_BY_ONE:
                chunk = keys[start : start + _BATCH]
                start += self._delete_batch(chunk)
            for key in keys[start:]:
                self.writes += bpf.delete(self.fd, key)
        except OSError as error:
            raise self._fail(error) from error

    def _delete_batch(self, keys: Sequence[bytes]) -> int:
        """Delete up to the first missing key, which is stepped over; how many are dealt with."""
        try:
            done = bpf.delete_batch(self.fd, b"".join(keys), len(keys))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return 1
            if not bpf.has_no_batch(error):
                raise
            self.writes += sum(bpf.delete(self.fd, key) for key in keys)
            return len(keys)
        self.writes += done
        return done if done == len(keys) else done + 1

    def chunks(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Read all, many entries at a time: keys end to end, values end to end, count."""
        started = False
        try:
            for chunk in bpf.lookup_batches(
                self.fd, key_size=self.key.size, value_size=self.value.size, chunk=_BATCH
            ):
                started = True
                yield chunk
        except OSError as error:
            if started or not bpf.has_no_batch(error):
                raise self._fail(error) from error
            yield from self._chunks_singly()

    def _chunks_singly(self) -> Iterator[tuple[bytes, bytes, int]]:
        seen: set[bytes] = set()  # a deleted key sends the kernel back to the start
        key = bpf.next_key(self.fd, None, self.key.size)
        while key is not None and key not in seen:
            seen.add(key)
            value = self.lookup(key)
            if value is not None:
                yield key, value, 1
            key = bpf.next_key(self.fd, key, self.key.size)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry, in no order; what changes meanwhile may or may not be seen."""
        for keys, values, _ in self.chunks():
            yield from zip(
                (key for (key,) in struct.iter_unpack(f"{self.key.size}s", keys)),
                (value for (value,) in struct.iter_unpack(f"{self.value.size}s", values)),
                strict=True,
            )

    def clear(self) -> None:
        """Delete every entry."""
        for keys, _, _ in list(self.chunks()):
            self.delete([key for (key,) in struct.iter_unpack(f"{self.key.size}s", keys)])

    def _copy(self, old: Table) -> bool:
        assert isinstance(old, HashTable)
        try:
            for keys, values, count in old.chunks():
                if bpf.update_batch(self.fd, keys, values, count) < count:
                    return False
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            return False
        return True


class ArrayTable(Table):
    """An array in the agent's own memory: reading and writing cost no system call.

    Elements lie `stride` bytes apart, their size rounded up to 8, as the kernel lays them. Only the
    part that is used is mapped, for the kernel counts every mapped page as the agent's memory.
    """

    def __init__(self, name: str, fd: int, key: Layout, value: Layout) -> None:
        super().__init__(name, fd, key, value)
        self.stride = -(-value.size // 8) * 8
        self._length = -(-self.stride * self.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        self._reach(0, 1)

    def write(self, first: int, data: bytes) -> None:
        """Write values laid end to end from index `first` on.

        A reader in the kernel sees each aligned 8 bytes either old or new, in no order.
        """
        size = self.value.size
        count = len(data) // size
        self._check(first, count)
        if size == 4:
            data = array("Q", memoryview(data).cast("I")).tobytes()
        elif size != self.stride:
            gap = bytes(self.stride - size)
            data = b"".join([data[at : at + size] + gap for at in range(0, len(data), size)])
        start = first * self.stride
        self._view[start : start + len(data)] = data
        self.writes += count

    def write_word(self, index: int, offset: int, word: int) -> None:
        """Write one 32-bit field of one value in a single store: a reader sees old or new."""
        self._check(index, 1)
        self._words[(index * self.stride + offset) // 4] = word
        self.writes += 1

    def read(self, first: int, count: int) -> bytes:
        """Read values, laid end to end."""
        self._check(first, count)
        size, stride = self.value.size, self.stride
        data = bytes(self._view[first * stride : (first + count) * stride])
        if size == stride:
            return data
        if size == 4:
            return array("I", memoryview(data).cast("I")[::2]).tobytes()
        return b"".join([data[at : at + size] for at in range(0, len(data), stride)])

    def view(self, count: int) -> memoryview:
        """The first `count` elements at least, writable, `stride` bytes an element; writes through
        it are not counted.
        """
        self._check(0, count)
        return self._view

    def _check(self, first: int, count: int) -> None:
        """Map what is asked for; raises OSError beyond the last element."""
        # The mapping's last page reaches beyond the last element.
        if first < 0 or first + count > self.max_entries:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), self.name)
        if (first + count) * self.stride > len(self._view):
            self._reach(first, count)

    def _reach(self, first: int, count: int) -> None:
        """Map from the beginning up to these elements. Views taken before stay good, as long as
        somebody has them.
        """
        wanted = -(-(first + count) * self.stride // _STEP_BYTES) * _STEP_BYTES
        length, access = min(wanted, self._length), mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(self.fd, length, mmap.MAP_SHARED, access)
        self._view = memoryview(self._map)
        self._words = self._view.cast("I")

    def _copy(self, old: Table) -> bool:
        assert isinstance(old, ArrayTable)
        if old.max_entries > self.max_entries:
            return False
        used = old.view(old.max_entries)
        self._check(0, old.max_entries)
        self._view[: len(used)] = used
        return True

    def close(self) -> None:
        """Give the descriptor and the mapping back; views taken must not be used any more."""
        if self.fd >= 0:
            self._words.release()
            self._view.release()
            self._map.close()
        super().close()


class PerCpuArray(Table):
    """Counters every CPU keeps for itself: elements of one or more 64-bit fields, indexed."""

    def sums(self) -> list[int]:
        """The one field of every element, summed over the CPUs."""
        totals = self.totals(range(self.max_entries))
        return [totals.get(index, (0,))[0] for index in range(self.max_entries)]

    def totals(self, wanted: Collection[int]) -> dict[int, tuple[int, ...]]:
        """The fields of these elements, summed over the CPUs; those all zero are left out.

        An index beyond the array is left out too.
        """
        found: dict[int, tuple[int, ...]] = {}
        fields = self.value.size // 8
        for index, data in self._counting(wanted):
            words = memoryview(data).cast("Q")
            found[index] = tuple(sum(words[field::fields]) for field in range(fields))
        return found

    def clear(self, indexes: Collection[int]) -> None:
        """Begin anew from zero. Not counted as writes: nothing of the plan changes."""
        try:
            for index, data in self._counting(indexes):
                bpf.update(self.fd, struct.pack("=I", index), bytes(len(data)))
        except OSError as error:
            raise self._fail(error) from error

    @property
    def _room(self) -> int:
        """Bytes of one element, all CPUs together."""
        return -(-self.value.size // 8) * 8 * bpf.possible_cpus()

    def _counting(self, wanted: Collection[int]) -> Iterator[tuple[int, bytes]]:
        """Those of the elements that are not zero, as the kernel lays them."""
        wanted = [index for index in wanted if index < self.max_entries]
        if not wanted:
            return
        room, end = self._room, max(wanted) + 1
        zero = bytes(room)
        try:
            # A look-up costs as much as several elements of a batch.
            if end > _ONE_BY_ONE * len(wanted):
                yield from self._singly(wanted, room)
                return
            chosen = set(wanted)
            for first, block in self._blocks(end, room):
                for at in range(0, len(block), room):
                    index = first + at // room
                    if index in chosen and (data := block[at : at + room]) != zero:
                        yield index, data
        except OSError as error:
            raise self._fail(error) from error

    def _blocks(self, end: int, room: int) -> Iterator[tuple[int, bytes]]:
        """The elements below `end`, many at a time: index of the first, data end to end."""
        first = 0
        chunk = max(1, min(end, _BLOCK_BYTES // room))
        try:
            for _, data, count in bpf.lookup_batches(
                self.fd, key_size=4, value_size=room, chunk=chunk
            ):
                yield first, data
                first += count
                if first >= end:
                    return
        except OSError as error:
            if first or not bpf.has_no_batch(error):
                raise
            yield from self._singly(range(end), room)

    def _singly(self, wanted: Iterable[int], room: int) -> Iterator[tuple[int, bytes]]:
        zero = bytes(room)
        for index in wanted:
            data = bpf.lookup(self.fd, struct.pack("=I", index), room)
            if data and data != zero:
                yield index, data

    def _copy(self, old: Table) -> bool:
        assert isinstance(old, PerCpuArray)
        for index, data in old._counting(range(min(self.max_entries, old.max_entries))):
            bpf.update(self.fd, struct.pack("=I", index), data)
        return True
