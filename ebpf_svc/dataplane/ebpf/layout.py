"""Pack and unpack keys and values by the layout of their C types.

Field names come from BCC's description of the compiled type, flattened:

- a plain number is an int in the machine's order; `wire_port` makes what a `__be16` holds;
- an array, and a struct that holds nothing but one array (`struct addr`), is `bytes` under the
  field's own name: an address goes in as the 4 or 16 bytes of the wire;
- any other struct inside spreads out with its field's name in front: `at` of type `l4_addr` gives
  `at_addr`, `at_port`, `at_proto`;
- padding (`pad`, `*_pad`) has no name: zero when packed, ignored when unpacked;
- a map whose key or value is one number has the single field `value`.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ebpf_svc.errors import LayoutMismatch

_CODES = {
    "char": "b",
    "signed char": "b",
    "unsigned char": "B",
    "_Bool": "?",
    "short": "h",
    "unsigned short": "H",
    "int": "i",
    "unsigned int": "I",
    "long": "q",
    "unsigned long": "Q",
    "long long": "q",
    "unsigned long long": "Q",
}
_PAD = re.compile(r"^(pad|.*_pad|__pad_\d+)$")

wire_port = socket.htons
"""What a `__be16` field holds for that port number, and back."""


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    code: str
    size: int
    is_bytes: bool


class Layout:
    """One C type as Python packs it; `name` says in errors which."""

    def __init__(self, name: str, offsets: Mapping[str, int], codes: str, size: int) -> None:
        self.name, self.fields = name, tuple(offsets)
        self._offsets = dict(offsets)
        self._struct = struct.Struct("=" + codes)
        if self._struct.size != size:
            raise LayoutMismatch(
                name, kernel=f"{size} bytes", python=f"{self._struct.size} bytes: {codes}"
            )

    @cached_property
    def _tuple(self) -> Callable[..., Any]:
        # Made on first use: two dozen layouts are opened at each start, few are unpacked by name.
        return namedtuple(re.sub(r"\W", "_", self.name), self.fields)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._struct.size

    @classmethod
    def from_desc(cls, desc_json: str, size: int, name: str = "") -> Layout:
        """Read BCC's description of a C type.

        Args:
            desc_json: from `MapShape`.
            size: what the compiler says the type takes; a layout that adds up to another is wrong.
                0 = not said: a ring has records, not values.
            name: for errors; default the C type's.

        Raises:
            LayoutMismatch: a kind of field this module does not know, or the sizes differ.
        """
        desc = json.loads(desc_json)
        label = name or (desc[0] if isinstance(desc, list) else str(desc))
        if isinstance(desc, str):
            parts = [_scalar(label, "value", desc)]
        else:
            parts = _spread(label, desc, "")
        offsets, codes, at = {}, "", 0
        for part in parts:
            if _PAD.match(part.name):
                codes += f"{part.size}x"
            else:
                offsets[part.name] = at
                codes += part.code
            at += part.size
        return cls(label, offsets, codes, size or at)

    def require(self, *names: str) -> None:
        """Raise LayoutMismatch unless the fields are exactly these, in this order."""
        if names != self.fields:
            raise LayoutMismatch(self.name, kernel=self.fields, python=names)

    def packer(self, *names: str) -> Callable[..., bytes]:
        """The function that packs values given in the order of `names`, which is C's order."""
        self.require(*names)
        return self._struct.pack

    def offset(self, field: str) -> int:
        """Where a field lies, in bytes from the start."""
        return self._offsets[field]

    def pack(self, **values: int | bytes) -> bytes:
        """Pack one value; every field by name."""
        if values.keys() != self._offsets.keys():
            raise LayoutMismatch(self.name, kernel=self.fields, python=tuple(values))
        return self._struct.pack(*[values[field] for field in self.fields])

    def unpack(self, data: bytes | memoryview, offset: int = 0) -> Any:
        """Unpack one value into a named tuple with `fields`."""
        return self._tuple(*self._struct.unpack_from(data, offset))

    def unpack_raw(self, data: bytes | memoryview, offset: int = 0) -> tuple[Any, ...]:
        """Unpack one value into a plain tuple in the order of `fields`; three times as fast."""
        return self._struct.unpack_from(data, offset)


def _scalar(label: str, name: str, kind: str) -> _Part:
    code = _CODES.get(kind)
    if code is None:
        raise LayoutMismatch(label, kernel=f"{name}: {kind}", python="no such field type")
    return _Part(name, code, struct.calcsize("=" + code), is_bytes=False)


def _spread(label: str, desc: list[Any], prefix: str) -> list[_Part]:
    """Flatten a struct; BCC spells padding out, so fields follow each other without gaps."""
    _, fields, kind = desc
    if kind != "struct_packed":
        raise LayoutMismatch(label, kernel=f"a {kind}", python="structs only")
    parts: list[_Part] = []
    for field in fields:
        name, of = prefix + field[0], field[1]
        inner = (
            [_scalar(label, name, of)] if isinstance(of, str) else _spread(label, of, f"{name}_")
        )
        if len(field) > 2:
            if not isinstance(field[2], list):
                raise LayoutMismatch(label, kernel=f"{name}: a bit-field", python="no bit-fields")
            size = sum(part.size for part in inner)
            for dimension in field[2]:
                size *= dimension
            parts.append(_Part(name, f"{size}s", size, is_bytes=True))
        elif not isinstance(of, str) and len(of[1]) == 1 and inner[0].is_bytes:
            parts.append(_Part(name, inner[0].code, inner[0].size, is_bytes=True))
        else:
            parts += inner
    return parts
