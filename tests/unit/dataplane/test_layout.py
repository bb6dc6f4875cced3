"""Layouts: what BCC says of a C type is what Python packs, and anything else is found at once."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_svc.dataplane.ebpf.layout import Layout, wire_port
from ebpf_svc.errors import LayoutMismatch

ADDR = '["addr", [["word","unsigned int", [1]] ], "struct_packed"]'
L4_ADDR = (
    f'["l4_addr", [["addr",{ADDR}], ["port","unsigned short"], ["proto","unsigned char"], '
    '["pad","unsigned char"] ], "struct_packed"]'
)
BACKEND = (
    f'["backend_value", [["at",{L4_ADDR}], ["service","unsigned int"], ["next","unsigned int"], '
    '["flags","unsigned int"] ], "struct_packed"]'
)


def test_nested_struct_spreads_out_with_its_name_in_front():
    """A backend's address, port and protocol are fields of the backend; padding is not."""
    layout = Layout.from_desc(BACKEND, 20)

    assert layout.fields == ("at_addr", "at_port", "at_proto", "service", "next", "flags")
    assert layout.pack(
        at_addr=bytes([10, 1, 2, 3]),
        at_port=wire_port(8080),
        at_proto=6,
        service=7,
        next=8,
        flags=9,
    ) == (bytes([10, 1, 2, 3, 0x1F, 0x90, 6, 0]) + struct.pack("=3I", 7, 8, 9))


def test_single_number_is_the_field_value():
    """Slots and indexes hold a bare number."""
    layout = Layout.from_desc('"unsigned int"', 4)

    assert layout.fields == ("value",)
    assert layout.unpack(layout.pack(value=77)).value == 77


def test_array_of_structs_is_bytes():
    """What a socket rewrote is only ever read whole."""
    desc = (
        f'["socket_value", [["entry",{L4_ADDR}, [4]], ["next","unsigned int"] ], "struct_packed"]'
    )
    layout = Layout.from_desc(desc, 36)

    assert layout.fields == ("entry", "next")
    assert layout.unpack(bytes(range(36))).entry == bytes(range(32))


def test_size_that_does_not_fit_is_refused():
    """A type the compiler pads in a way the description does not show must never be written."""
    with pytest.raises(LayoutMismatch, match=r"24 bytes.*20 bytes"):
        Layout.from_desc(BACKEND, 24)


@pytest.mark.parametrize(
    ("desc", "said"),
    [
        ('["v", [["a","unsigned int", 4] ], "struct_packed"]', "bit-field"),
        ('["v", [["a","unsigned int"] ], "union"]', "a union"),
        ('["v", [["a","double"] ], "struct_packed"]', "a: double"),
    ],
)
def test_kind_of_field_python_does_not_know_is_refused(desc, said):
    """Bit-fields, unions and unknown scalars have no agreed bytes."""
    with pytest.raises(LayoutMismatch, match=said):
        Layout.from_desc(desc, 4)


@pytest.mark.parametrize(
    "names",
    [
        ("addr", "port"),
        ("addr", "port", "proto", "zone"),
        ("port", "addr", "proto"),
    ],
    ids=["C has one more", "Python has one more", "another order"],
)
def test_names_that_differ_from_c_are_refused_before_anything_is_packed(names):
    """A struct changed on one side only is found when the codec is made."""
    with pytest.raises(LayoutMismatch) as caught:
        Layout.from_desc(L4_ADDR, 8, "frontends4_key").packer(*names)

    assert (caught.value.table, caught.value.kernel) == (
        "frontends4_key",
        ("addr", "port", "proto"),
    )


def test_packing_with_a_field_missing_or_unknown_is_refused():
    """By name, too, every field must be given and no other."""
    layout = Layout.from_desc(L4_ADDR, 8)

    with pytest.raises(LayoutMismatch):
        layout.pack(addr=bytes(4), port=1)
    with pytest.raises(LayoutMismatch):
        layout.pack(addr=bytes(4), port=1, proto=6, zone=1)


def test_offset_is_where_the_field_lies():
    """A single word of a value in a mapped array can be written by its offset."""
    layout = Layout.from_desc(BACKEND, 20)

    assert [layout.offset(name) for name in layout.fields] == [0, 4, 6, 8, 12, 16]


SCALARS = {"unsigned char": 1, "unsigned short": 2, "unsigned int": 4, "unsigned long long": 8}


@given(st.lists(st.sampled_from(sorted(SCALARS)), min_size=1, max_size=12), st.data())
def test_any_struct_reads_back_what_was_packed(kinds, data):
    """For every sequence of fields: unpack(pack(x)) == x, and fields follow each other closely."""
    body = ", ".join(f'["f{i}","{kind}"]' for i, kind in enumerate(kinds))
    size = sum(SCALARS[kind] for kind in kinds)
    layout = Layout.from_desc(f'["s", [{body}], "struct_packed"]', size)
    values = [data.draw(st.integers(0, 2 ** (8 * SCALARS[kind]) - 1)) for kind in kinds]

    packed = layout.packer(*layout.fields)(*values)

    assert len(packed) == layout.size == size
    assert tuple(layout.unpack(packed)) == tuple(values) == layout.unpack_raw(packed)
