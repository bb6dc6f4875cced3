"""Read what a table of nf_tables holds, as the values `nf_tables` writes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ebpf_svc.host.netlink import attribute, attributes
from ebpf_svc.host.nf_expr import (
    Lookup,
    decode_data,
    decode_name,
    encode_name,
    expressions_in,
    listed,
)
from ebpf_svc.host.nf_tables import (
    ANONYMOUS,
    COMMENT,
    CONSTANT,
    DYNAMIC,
    GETCHAIN,
    GETRULE,
    GETSET,
    GETSETELEM,
    GETTABLE,
    INET_PROTO,
    INET_SERVICE,
    INLINE,
    INTEGER,
    IPV4_ADDR,
    IPV6_ADDR,
    MAP,
    SET_COMMENT,
    VERDICT,
    Chain,
    DataType,
    Element,
    Hook,
    Inline,
    Rule,
    Set,
    Table,
)
from ebpf_svc.host.nfnetlink import SUBSYSTEM, Socket, header

_TRIES = 3
_KIND = 0x3FFF
_PAIR = struct.Struct("=HHHH")
"""An attribute's header, and that of the first one inside."""
_TYPES = {
    each.number: each for each in (INTEGER, IPV4_ADDR, IPV6_ADDR, INET_PROTO, INET_SERVICE, VERDICT)
}


@dataclass(frozen=True, slots=True)
class Held:
    """A table as it is in the kernel."""

    comment: str = ""
    flags: int = 0
    """Not zero: it is dormant, or belongs to a process."""
    chains: dict[str, Chain] = field(default_factory=dict)
    rules: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    """Of every chain that has some."""
    sets: dict[str, Set] = field(default_factory=dict)
    """Those with a name of their own."""
    elements: dict[str, dict[bytes, Element]] = field(default_factory=dict)
    """Of every such set, but those that rules fill."""


class _Found(NamedTuple):
    """A message's attributes, of which numbers are asked for."""

    of: dict[int, bytes]

    def number(self, kind: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.of.get(kind, b""), "big", signed=signed)

    def name(self, kind: int) -> str:
        return decode_name(self.of.get(kind, b""))


def read_table(socket: Socket, table: Table) -> Held | None:
    """What a table holds; None when there is no such table.

    Each list is whole. They are of one moment, unless somebody writes to nf_tables all the time:
    then to other tables, or nobody could tell what ours holds.

    Raises:
        OSError: the kernel refused, or lists change faster than they can be read.
    """
    held = None
    for _ in range(_TRIES):
        before = socket.generation()
        try:
            held = _read(socket, table)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            held = None
        if socket.generation() == before:
            break
    return held


def table_comment(socket: Socket, table: Table) -> str | None:
    """The comment of a table; None when there is no such table."""
    found = _table(socket, table)
    return None if found is None else read_comment(found.of.get(6, b""))


def base_chains(socket: Socket, family: int) -> Iterator[tuple[str, str]]:
    """Table and type of every base chain of a family."""
    for body in socket.list(GETCHAIN, family):
        found = _Found(attributes(body))
        if 4 in found.of:
            yield found.name(1), found.name(7)


def has_chain(socket: Socket, table: Table, name: str) -> bool:
    """Whether a table, if there is one, has that chain."""
    wanted = attribute(1, encode_name(table.name)) + attribute(3, encode_name(name))
    request = (SUBSYSTEM << 8 | GETCHAIN, 0, header(table.family) + wanted)
    return socket.requests([request]) == [None]


def _read(socket: Socket, table: Table) -> Held | None:
    found = _table(socket, table)
    if found is None:
        return None
    named = attribute(1, encode_name(table.name))
    chains = {}
    for body in socket.list(GETCHAIN, table.family):
        chain = _Found(attributes(body))
        if chain.name(1) == table.name:
            chains[chain.name(3)] = _chain(chain)
    all_sets = {}
    for body in socket.list(GETSET, table.family, named):
        one = _set(_Found(attributes(body)))
        all_sets[one.name] = one
    rules: dict[str, list[Rule]] = {}
    for body in socket.list(GETRULE, table.family, named):
        one_rule = _Found(attributes(body))
        rules.setdefault(one_rule.name(2), []).append(_rule(socket, table, one_rule, all_sets))
    sets = {name: one for name, one in all_sets.items() if not one.flags & ANONYMOUS}
    return Held(
        read_comment(found.of.get(6, b"")),
        found.number(2),
        chains,
        {chain: tuple(of_chain) for chain, of_chain in rules.items()},
        sets,
        {
            name: {element.key: element for element in _elements(socket, table, name)}
            for name, one in sets.items()
            if not one.flags & DYNAMIC
        },
    )


def _table(socket: Socket, table: Table) -> _Found | None:
    for body in socket.list(GETTABLE, table.family):
        found = _Found(attributes(body))
        if found.name(1) == table.name:
            return found
    return None


def _chain(found: _Found) -> Chain:
    hook = None
    if 4 in found.of:
        place = _Found(attributes(found.of[4]))
        hook = Hook(found.name(7), place.number(1), place.number(2, signed=True), found.number(5))
    return Chain(found.name(3), read_comment(found.of.get(12, b"")), hook)


def _set(found: _Found) -> Set:
    return Set(
        found.name(2),
        _types(found.number(4), found.number(5)),
        _types(found.number(6), found.number(7)) if found.number(3) & MAP else (),
        flags=found.number(3),
        timeout_s=found.number(11) // 1000,
        comment=read_comment(found.of.get(13, b""), SET_COMMENT),
    )


def _rule(socket: Socket, table: Table, found: _Found, sets: dict[str, Set]) -> Rule:
    expressions = expressions_in(found.of.get(4, b""))
    inline = None
    for number, each in enumerate(expressions):
        if isinstance(each, Lookup) and each.set in sets and sets[each.set].flags & ANONYMOUS:
            one = sets[each.set]
            inline = Inline(
                one.key,
                tuple(sorted(_elements(socket, table, one.name), key=_key_and_flags)),
                one.data,
                one.flags & ~(ANONYMOUS | CONSTANT | MAP),
            )
            expressions = (
                *expressions[:number],
                replace(each, set=INLINE),
                *expressions[number + 1 :],
            )
    return Rule(expressions, read_comment(found.of.get(7, b"")), inline)


def _elements(socket: Socket, table: Table, name: str) -> Iterator[Element]:
    wanted = attribute(1, encode_name(table.name)) + attribute(2, encode_name(name))
    for body in socket.list(GETSETELEM, table.family, wanted):
        for one in listed(attributes(body).get(3, b"")):
            yield _element(one)


def _element(body: bytes) -> Element:
    """An element: those of nothing but key and value, of which there are many, without detours."""
    if len(body) >= _PAIR.size:
        length, kind, inner, what = _PAIR.unpack_from(body)
        if (kind & _KIND, what) == (1, 1):
            key, at = body[8 : 4 + inner], length + (-length % 4)
            if at == len(body):
                return Element(key)
            length, kind, inner, what = _PAIR.unpack_from(body, at)
            if (kind & _KIND, what) == (2, 1) and at + length + (-length % 4) == len(body):
                return Element(key, body[at + 8 : at + 4 + inner])
    return _any_element(body)


def _any_element(body: bytes) -> Element:
    found = attributes(body)
    key = decode_data(found[1]) if 1 in found else b""
    return Element(
        key if isinstance(key, bytes) else b"",
        decode_data(found[2]) if 2 in found else None,
        read_comment(found[6]) if 6 in found else "",
        int.from_bytes(found.get(3, b""), "big"),
    )


def _key_and_flags(element: Element) -> tuple[bytes, int]:
    return element.key, element.flags


def _types(number: int, length: int) -> tuple[DataType, ...]:
    """The types of a concatenation, which `nft` numbers with six bits each."""
    if number in _TYPES:
        return (_TYPES[number],)
    types: list[DataType] = []
    while number:
        types.append(_TYPES.get(number & 63, DataType(number & 63, 0)))
        number >>= 6
    return tuple(reversed(types)) or (DataType(0, length),)


def read_comment(userdata: bytes, kind: int = COMMENT) -> str:
    """The comment among what `nft` keeps with an object."""
    at = 0
    while at + 2 <= len(userdata):
        length = userdata[at + 1]
        if userdata[at] == kind:
            return decode_name(userdata[at + 2 : at + 2 + length])
        at += 2 + length
    return ""
