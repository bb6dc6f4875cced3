"""Artifacts: relocatable, complete after a round trip, never trusted when damaged."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_svc.dataplane.ebpf import artifact
from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape, Program

MOV = struct.pack("=BBhi", 0xB7, 0, 0, 1)
EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)


def load_map(fd: int, register: int = 1) -> bytes:
    """The two slots of a 64-bit load of a map descriptor."""
    return struct.pack("=BBhi", 0x18, register | 1 << 4, 0, fd) + bytes(8)


def load_number(number: int) -> bytes:
    """The two slots of a plain 64-bit load."""
    return struct.pack("=BBhiBBhi", 0x18, 1, 0, number, 0, 0, 0, 0)


def shape(**changes: object) -> MapShape:
    facts = {"type": 1, "flags": 0, "key_size": 8, "value_size": 4, "max_entries": 1}
    facts |= {"key_desc": '"unsigned long long"', "value_desc": '"unsigned int"'}
    return MapShape(**(facts | changes))  # type: ignore[arg-type]


def test_map_loads_become_names_and_names_become_descriptors():
    """Descriptors of the compiling process mean nothing elsewhere; other 64-bit loads stay."""
    code = MOV + load_map(7) + load_number(7) + load_map(9, register=2) + EXIT

    program = artifact.strip_descriptors(code, {7: "flows", 9: "slots"})

    assert program.relocations == ((1, "flows"), (5, "slots"))
    assert program.relocated({"flows": 70, "slots": 90}) == (
        MOV + load_map(70) + load_number(7) + load_map(90, register=2) + EXIT
    )


def test_second_slot_of_a_load_is_never_taken_for_an_instruction():
    """The upper half of a 64-bit number may look like a map load."""
    tricky = struct.pack("=BBhi", 0x18, 1, 0, 5) + struct.pack("=BBhi", 0x18, 0x11, 0, 7)

    assert artifact.strip_descriptors(tricky + EXIT, {7: "flows"}).relocations == ()


def test_map_without_a_descriptor_is_an_error():
    """A program must not be loaded with a map missing."""
    with pytest.raises(KeyError, match="flows"):
        Program(load_map(0), ((0, "flows"),)).relocated({"slots": 3})


programs = st.builds(
    Program,
    st.binary(max_size=64),
    st.lists(st.tuples(st.integers(0, 500), st.sampled_from(["flows", "slots"]))).map(tuple),
)
artifacts = st.builds(
    Artifact,
    st.dictionaries(st.text(min_size=1, max_size=8), programs, max_size=3),
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.builds(shape, type=st.integers(1, 30), key_desc=st.text(max_size=20)),
        max_size=3,
    ),
)


@given(artifacts)
def test_file_gives_back_what_was_written(tmp_path_factory, original):
    """Cache and node see the same programs and shapes as the compiler."""
    path = tmp_path_factory.mktemp("cache") / "x.artifact"
    artifact.write(original, path)

    assert artifact.read(path) == original
    assert [entry.name for entry in path.parent.iterdir()] == ["x.artifact"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "other format"])
def test_damaged_file_reads_as_missing(tmp_path, monkeypatch, damage):
    """A cache entry a crash or an older version left is compiled anew, not loaded."""
    path = tmp_path / "x.artifact"
    if damage == "other format":
        monkeypatch.setattr(artifact, "FORMAT", artifact.FORMAT + 1)
    artifact.write(Artifact({"f": Program(MOV + EXIT, ())}, {"flows": shape()}), path)
    monkeypatch.undo()
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()

    assert artifact.read(path) is None


@pytest.mark.parametrize(
    "change",
    [{"type": 9}, {"flags": 1}, {"key_size": 20}, {"value_size": 8}, {"value_desc": '"int"'}],
    ids=lambda change: next(iter(change)),
)
def test_layout_digest_follows_every_part_of_a_layout(change):
    """Pins of another layout are recognised, whatever differs."""
    before = Artifact({}, {"flows": shape()}).layout_digest()

    assert Artifact({}, {"flows": shape(**change)}).layout_digest() != before


def test_layout_digest_ignores_programs_and_sizes_in_entries():
    """New programs, or a larger map, find the pins of the old ones."""
    before = Artifact({}, {"flows": shape()}).layout_digest()

    assert (
        Artifact({"f": Program(EXIT, ())}, {"flows": shape(max_entries=9)}).layout_digest()
        == before
    )


def test_source_key_follows_text_and_defines_but_not_their_order():
    """What is compiled decides which artifact fits."""
    key = artifact.source_key("int a;", {"A": "1", "B": "2"})

    assert artifact.source_key("int a;", {"B": "2", "A": "1"}) == key
    assert artifact.source_key("int b;", {"A": "1", "B": "2"}) != key
    assert artifact.source_key("int a;", {"A": "1", "B": "3"}) != key
