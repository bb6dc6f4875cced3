"""Maps in this process's memory, with the layouts of bpf/lib/types.h: for tests without root.

They count and fail as the kernel's do. That the layouts are the C's own is for the packet ring to
show, which uses real maps.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ebpf_svc.dataplane.ebpf.entries import FrontendValue
from ebpf_svc.dataplane.ebpf.layout import Layout
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.model.net import Family


class MemoryHash:
    """A hash, LRU hash or trie."""

    def __init__(self, name: str, key: Layout, value: Layout, max_entries: int) -> None:
        self.name, self.key, self.value, self.max_entries = name, key, value, max_entries
        self.writes = 0
        self.entries: dict[bytes, bytes] = {}
        self.journal: list[tuple[str, bytes]] = []
        """Verb and key of each write, oldest first."""

    def lookup(self, key: bytes) -> bytes | None:
        return self.entries.get(key)

    def update(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        for key, value in items:
            assert len(key) == self.key.size and len(value) == self.value.size
            if key not in self.entries and len(self.entries) >= self.max_entries:
                raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), self.name)
            self.entries[key] = value
            self.journal.append(("put", key))
            self.writes += 1

    def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if self.entries.pop(key, None) is not None:
                self.journal.append(("delete", key))
                self.writes += 1

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(list(self.entries.items()))

    def chunks(self) -> Iterator[tuple[bytes, bytes, int]]:
        items = list(self.entries.items())
        for start in range(0, len(items), 3):
            some = items[start : start + 3]
            yield b"".join(key for key, _ in some), b"".join(value for _, value in some), len(some)

    def close(self) -> None:
        pass


class MemoryArray:
    """A mapped array."""

    def __init__(self, name: str, value: Layout, max_entries: int) -> None:
        self.name, self.value, self.max_entries = name, value, max_entries
        self.stride = -(-value.size // 8) * 8
        self.writes = 0
        self._data = bytearray(self.stride * max_entries)

    def write(self, first: int, data: bytes) -> None:
        size = self.value.size
        for index, at in enumerate(range(0, len(data), size), first):
            self._check(index)
            self._data[index * self.stride : index * self.stride + size] = data[at : at + size]
            self.writes += 1

    def write_word(self, index: int, offset: int, word: int) -> None:
        self._check(index)
        struct.pack_into("=I", self._data, index * self.stride + offset, word)
        self.writes += 1

    def read(self, first: int, count: int) -> bytes:
        starts = range(first * self.stride, (first + count) * self.stride, self.stride)
        return b"".join(bytes(self._data[at : at + self.value.size]) for at in starts)

    def view(self, count: int) -> memoryview:
        self._check(count - 1)
        return memoryview(self._data)[: count * self.stride]

    def _check(self, index: int) -> None:
        if not 0 <= index < self.max_entries:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), self.name)

    def close(self) -> None:
        pass


class MemoryCounters:
    """A per-CPU array, summed already."""

    def __init__(self, name: str, value: Layout, max_entries: int) -> None:
        self.name, self.value, self.max_entries = name, value, max_entries
        self.writes = 0
        self.counts: dict[int, tuple[int, ...]] = {}
        """Elements that are not zero."""

    def totals(self, wanted: Collection[int]) -> dict[int, tuple[int, ...]]:
        return {index: self.counts[index] for index in wanted if index in self.counts}

    def clear(self, indexes: Collection[int]) -> None:
        for index in indexes:
            self.counts.pop(index, None)

    def close(self) -> None:
        pass


_BITS = {
    "8": "unsigned char",
    "16": "unsigned short",
    "32": "unsigned int",
    "64": "unsigned long long",
}
_BYTES = {
    "unsigned char": 1,
    "unsigned short": 2,
    "unsigned int": 4,
    "unsigned long long": 8,
}


def _numbers(text: str) -> list[Any]:
    """`name:bits` each, as BCC describes fields."""
    return [[name, _BITS[bits]] for name, bits in (word.split(":") for word in text.split())]


def _struct(fields: list[Any]) -> list[Any]:
    return ["struct", fields, "struct_packed"]


def _layout(fields: list[Any] | str) -> Layout:
    if fields == "__u32":
        return Layout.from_desc('"unsigned int"', 4)
    if fields == "__u64":
        return Layout.from_desc('"unsigned long long"', 8)
    assert isinstance(fields, list)
    return Layout.from_desc(json.dumps(_struct(fields)), _size(fields))


def _size(fields: list[Any]) -> int:
    return sum(
        (_size(of[1]) if isinstance(of, list) else _BYTES[of]) * (count[0][0] if count else 1)
        for _, of, *count in fields
    )


def memory_tables(
    *,
    families: Sequence[Family] = tuple(Family),
    frontends: int = 64,
    backends: int = 64,
    slots: int = 65_536,
    source_ranges: int = 64,
) -> Tables:
    """Empty maps of these sizes."""
    word, cookie = _layout("__u32"), _layout("__u64")
    given = _layout(_numbers("backend_id:32 family:32"))
    tables: dict[str, MemoryHash | MemoryArray | MemoryCounters] = {
        "slots": MemoryArray("slots", word, slots),
        "udp_sockets": MemoryHash("udp_sockets", cookie, given, 64),
        "settings": MemoryHash("settings", word, word, 1),
        "xdp_next": MemoryHash("xdp_next", word, word, 1),
        "drops": MemoryHash("drops", word, word, 1),
        "monitor": MemoryHash("monitor", word, word, 1),
    }
    for family in families:
        number = int(family)
        words = 1 if family is Family.V4 else 4
        addr = [["word", "unsigned int", [words]]]
        l4_addr = [["addr", _struct(addr)], *_numbers("port:16 proto:8 pad:8")]
        at = _layout(l4_addr)
        frontend = _layout(_numbers(" ".join(f"{name}:32" for name in FrontendValue._fields)))
        backend = _layout([["at", _struct(l4_addr)], *_numbers("service:32 next:32 flags:32")])
        ranges = _layout([*_numbers("prefix_bits:32 ranges:32"), ["addr", _struct(addr)]])
        flow_key = _layout(
            [
                ["client", _struct(addr)],
                *_numbers("service:32 client_port:16 proto:8 second:8"),
            ]
        )
        flow_value = _layout(
            [
                ["frontend", _struct(l4_addr)],
                ["backend", _struct(l4_addr)],
                *_numbers("addr_diff:32 port_diff:32 backend_id:32 seen_s:32"),
                *_numbers("state:8 flags:8 nat_port:16"),
                ["nat", _struct(addr)],
                *_numbers("client_link:32 backend_link:32"),
            ]
        )
        counters = _layout(_numbers("connections:64 packets:64 bytes:64"))
        for name, key, value, size in (
            ("frontends", at, frontend, frontends),
            ("backend_index", at, word, backends),
            ("source_ranges", ranges, word, source_ranges),
            ("flows", flow_key, flow_value, 1024),
            ("affinity", word, word, 1),
            ("fragments", word, word, 1),
            ("held", word, word, 1),
            ("holding", word, word, 1),
            ("reverse", word, word, 1),
            ("direct", word, word, 1),
            ("links", word, word, 1),
            ("openings", word, word, 1),
            ("sockets", word, word, 1),
            ("events", word, word, 1),
        ):
            tables[f"{name}{number}"] = MemoryHash(f"{name}{number}", key, value, size)
        tables[f"backends{number}"] = MemoryArray(f"backends{number}", backend, backends)
        tables[f"service_counters{number}"] = MemoryCounters(
            f"service_counters{number}", counters, frontends
        )
    return Tables(tables)  # type: ignore[arg-type]
