"""Tables, chains, sets and rules of nf_tables, as values and as messages.

`nf_dump` reads them back.

Whatever the kernel or `nft` adds on its own (handles, counters of use) is left out, so that what
was written equals what is read. Comments are where `nft` looks for them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ebpf_svc.host.netlink import CREATE, attribute
from ebpf_svc.host.nf_expr import (
    NESTED,
    Expression,
    Lookup,
    Verdict,
    encode_expression,
    encode_name,
    encode_value,
    encode_verdict,
)
from ebpf_svc.host.nfnetlink import Request, header

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2
NEWCHAIN, GETCHAIN, DELCHAIN = 3, 4, 5
NEWRULE, GETRULE, DELRULE = 6, 7, 8
NEWSET, GETSET, DELSET = 9, 10, 11
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
APPEND = 0x800

IPV4, IPV6 = 2, 10
"""NFPROTO_*."""
ANONYMOUS, CONSTANT, INTERVAL, MAP, TIMEOUT, DYNAMIC = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
INTERVAL_END = 0x1
ACCEPT_POLICY = 1
_VERDICT_TYPE = 0xFFFFFF00
_LIST_BYTES = 60_000
"""An attribute's length has 16 bits."""
COMMENT, SET_COMMENT, _SET_KEY_ORDER, _SET_DATA_ORDER = 0, 7, 0, 1
_HOST_ENDIAN, _BIG_ENDIAN = 1, 2
_U32 = struct.Struct(">I")


class DataType(NamedTuple):
    """A type of `nft`, by which it prints keys and values."""

    number: int
    length: int


INTEGER = DataType(4, 4)
IPV4_ADDR, IPV6_ADDR = DataType(7, 4), DataType(8, 16)
INET_PROTO, INET_SERVICE = DataType(12, 1), DataType(13, 2)
VERDICT = DataType(_VERDICT_TYPE, 0)


class Hook(NamedTuple):
    """Where packets enter a base chain."""

    type: str
    number: int
    priority: int
    policy: int = ACCEPT_POLICY


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain without its rules."""

    name: str
    comment: str = ""
    hook: Hook | None = None


class Element(NamedTuple):
    """One key of a set, or of a map with its value."""

    key: bytes
    value: bytes | Verdict | None = None
    comment: str = ""
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Set:
    """A set or map without its elements."""

    name: str
    key: tuple[DataType, ...]
    data: tuple[DataType, ...] = ()
    flags: int = 0
    timeout_s: int = 0
    comment: str = field(default="", compare=False)
    typeof: bytes = field(default=b"", compare=False)
    """What `nft` needs to print keys for which there is no type; in its own encoding."""


@dataclass(frozen=True, slots=True)
class Inline:
    """A set without a name of its own, inside the one rule that looks into it."""

    key: tuple[DataType, ...]
    elements: tuple[Element, ...]
    data: tuple[DataType, ...] = ()
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; its `Lookup` of the set named `INLINE` looks into `inline`."""

    expressions: tuple[Expression, ...]
    comment: str = ""
    inline: Inline | None = None


INLINE = ""


def pad(value: bytes) -> bytes:
    """A part of a concatenation: it fills whole registers."""
    return value + bytes(-len(value) % 4)


class Table(NamedTuple):
    """A table's family and name, from which every message about it is made."""

    family: int
    name: str

    def make(self, comment: str) -> Request:
        """Create it, unless it is there."""
        return self._request(NEWTABLE, attribute(2, bytes(4)), _comment(6, comment), new=True)

    def remove(self) -> Request:
        """Remove it with all it holds."""
        return self._request(DELTABLE)

    def add_chain(self, chain: Chain) -> Request:
        """Create a chain, unless it is there."""
        parts = [attribute(3, encode_name(chain.name))]
        if chain.hook is not None:
            kind, number, priority, policy = chain.hook
            place = attribute(1, _U32.pack(number)) + attribute(2, struct.pack(">i", priority))
            parts += (
                attribute(4 | NESTED, place),
                attribute(5, _U32.pack(policy)),
                attribute(7, encode_name(kind)),
            )
        return self._request(NEWCHAIN, *parts, _comment(12, chain.comment), new=True)

    def remove_chain(self, name: str) -> Request:
        """Remove a chain nothing jumps to, with its rules if any are left."""
        return self._request(DELCHAIN, attribute(3, encode_name(name)))

    def flush_chain(self, name: str) -> Request:
        """Remove all rules of a chain."""
        return self._request(DELRULE, attribute(2, encode_name(name)))

    def add_rules(self, chain: str, rules: Sequence[Rule]) -> Iterator[Request]:
        """Append rules, and the sets inside them."""
        for number, rule in enumerate(rules):
            # Named by us: where the kernel chooses, it looks at every set of the table first.
            inline = f"{chain}-{number}"
            if rule.inline is not None:
                yield from self._add_inline(inline, rule.inline)
            expressions = b"".join(
                encode_expression(
                    replace(each, set=inline)
                    if isinstance(each, Lookup) and each.set == INLINE
                    else each
                )
                for each in rule.expressions
            )
            yield self._request(
                NEWRULE,
                attribute(2, encode_name(chain)),
                attribute(4 | NESTED, expressions),
                _comment(7, rule.comment),
                new=True,
            )

    def add_set(self, made: Set) -> Request:
        """Create a set or map, unless it is there; a kernel since 6.3 takes on another timeout."""
        return self._new_set(made, b"")

    def remove_set(self, name: str) -> Request:
        """Remove a set no rule looks into."""
        return self._request(DELSET, attribute(2, encode_name(name)))

    def flush_set(self, name: str) -> Request:
        """Remove all elements of a set."""
        return self._request(DELSETELEM, attribute(2, encode_name(name)))

    def add_elements(self, name: str, elements: Iterable[Element]) -> Iterator[Request]:
        """Put elements into a set; those already there with the same value are fine."""
        return self._elements(NEWSETELEM, name, map(encode_element, elements))

    def remove_elements(self, name: str, keys: Iterable[bytes]) -> Iterator[Request]:
        """Take elements out of a set; each must be there."""
        return self._elements(DELSETELEM, name, (encode_element(Element(key)) for key in keys))

    def _add_inline(self, name: str, made: Inline) -> Iterator[Request]:
        flags = made.flags | ANONYMOUS | CONSTANT | (MAP if made.data else 0)
        size = attribute(1, _U32.pack(len(made.elements)))
        yield self._new_set(
            Set(name, made.key, made.data, flags=flags), attribute(9 | NESTED, size)
        )
        yield from self._elements(NEWSETELEM, name, map(encode_element, made.elements))

    def _new_set(self, made: Set, more: bytes) -> Request:
        parts = [
            attribute(2, encode_name(made.name)),
            attribute(3, _U32.pack(made.flags)),
            attribute(4, _U32.pack(_type_number(made.key))),
            attribute(5, _U32.pack(_length(made.key))),
        ]
        if made.data:
            parts.append(attribute(6, _U32.pack(_type_number(made.data))))
            parts.append(attribute(7, _U32.pack(_length(made.data))))
        parts.append(attribute(10, _U32.pack(1)))
        if made.timeout_s:
            parts.append(attribute(11, struct.pack(">Q", made.timeout_s * 1000)))
        # Integers are in the host's order; parts of a concatenation have their types'.
        order = 0
        if len(made.key) == 1:
            order = _HOST_ENDIAN if made.key == (INTEGER,) else _BIG_ENDIAN
        userdata = _tlv(_SET_KEY_ORDER, struct.pack("=I", order))
        if made.data:
            userdata += _tlv(_SET_DATA_ORDER, bytes(4))
        userdata += made.typeof
        if made.comment:
            userdata += _tlv(SET_COMMENT, encode_name(made.comment))
        return self._request(NEWSET, *parts, more, attribute(13, userdata), new=True)

    def _elements(self, kind: int, name: str, encoded: Iterable[bytes]) -> Iterator[Request]:
        """Messages about elements, as many in each as fit."""
        batch: list[bytes] = []
        length = 0
        for one in encoded:
            if length + len(one) > _LIST_BYTES:
                yield self._list_request(kind, name, batch)
                batch, length = [], 0
            batch.append(one)
            length += len(one)
        if batch:
            yield self._list_request(kind, name, batch)

    def _list_request(self, kind: int, name: str, batch: Sequence[bytes]) -> Request:
        elements = attribute(3 | NESTED, b"".join(batch))
        return self._request(
            kind, attribute(2, encode_name(name)), elements, new=kind == NEWSETELEM
        )

    def _request(self, kind: int, *parts: bytes, new: bool = False) -> Request:
        flags = CREATE if new else 0
        if kind == NEWRULE:
            flags |= APPEND
        body = header(self.family) + attribute(1, encode_name(self.name)) + b"".join(parts)
        return Request(kind, flags, body)


def encode_element(element: Element) -> bytes:
    """An element of a list of elements."""
    key, value, comment, flags = element
    inner = attribute(1 | NESTED, encode_value(key))
    if isinstance(value, Verdict):
        inner += attribute(2 | NESTED, encode_verdict(value))
    elif value is not None:
        inner += attribute(2 | NESTED, encode_value(value))
    if flags:
        inner += attribute(3, _U32.pack(flags))
    if comment:
        inner += _comment(6, comment)
    return attribute(1 | NESTED, inner)


def _type_number(types: Sequence[DataType]) -> int:
    """How `nft` numbers a type; of a concatenation six bits each."""
    number = 0
    for each in types:
        number = number << 6 | each.number
    return number


def _length(types: Sequence[DataType]) -> int:
    if len(types) == 1:
        return types[0].length
    return sum(each.length + (-each.length % 4) for each in types)


def _tlv(kind: int, value: bytes) -> bytes:
    return bytes((kind, len(value))) + value


def _comment(kind: int, text: str) -> bytes:
    """A comment as an attribute; nothing when it is empty."""
    return attribute(kind, _tlv(COMMENT, encode_name(text))) if text else b""
