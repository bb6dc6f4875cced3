"""The bpf(2) system call: maps, pins and BTF, by numbers of uapi/linux/bpf.h.

Thin and without state: no library, no compiler, nothing of the project's tables. Programs are in
`bpf_prog`. File descriptors returned here belong to the caller. Every failure is an OSError that
names the command; ENOENT of a look-up or delete is an answer, not a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_NR_BPF = _NUMBERS.get(platform.machine(), 0)

NAME_SIZE = 16
"""Kernel object names, with the closing zero."""


class Command(IntEnum):
    """`enum bpf_cmd`."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_TEST_RUN = 10
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    BTF_LOAD = 18
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27


class MapType(IntEnum):
    """`enum bpf_map_type`, those in use."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    SK_STORAGE = 24
    RINGBUF = 27


class MapFlag(IntEnum):
    """Flags of map_create."""

    NO_PREALLOC = 1
    MMAPABLE = 1 << 10


ANY, NOEXIST, EXIST = 0, 1, 2
"""Flags of an update: create or replace, create only, replace only."""


class Attr:
    """One `union bpf_attr`, kept alive with everything it points at."""

    def __init__(self, layout: str, *values: int | bytes) -> None:
        self.buffer = bytearray(struct.pack("=" + layout, *values))

    def call(self, command: Command) -> int:
        """Issue the command; the kernel may write results into `buffer`.

        Raises:
            OSError: with the command's name as file name.
        """
        view = (ctypes.c_char * len(self.buffer)).from_buffer(self.buffer)
        result = _libc.syscall(_NR_BPF, int(command), view, len(self.buffer))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), command.name)
        return int(result)

    def u32(self, offset: int) -> int:
        """A number the kernel wrote."""
        return int(struct.unpack_from("=I", self.buffer, offset)[0])


def lift_memory_limit() -> None:
    """Before 5.11 maps and programs count as locked memory, and those of all processes of one user
    against the limit of the one that makes the next: beside an agent even a small map is refused.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(
            resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )


def address_of(data: bytes | bytearray | None) -> int:
    """The address of `data`, which the caller keeps alive during the call; 0 for None."""
    if data is None:
        return 0
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) if data else 0


@dataclass(frozen=True, slots=True)
class MapFacts:
    """What the kernel says a map is."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


def map_create(
    map_type: int,
    *,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: int = 0,
    name: str = "",
) -> int:
    """Create a map; socket storage gets the BTF the kernel insists on.

    Returns:
        its file descriptor.
    """
    btf_fd, key_type, value_type = -1, 0, 0
    if map_type == MapType.SK_STORAGE:
        btf_fd = btf_load(_storage_btf(value_size))
        key_type, value_type = _STORAGE_KEY, _STORAGE_VALUE
    try:
        return Attr(
            "7I16s5I",
            *(map_type, key_size, value_size, max_entries, flags, 0, 0),
            name.encode()[: NAME_SIZE - 1],
            *(0, max(btf_fd, 0), key_type, value_type, 0),
        ).call(Command.MAP_CREATE)
    finally:
        if btf_fd >= 0:
            os.close(btf_fd)


def map_facts(fd: int) -> MapFacts:
    """Ask the kernel what map `fd` is."""
    info = bytearray(88)
    Attr("2IQ", fd, len(info), address_of(info)).call(Command.OBJ_GET_INFO_BY_FD)
    map_type, map_id, key_size, value_size, entries, flags, name = struct.unpack_from(
        "=6I16s", info
    )
    text = name.split(b"\0")[0].decode()
    return MapFacts(map_type, map_id, key_size, value_size, entries, flags, text)


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Read one value; None when the key is missing. Per-CPU maps fill `value_size` for all CPUs."""
    value = bytearray(value_size)
    try:
        Attr("2I3Q", fd, 0, address_of(key), address_of(value), 0).call(Command.MAP_LOOKUP_ELEM)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return bytes(value)


def update(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Write one value."""
    Attr("2I3Q", fd, 0, address_of(key), address_of(value), flags).call(Command.MAP_UPDATE_ELEM)


def delete(fd: int, key: bytes) -> bool:
    """Delete one key; False when it was missing."""
    try:
        Attr("2I3Q", fd, 0, address_of(key), 0, 0).call(Command.MAP_DELETE_ELEM)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key` in the map's own order (None: the first); None at the end."""
    following = bytearray(key_size)
    try:
        Attr("2I3Q", fd, 0, address_of(key), address_of(following), 0).call(
            Command.MAP_GET_NEXT_KEY
        )
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return bytes(following)


_NO_BATCH = {errno.EINVAL, errno.EOPNOTSUPP, 524}  # 524: ENOTSUPP, which has no name in user space


def has_no_batch(error: OSError) -> bool:
    """Whether the kernel answered that this map type has no such batch command."""
    return error.errno in _NO_BATCH


def _batch(command: Command, fd: int, keys: bytes, values: bytes | None, count: int) -> int:
    """Run a writing batch command.

    Returns:
        how many entries were done before the first that failed; `count` when none did.

    Raises:
        OSError: nothing can be said about progress, or the very first entry failed.
    """
    attr = Attr("4Q2I2Q", 0, 0, address_of(keys), address_of(values), count, fd, 0, 0)
    try:
        attr.call(command)
    except OSError as error:
        done = attr.u32(32)
        if 0 < done < count and error.errno != errno.EFAULT:
            return done
        raise
    return count


def update_batch(fd: int, keys: bytes, values: bytes, count: int) -> int:
    """Write `count` entries laid end to end; returns how many were written before a failure."""
    return _batch(Command.MAP_UPDATE_BATCH, fd, keys, values, count)


def delete_batch(fd: int, keys: bytes, count: int) -> int:
    """Delete `count` keys laid end to end; returns how many went before a failure."""
    return _batch(Command.MAP_DELETE_BATCH, fd, keys, None, count)


def lookup_batches(
    fd: int, *, key_size: int, value_size: int, chunk: int = 16384
) -> Iterator[tuple[bytes, bytes, int]]:
    """Read a whole map in batches: (keys end to end, values end to end, count).

    Entries added or removed meanwhile may or may not be seen. A hash bucket larger than the chunk
    makes the kernel answer ENOSPC, so the chunk grows.

    Raises:
        OSError: `has_no_batch` says when to fall back to `next_key`.
    """
    # The cursor is opaque: four bytes for hashes, a key for arrays and tries.
    cursor_size = max(key_size, 4)
    cursor: bytearray | None = None
    while True:
        following = bytearray(cursor_size)
        keys, values = bytearray(chunk * key_size), bytearray(chunk * value_size)
        attr = Attr(
            "4Q2I2Q",
            *(address_of(cursor), address_of(following), address_of(keys), address_of(values)),
            *(chunk, fd, 0, 0),
        )
        ended = False
        try:
            attr.call(Command.MAP_LOOKUP_BATCH)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                chunk *= 2
                continue
            if error.errno != errno.ENOENT:
                raise
            ended = True
        count = attr.u32(32)
        if count:
            yield bytes(keys[: count * key_size]), bytes(values[: count * value_size]), count
        if ended:
            return
        cursor = following


def pin(fd: int, path: Path) -> None:
    """Give the object a name in a BPF file system; EEXIST when the name is taken."""
    name = os.fsencode(path) + b"\0"
    Attr("Q2I", address_of(name), fd, 0).call(Command.OBJ_PIN)


def get_pinned(path: Path) -> int:
    """Open a pinned object; the caller closes the descriptor."""
    name = os.fsencode(path) + b"\0"
    return Attr("Q2I", address_of(name), 0, 0).call(Command.OBJ_GET)


def map_by_id(map_id: int) -> int:
    """Open a map by its id."""
    return Attr("3I", map_id, 0, 0).call(Command.MAP_GET_FD_BY_ID)


def possible_cpus() -> int:
    """How many values a per-CPU map holds per key."""
    count = 0
    for part in Path("/sys/devices/system/cpu/possible").read_text().strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


_STORAGE_KEY, _STORAGE_VALUE = 1, 4


def _storage_btf(value_size: int) -> bytes:
    """The least BTF socket storage accepts: an int key and a struct of `value_size` bytes."""
    strings = b"\0int\0char\0v\0data\0"
    kind_int, kind_array, kind_struct = 1 << 24, 3 << 24, (4 << 24) | 1
    types = (
        struct.pack("=4I", 1, kind_int, 4, (1 << 24) | 32)  # 1: int
        + struct.pack("=4I", 5, kind_int, 1, 8)  # 2: char
        + struct.pack("=6I", 0, kind_array, 0, 2, 1, value_size)  # 3: char[value_size]
        + struct.pack("=6I", 10, kind_struct, value_size, 12, 3, 0)  # 4: struct v { char data[]; }
    )
    header = struct.pack("=HBB5I", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings


def btf_load(blob: bytes) -> int:
    """Load type information; the caller closes the descriptor."""
    return Attr("2Q3I", address_of(blob), 0, len(blob), 0, 0).call(Command.BTF_LOAD)
