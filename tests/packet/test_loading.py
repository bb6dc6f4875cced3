"""From C to loaded programs and typed, pinned maps, on a BPF file system of the test's own."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ebpf_svc.bench.counts import counted_calls
from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import compiler, source, tables
from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.ebpf.programs import PROGRAMS, XDP_PROGRAM, Programs
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.errors import CompileError, DataplaneError, LayoutMismatch, UnsupportedHost
from ebpf_svc.host import bpf, bpf_prog, mounts, toolchain
from ebpf_svc.model.net import Family

pytestmark = pytest.mark.root

SMALL = {
    "flow_entries": 4096,
    "affinity_entries": 256,
    "frontend_entries": 1024,
    "backend_entries": 2048,
    "slot_entries": 8192,
}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[EbpfSettings]:
    """A BPF file system of its own, which `Tables.open` mounts and `remove_pins` unmounts."""
    made = EbpfSettings(bpffs=tmp_path / "bpf", cache_dir=tmp_path / "cache", **SMALL)
    yield made
    tables.remove_pins(made)
    assert not mounts.is_on_bpffs(made.bpffs)


@pytest.fixture
def opened(settings: EbpfSettings, compiled: dict[Family, Artifact]) -> Iterator[Tables]:
    open_tables = Tables.open(settings, compiled)
    yield open_tables
    open_tables.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def keys(count: int, *, size: int) -> list[bytes]:
    return [i.to_bytes(4, "little") + bytes(size - 4) for i in range(count)]


def test_every_program_of_both_families_passes_the_verifier(opened, compiled):
    """What the C has and what `programs.py` says it has are the same, and the kernel takes it; the
    driver's program is there when it is asked for.
    """
    programs = Programs.load(compiled, {family: opened.fds(family) for family in compiled})

    try:
        assert {(program.family, program.name) for program in programs} == {
            (family, name)
            for name, spec in PROGRAMS.items()
            for family in spec.attach_types
            if name != XDP_PROGRAM
        }
        for program in programs:
            facts = bpf_prog.facts(program.fd)
            assert facts.name == program.kernel_name == PROGRAMS[program.name].name(program.family)
    finally:
        programs.close()


def test_programs_hold_the_pinned_maps(opened, compiled, settings):
    """Relocation gives a program the agent's maps, not those of the compiling process."""
    programs = Programs.load(compiled, {family: opened.fds(family) for family in compiled})

    try:
        used = set(bpf_prog.facts(programs.fd(Family.V4, "pod_ingress")).map_ids)
    finally:
        programs.close()
    pinned = {path.name: _map_id(path) for path in tables.pin_dir(settings).iterdir()}
    assert used <= set(pinned.values())
    assert {pinned["frontends4"], pinned["slots"]} <= used
    assert pinned["frontends6"] not in used


def _map_id(path: Path) -> int:
    fd = bpf.get_pinned(path)
    try:
        return bpf.map_facts(fd).id
    finally:
        os.close(fd)


@pytest.mark.compiles
def test_second_start_compiles_nothing(tmp_path, monkeypatch):
    """A restart needs neither bcc nor headers nor LLVM."""
    unit = _tiny_unit("return 0;")
    first = compiler.obtain(list(Family), tmp_path, text=unit)
    monkeypatch.setattr(toolchain, "find_headers", lambda: pytest.fail("it compiled"))

    assert compiler.obtain(list(Family), tmp_path, text=unit) == first


@pytest.mark.compiles
def test_artifact_of_another_machine_serves_where_there_is_no_bcc(tmp_path, monkeypatch):
    """A node without compiler runs what one with a compiler made of the same sources."""
    unit = _tiny_unit("return 0;")
    made = compiler.obtain([Family.V4], tmp_path, text=unit)
    monkeypatch.setattr(toolchain, "bcc_version", lambda: None)

    assert compiler.obtain([Family.V4], tmp_path, text=unit) == made
    with pytest.raises(UnsupportedHost, match="apt-get install python3-bpfcc"):
        compiler.obtain([Family.V4], tmp_path, text=_tiny_unit("return 1;"))


@pytest.mark.compiles
def test_damaged_artifact_is_compiled_anew(tmp_path):
    """A file a full disk cut short costs one compile, no more."""
    unit = _tiny_unit("return 0;")
    made = compiler.obtain([Family.V4], tmp_path, text=unit)
    (path,) = tmp_path.glob("*.artifact")
    path.write_bytes(path.read_bytes()[:200])

    assert compiler.obtain([Family.V4], tmp_path, text=unit) == made
    assert compiler.artifact.read(path) == made[Family.V4]


@pytest.mark.compiles
def test_compile_error_names_header_and_line(tmp_path):
    """The message points into the file a person edits, not into the joined text."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/broken.h").write_text("#pragma once\n\nint half(void) { return nothing; }\n")
    (tmp_path / "tc.c").write_text('#include <uapi/linux/bpf.h>\n#include "lib/broken.h"\n')
    text = source.join([tmp_path / "tc.c"], tmp_path)

    with pytest.raises(CompileError, match=r"lib/broken\.h:3:\d+: error: use of undeclared") as got:
        compiler.obtain([Family.V4], tmp_path / "cache", text=text)

    assert "Traceback" not in got.value.log
    assert list((tmp_path / "cache").glob("*.artifact")) == []


def test_without_headers_the_error_says_what_to_install(tmp_path, monkeypatch):
    """A fresh machine's user is told the command."""
    monkeypatch.setattr(toolchain, "find_headers", lambda: None)

    with pytest.raises(UnsupportedHost, match=r"none found .*apt-get install"):
        compiler.obtain([Family.V4], tmp_path, text=_tiny_unit("return 0;"))


@pytest.mark.compiles
def test_headers_of_another_kernel_serve(tmp_path, monkeypatch):
    """Debian's split tree is merged in the cache when the running kernel has none of its own."""
    root = tmp_path / "root"
    (root / "usr").mkdir(parents=True)
    (root / "usr/src").symlink_to("/usr/src")
    found = toolchain.find_headers(root, "0.0.0-none")
    if found is None or len(found.trees) < 2:
        pytest.skip("no split header tree in /usr/src to try this with")
    monkeypatch.setattr(toolchain, "find_headers", lambda: found)

    made = compiler.obtain([Family.V4], tmp_path / "cache", text=_tiny_unit("return 0;"))

    assert "pod_ingress" in made[Family.V4].programs
    assert not found.trees[0].is_symlink()


def _tiny_unit(body: str) -> str:
    return (
        "#include <uapi/linux/bpf.h>\n"
        "#include <uapi/linux/in.h>\n"
        "#if IP_FAMILY != 4 && IP_FAMILY != 6\n#error family\n#endif\n"
        'BPF_TABLE("hash", __u32, __u64, counts, 1);\n'
        "int pod_ingress(struct __sk_buff *skb)\n"
        f"{{ __u32 key = 0; counts.lookup(&key); {body} }}\n"
    )


def test_entries_survive_a_restart(settings, compiled, opened):
    """Whatever was pinned is taken over: hash, mapped array and counters alike (Z2)."""
    mine = opened.family[Family.V4]
    key = mine.frontends.key.pack(addr=bytes([10, 96, 0, 1]), port=wire_port(443), proto=6)
    value = bytes(range(mine.frontends.value.size))
    mine.frontends.update([(key, value)])
    opened.slots.write(7, struct.pack("=2I", 70, 80))
    opened.close()

    again = Tables.open(settings, compiled)

    assert dict(again.family[Family.V4].frontends.items()) == {key: value}
    assert again.slots.read(7, 2) == struct.pack("=2I", 70, 80)
    assert again.writes == 0
    again.close()


def test_larger_tables_keep_their_entries(settings, compiled, opened):
    """A changed size in the settings costs no flow and no service."""
    mine = opened.family[Family.V6]
    entries = {key: os.urandom(mine.flows.value.size) for key in keys(300, size=24)}
    mine.flows.update(list(entries.items()))
    opened.slots.write(8191, struct.pack("=I", 5))
    opened.close()

    larger = settings.model_copy(update={"flow_entries": 8192, "slot_entries": 16384})
    again = Tables.open(larger, compiled)

    assert dict(again.family[Family.V6].flows.items()) == entries
    assert again.family[Family.V6].flows.max_entries == 8192
    assert (again.slots.max_entries, again.slots.read(8191, 2)) == (16384, struct.pack("=2I", 5, 0))
    again.close()


def test_table_too_small_for_its_entries_keeps_its_size(settings, compiled, opened):
    """Less room is a wish; services that are there are not dropped for it."""
    mine = opened.family[Family.V4]
    entries = dict.fromkeys(keys(500, size=8), bytes(mine.frontends.value.size))
    mine.frontends.update(list(entries.items()))
    opened.close()

    smaller = settings.model_copy(update={"frontend_entries": 64, "slot_entries": 1024})
    again = Tables.open(smaller, compiled)

    assert dict(again.family[Family.V4].frontends.items()) == entries
    assert again.family[Family.V4].frontends.max_entries == 1024
    assert again.slots.max_entries == 8192
    again.close()


def test_pins_of_another_layout_are_refused(settings, compiled, opened):
    """An agent never writes through a map whose fields mean something else."""
    opened.close()
    maps = dict(compiled[Family.V4].maps)
    maps["flows"] = replace(maps["flows"], value_desc=maps["flows"].value_desc.replace("seen", "x"))
    other = {**compiled, Family.V4: replace(compiled[Family.V4], maps=maps)}

    with pytest.raises(LayoutMismatch):
        Tables.open(settings, other)

    Tables.open(settings, compiled).close()


def test_pin_that_is_another_map_is_refused(settings, compiled, opened):
    """Somebody else's map under our name is not written to."""
    opened.close()
    path = tables.pin_dir(settings) / "frontends4"
    path.unlink()
    fd = bpf.map_create(bpf.MapType.HASH, key_size=8, value_size=24, max_entries=1024)
    bpf.pin(fd, path)
    os.close(fd)

    with pytest.raises(LayoutMismatch, match="frontends4"):
        Tables.open(settings, compiled)


@pytest.mark.parametrize("left", ["no digest", "a map missing", "half a resize", "empty digest"])
def test_half_made_pins_of_a_crash_are_completed(settings, compiled, opened, left):
    """Wherever an earlier run died, the next one opens."""
    opened.close()
    directory = tables.pin_dir(settings)
    if left == "no digest":
        (directory / "layout4").unlink()
    elif left == "a map missing":
        (directory / "flows6").unlink()
    elif left == "half a resize":
        fd = bpf.get_pinned(directory / "flows4")
        bpf.pin(fd, directory / "new-flows4")
        os.close(fd)
    else:
        (directory / "layout4").unlink()
        fd = bpf.map_create(bpf.MapType.ARRAY, key_size=4, value_size=32, max_entries=1)
        bpf.pin(fd, directory / "layout4")
        os.close(fd)

    Tables.open(settings, compiled).close()

    names = {path.name for path in directory.iterdir()}
    assert {"layout4", "layout6", "flows4", "flows6", "slots"} <= names
    assert not any(name.startswith("new-") for name in names)


def test_pins_of_another_version_are_dropped_once_ours_are_there(settings, compiled, monkeypatch):
    """After an upgrade, or a way back from one, nothing reads the other version's maps."""
    Tables.open(settings, compiled).close()
    old = tables.pin_dir(settings)
    monkeypatch.setattr(tables.constants, "LAYOUT_VERSION", 999)

    Tables.open(settings, compiled).close()

    assert [path.name for path in old.parent.iterdir()] == ["v999"]


def test_one_family_alone_opens_and_is_joined_by_the_other(settings, compiled):
    """Shared maps belong to both; turning IPv6 on later keeps what IPv4 has."""
    alone = Tables.open(settings, {Family.V4: compiled[Family.V4]})
    alone.slots.write(3, struct.pack("=I", 9))
    assert list(alone.family) == [Family.V4]
    alone.close()

    both = Tables.open(settings, compiled)

    assert list(both.family) == [Family.V4, Family.V6]
    assert both.slots.read(3, 1) == struct.pack("=I", 9)
    both.close()


def test_open_and_close_leave_no_descriptor(settings, compiled):
    """A process that opens tables again and again does not run out of descriptors."""
    Tables.open(settings, compiled).close()
    before = descriptors()

    for _ in range(3):
        open_tables = Tables.open(settings, compiled)
        Programs.load(compiled, {f: open_tables.fds(f) for f in compiled}).close()
        open_tables.close()

    assert descriptors() == before


def test_failed_open_leaves_no_descriptor(settings, compiled):
    """Nor does one that is refused half-way."""
    Tables.open(settings, compiled).close()
    shapes = {**compiled[Family.V6].maps, "slots": _impossible(compiled[Family.V6].maps["slots"])}
    broken = {Family.V6: replace(compiled[Family.V6], maps=shapes)}
    (tables.pin_dir(settings) / "layout6").unlink()
    (tables.pin_dir(settings) / "slots").unlink()
    before = descriptors()

    with pytest.raises(DataplaneError, match="slots"):
        Tables.open(settings, broken)

    assert descriptors() == before


def _impossible(shape: MapShape) -> MapShape:
    return replace(shape, key_size=8, key_desc='"unsigned long long"')


def test_writes_count_entries_and_nothing_else(opened):
    """The counted tests of the dataplane rest on this: missing keys and reads cost nothing."""
    table = opened.family[Family.V4].backend_index
    table.update([(key, b"\1\0\0\0") for key in keys(100, size=8)])
    table.delete(keys(150, size=8)[50:])
    opened.slots.write(0, bytes(40))
    opened.slots.write_word(3, 0, 12)
    list(table.items()), table.lookup(bytes(8)), opened.drops.sums()

    assert len(list(table.items())) == 50
    assert opened.writes_by_table() == {"backend_index4": 150, "slots": 11}
    assert opened.writes == 161


def test_full_table_takes_what_fits_and_says_which_table(opened):
    """The writer can put the blame on the entries that did not fit."""
    table = opened.family[Family.V4].frontends
    value = bytes(table.value.size)

    with pytest.raises(OSError, match="frontends4"):
        table.update([(key, value) for key in keys(1100, size=8)])

    assert len(list(table.items())) == table.max_entries == 1024
    assert table.writes == 1024


@pytest.mark.parametrize("seed", range(3))
def test_deleting_in_any_order_with_gaps_leaves_the_rest(opened, seed):
    """Batches stop at a missing key; the ones behind it must go too."""
    table = opened.family[Family.V4].backend_index
    present = keys(3000, size=8)[::3]
    table.update([(key, bytes(4)) for key in present[:1500]])
    asked = random.Random(seed).sample(keys(3000, size=8), 700)

    table.delete(asked)

    assert set(dict(table.items())) == set(present) - set(asked)


@pytest.mark.parametrize("name", ["frontends", "flows", "source_ranges"])
def test_every_kind_of_keyed_table_lists_and_clears(opened, name):
    """Hash, LRU hash and trie alike, whatever batch commands the kernel has for them."""
    table = getattr(opened.family[Family.V4], name)
    if name == "source_ranges":
        wanted = {
            table.key.pack(prefix_bits=64, ranges=i, addr=bytes([10, 0, 0, 1])): bytes(4)
            for i in range(200)
        }
    else:
        wanted = {key: os.urandom(table.value.size) for key in keys(200, size=table.key.size)}
    table.update(list(wanted.items()))

    assert dict(table.items()) == wanted
    table.clear()
    assert dict(table.items()) == {}


def test_tables_without_batch_commands_work_one_by_one(opened, monkeypatch):
    """Older kernels have no batches for some maps: slower, not different."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(524, "not supported")

    monkeypatch.setattr(bpf, "update_batch", refuse)
    monkeypatch.setattr(bpf, "delete_batch", refuse)
    monkeypatch.setattr(bpf, "lookup_batches", refuse)
    table = opened.family[Family.V6].flows
    entries = {key: os.urandom(table.value.size) for key in keys(50, size=24)}

    table.update(list(entries.items()))
    assert dict(table.items()) == entries
    table.delete(list(entries)[10:])

    assert len(dict(table.items())) == 10
    assert table.writes == 90


def test_mapped_array_shows_the_kernel_what_is_written(opened):
    """No system call, yet the program reads it: the kernel's own look-up agrees."""
    backends = opened.family[Family.V6].backends
    size = backends.value.size
    values = [os.urandom(size) for _ in range(5)]
    backends.write(10, b"".join(values))

    for i, value in enumerate(values):
        assert bpf.lookup(backends.fd, struct.pack("=I", 10 + i), size) == value
    backends.write_word(11, backends.value.offset("flags"), 0xABCD)
    kernel = bpf.lookup(backends.fd, struct.pack("=I", 11), size)
    assert backends.value.unpack(kernel).flags == 0xABCD
    assert backends.read(10, 5) == b"".join([values[0], kernel, *values[2:]])


@pytest.mark.parametrize("first", [-1, 8191, 8192])
def test_writing_beyond_an_array_is_an_error(opened, first):
    """The mapping ends at a page, not at the last element."""
    with pytest.raises(OSError, match="slots"):
        opened.slots.write(first, bytes(8))


def test_a_million_entries_are_read_in_batches(compiled, settings):
    """Sweeping all flows must not take an agent long: a call of bpf(2) reads thousands."""
    large = settings.model_copy(update={"flow_entries": 1 << 20})
    open_tables = Tables.open(large, {Family.V4: compiled[Family.V4]})
    flows = open_tables.family[Family.V4].flows
    value = bytes(flows.value.size)
    count = 1_000_000 * 9 // 10
    tail = bytes(flows.key.size - 4)
    flows.update([(struct.pack("=I", i) + tail, value) for i in range(count)])

    with counted_calls() as calls:
        found = sum(1 for _ in flows.items())

    open_tables.close()
    assert found > count * 95 // 100  # an LRU may evict a few before it is full
    assert calls.total() < count / 1000
