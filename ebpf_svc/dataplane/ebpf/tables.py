"""The maps of one agent: created or taken over by their pins, checked, typed for use.

Pins live in `<bpffs>/ebpf-svc/v<LAYOUT_VERSION>/`; per-family maps carry the family in their name.
The digest of each family's layouts is pinned before any map, so a crash half-way leaves either
nothing to trust or maps of a known layout. Decides nothing about content.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import constants, options
from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape
from ebpf_svc.dataplane.ebpf.layout import Layout
from ebpf_svc.dataplane.ebpf.table import ArrayTable, HashTable, PerCpuArray, Table
from ebpf_svc.errors import DataplaneError, LayoutMismatch
from ebpf_svc.host import bpf, mounts
from ebpf_svc.host.bpf import MapType
from ebpf_svc.model.net import Family

SOURCE_RANGE_ENTRIES = 65_536
FRAGMENT_ENTRIES = 8_192
"""Datagrams whose later fragments may still come, each family."""
HELD_ENTRIES = 512
"""Fragments that came before the first of their datagram, each family: 0.8 MB."""
REVERSE_SHARE = 16
"""Without the fast path: one flow in so many may be of a crowded endpoint, or of a port that
clashes."""
LINK_ENTRIES = 16_384
"""Devices of a node the fast path may use."""
UDP_SOCKET_ENTRIES = 65_536
COUNTED_SERVICES = 16_384
"""Service ports counted one by one, each family: every CPU has all the counters, 24 bytes each.
Ids are dense, so only what a node has beyond that many goes uncounted."""

EVENT_RING_BYTES = 1 << 18
"""Room for what happens between two looks of who monitors: 4,000 events, each family."""

SHARED = frozenset({"slots", "settings", "drops", "udp_sockets", "monitor", "xdp_next"})
"""Maps both families use; all others exist once a family."""

_DIRECTORY = "ebpf-svc"
_DIGEST = "layout"
_NEW = "new-"  # a dot in a name is refused by the BPF file system


def max_entries(name: str, settings: EbpfSettings) -> int:
    """How large the map of that C name is made."""
    return {
        "frontends": settings.frontend_entries,
        "backend_index": settings.backend_entries,
        "backends": settings.backend_entries,
        "slots": settings.slot_entries,
        "flows": settings.flow_entries,
        "affinity": settings.affinity_entries,
        "source_ranges": SOURCE_RANGE_ENTRIES,
        "fragments": FRAGMENT_ENTRIES,
        "held": HELD_ENTRIES,
        "holding": 1,
        "udp_sockets": UDP_SOCKET_ENTRIES,
        "sockets": 0,
        "reverse": settings.flow_entries // (1 if settings.fast_path else REVERSE_SHARE),
        "direct": 1 + constants.DIRECT_NOTES,
        "links": LINK_ENTRIES
        if settings.fast_path or options.translates_host_packets(settings)
        else 1,
        "service_counters": min(settings.frontend_entries, COUNTED_SERVICES),
        "openings": 1,
        "settings": 1,
        "xdp_next": 1,
        "drops": len(constants.Drop),
        "monitor": 1,
        "events": EVENT_RING_BYTES,
    }[name]


def pin_dir(settings: EbpfSettings) -> Path:
    """Where this version's pins are."""
    return settings.bpffs / _DIRECTORY / f"v{constants.LAYOUT_VERSION}"


def remove_pins(settings: EbpfSettings) -> bool:
    """Unlink every pin of ours, of any version; False when there was none.

    Maps live on as long as an attached program uses them: detach first. A BPF file system that
    `Tables.open` had to mount goes too, once nobody pins anything there.
    """
    top = settings.bpffs / _DIRECTORY
    if not mounts.is_on_bpffs(settings.bpffs):
        return False
    found = top.is_dir()
    if found:
        _unpin_tree(top)
    mounts.release_bpffs(settings.bpffs)
    return found


def _unpin_tree(top: Path) -> None:
    for folder, _, names in os.walk(top, topdown=False):
        for name in names:
            Path(folder, name).unlink(missing_ok=True)
        Path(folder).rmdir()


@dataclass(frozen=True, slots=True)
class FamilyTables:
    """The maps of one family."""

    frontends: HashTable
    backend_index: HashTable
    backends: ArrayTable
    flows: HashTable
    affinity: HashTable
    source_ranges: HashTable
    fragments: HashTable
    held: HashTable
    holding: PerCpuArray
    reverse: HashTable
    direct: ArrayTable
    links: HashTable
    openings: PerCpuArray
    service_counters: PerCpuArray
    sockets: Table
    """Socket storage: the kernel cannot list it."""
    events: Table
    """A ring: who monitors reads it."""


class Tables:
    """All maps, open. `open` makes one; `close` gives the descriptors back and leaves the pins."""

    def __init__(
        self, tables: Mapping[str, Table], digests: Mapping[Family, bytes] | None = None
    ) -> None:
        """Take open maps by pin name; without the digests of their layouts none is pinned again."""
        self._tables = dict(tables)
        self._digests = digests or {}
        self.family: dict[Family, FamilyTables] = {
            family: FamilyTables(
                *(tables[_pin_name(name, family)] for name in FamilyTables.__slots__)  # type: ignore[arg-type]
            )
            for family in Family
            if _pin_name("frontends", family) in tables
        }
        self.slots: ArrayTable = tables["slots"]  # type: ignore[assignment]
        self.settings: HashTable = tables["settings"]  # type: ignore[assignment]
        self.drops: PerCpuArray = tables["drops"]  # type: ignore[assignment]
        self.xdp_next: Table = tables["xdp_next"]
        self.udp_sockets: HashTable = tables["udp_sockets"]  # type: ignore[assignment]
        self.monitor: ArrayTable = tables["monitor"]  # type: ignore[assignment]

    @classmethod
    def open(cls, settings: EbpfSettings, artifacts: Mapping[Family, Artifact]) -> Tables:
        """Create or take over every map the artifacts need.

        A map of another size is made anew and its entries carried over; arrays only grow.

        Raises:
            LayoutMismatch: the pins were left by a version with other layouts.
            DataplaneError: the BPF file system is not there, or a map cannot be made.
        """
        directory = pin_dir(settings)
        digests = {family: artifact.layout_digest() for family, artifact in artifacts.items()}
        bpf.lift_memory_limit()
        try:
            mounts.ensure_bpffs(settings.bpffs)
            _prepare(directory, digests)
        except OSError as error:
            raise DataplaneError(f"cannot pin maps in {directory}: {error}") from error
        with contextlib.ExitStack() as undo:
            tables: dict[str, Table] = {}
            for family, artifact in artifacts.items():
                for name, shape in artifact.maps.items():
                    pin_name = _pin_name(name, family)
                    if pin_name not in tables:
                        size = max_entries(name, settings)
                        table = _open_one(directory / pin_name, shape, size)
                        undo.callback(table.close)
                        tables[pin_name] = table
            opened = cls(tables, digests)
            undo.pop_all()
        # Maps of another layout cannot be read any more. Programs of that version which are still
        # attached keep theirs until they are replaced.
        for other in directory.parent.iterdir():
            if other != directory:
                _unpin_tree(other)
        return opened

    @classmethod
    def look(cls, settings: EbpfSettings, artifacts: Mapping[Family, Artifact]) -> Tables | None:
        """Open the maps an agent has pinned, of whatever size, and change nothing.

        Returns:
            None when they are not all there.

        Raises:
            LayoutMismatch: the pins were left by a version with other layouts.
            OSError: the kernel does not give them.
        """
        directory = pin_dir(settings)
        with contextlib.ExitStack() as undo:
            tables: dict[str, Table] = {}
            for family, artifact in artifacts.items():
                for name, shape in artifact.maps.items():
                    path = directory / _pin_name(name, family)
                    if path.name in tables:
                        continue
                    try:
                        fd = bpf.get_pinned(path)
                    except FileNotFoundError:
                        return None
                    try:
                        _verify(fd, path, shape)
                        table = _typed(path.name, fd, *_layouts(shape))
                    except BaseException:
                        os.close(fd)
                        raise
                    undo.callback(table.close)
                    tables[path.name] = table
            found = cls(tables)
            undo.pop_all()
            return found

    def restore_pins(self, settings: EbpfSettings) -> list[str]:
        """Pin again what is not pinned any more: somebody unmounted the BPF file system, or
        removed files. Programs lose nothing, the next agent would.

        Returns:
            a sentence when anything was missing.

        Raises:
            OSError: the BPF file system takes no pins.
        """
        directory = pin_dir(settings)
        names = [f"{_DIGEST}{int(family)}" for family in self._digests]
        missing = [name for name in (*names, *self._tables) if not (directory / name).exists()]
        if not missing or not self._digests:
            return []
        mounts.ensure_bpffs(settings.bpffs)
        _prepare(directory, self._digests)
        for name, table in self._tables.items():
            if not (directory / name).exists():
                bpf.pin(table.fd, directory / name)
        return [f"{len(missing)} maps pinned again in {directory}"]

    @property
    def writes(self) -> int:
        """Entries put or deleted since `open`, all maps together."""
        return sum(table.writes for table in self._tables.values())

    def writes_by_table(self) -> dict[str, int]:
        """The same by pin name; maps without writes are left out."""
        return {name: table.writes for name, table in self._tables.items() if table.writes}

    def fds(self, family: Family) -> dict[str, int]:
        """C map name -> descriptor, to relocate that family's programs with."""
        names = {*FamilyTables.__slots__, *SHARED}
        return {name: self._tables[_pin_name(name, family)].fd for name in names}

    def close(self) -> None:
        """Give back descriptors and mappings; the kernel keeps the maps by their pins."""
        for table in self._tables.values():
            table.close()


def _pin_name(name: str, family: Family) -> str:
    return name if name in SHARED else f"{name}{int(family)}"


def _prepare(directory: Path, digests: Mapping[Family, bytes]) -> None:
    """Make the directory fit for these layouts: digests first, leftovers of a crash out."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(f"{_NEW}*"):
        path.unlink()
    for family, digest in digests.items():
        path = directory / f"{_DIGEST}{int(family)}"
        if path.exists():
            fd = bpf.get_pinned(path)
            try:
                found = bpf.lookup(fd, bytes(4), len(digest)) if _is_digest(fd) else None
            finally:
                os.close(fd)
            if found == digest:
                continue
            if found is not None and any(found):
                raise LayoutMismatch(
                    str(directory), kernel=found.hex()[:16], python=digest.hex()[:16]
                )
        # Without a digest nothing says what these are: no run got as far as using them.
        for orphan in directory.iterdir():
            if orphan.name.endswith(str(int(family))):
                orphan.unlink()
        fd = bpf.map_create(
            MapType.ARRAY, key_size=4, value_size=len(digest), max_entries=1, name="esvc_layout"
        )
        try:
            bpf.update(fd, bytes(4), digest)
            bpf.pin(fd, path)
        finally:
            os.close(fd)


def _is_digest(fd: int) -> bool:
    facts = bpf.map_facts(fd)
    return facts.type == MapType.ARRAY and facts.value_size == 32


def _open_one(path: Path, shape: MapShape, size: int) -> Table:
    key = Layout.from_desc(shape.key_desc, shape.key_size, f"{path.name}_key")
    value = Layout.from_desc(shape.value_desc, shape.value_size, f"{path.name}_value")
    fd = -1
    try:
        try:
            fd = bpf.get_pinned(path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            fd = _create(path, shape, size)
            bpf.pin(fd, path)
        else:
            _verify(fd, path, shape)
            fd = _resized(fd, path, shape, size)
        return _typed(path.name, fd, key, value)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise DataplaneError(f"map {path}: {error}") from error
    except LayoutMismatch:
        os.close(fd)
        raise


def _create(path: Path, shape: MapShape, size: int) -> int:
    return bpf.map_create(
        shape.type,
        key_size=shape.key_size,
        value_size=shape.value_size,
        max_entries=size,
        flags=shape.flags,
        name=f"esvc_{path.name.removeprefix(_NEW)}",
    )


def _verify(fd: int, path: Path, shape: MapShape) -> None:
    facts = bpf.map_facts(fd)
    kernel = (facts.type, facts.flags, facts.key_size, facts.value_size)
    python = (shape.type, shape.flags, shape.key_size, shape.value_size)
    if kernel != python:
        raise LayoutMismatch(path.name, kernel=kernel, python=python)


def _resized(fd: int, path: Path, shape: MapShape, size: int) -> int:
    """Give a pinned map its new size, entries kept; the descriptor of the one now pinned.

    Programs attached before go on with the old map until they are replaced: what they add in
    between is lost, which for flows and affinity is what an eviction would do.
    """
    now = bpf.map_facts(fd).max_entries
    is_array = shape.type in (MapType.ARRAY, MapType.PERCPU_ARRAY)
    if now == size or (is_array and now > size):
        return fd
    new = _create(path, shape, size)
    try:
        copied = _typed(path.name, os.dup(new), *_layouts(shape)).copy_from(
            _typed(path.name, os.dup(fd), *_layouts(shape))
        )
        if not copied:  # it holds more than the new size: keep what works
            os.close(new)
            return fd
        temporary = path.with_name(_NEW + path.name)
        bpf.pin(new, temporary)
        temporary.rename(path)
    except BaseException:
        os.close(new)
        raise
    os.close(fd)
    return new


def _layouts(shape: MapShape) -> tuple[Layout, Layout]:
    return (
        Layout.from_desc(shape.key_desc, shape.key_size),
        Layout.from_desc(shape.value_desc, shape.value_size),
    )


def _typed(name: str, fd: int, key: Layout, value: Layout) -> Table:
    facts = bpf.map_facts(fd)
    if facts.type in (MapType.SK_STORAGE, MapType.RINGBUF, MapType.PROG_ARRAY):
        return Table(name, fd, key, value)
    if facts.type == MapType.PERCPU_ARRAY:
        return PerCpuArray(name, fd, key, value)
    if facts.type == MapType.ARRAY and facts.flags & bpf.MapFlag.MMAPABLE:
        return ArrayTable(name, fd, key, value)
    return HashTable(name, fd, key, value)
