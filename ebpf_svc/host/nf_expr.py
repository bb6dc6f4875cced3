"""Expressions of nf_tables: one definition each, from which encoding and decoding both derive.

Only those our rules need; any other in a dump is `Unknown`, equal to nothing we write. Fields are
named as `nft --debug=netlink` prints them. Registers are numbered as the kernel dumps them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from ebpf_svc.host.netlink import attribute, attributes

NESTED = 0x8000
_LIST_ELEMENT = 1
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_U32 = struct.Struct(">I")
_LENGTH = struct.Struct("=H")

DROP, ACCEPT, JUMP, GOTO, RETURN = 0, 1, -3, -4, -5
_VERDICTS = {DROP: "drop", ACCEPT: "accept", JUMP: "jump", GOTO: "goto", RETURN: "return"}

VERDICT_REGISTER = 0
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
EQUAL, NOT_EQUAL = 0, 1
META_MARK, META_IIFNAME, META_L4PROTO = 3, 6, 16
CT_STATE, CT_STATUS = 0, 2
STATE_NEW = 0x8
STATUS_DNAT = 0x20
NUMGEN_RANDOM = 1
NAT_DESTINATION = 1
NAT_FLAGS_ADDRESS_AND_PORT = 0x3
FULLY_RANDOM = 0x10
FIB_TYPE, FIB_SADDR = 3, 1
LOCAL = 2
"""RTN_LOCAL."""
SET_UPDATE = 1
TCP_RESET = 1
INVERT = 1


def register(offset: int) -> int:
    """The number of the register that begins at that byte, as the kernel dumps it."""
    return 1 + offset // 16 if offset % 16 == 0 else 8 + offset // 4


class Verdict(NamedTuple):
    """What becomes of a packet."""

    code: int
    chain: str = ""

    def __str__(self) -> str:
        return f"{_VERDICTS.get(self.code, self.code)} {self.chain}".rstrip()


class _Codec(NamedTuple):
    """How a field looks in an attribute."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    nested: int = 0


def encode_verdict(verdict: Verdict) -> bytes:
    """A verdict as the content of a data attribute."""
    inner = attribute(_VERDICT_CODE, struct.pack(">i", verdict.code))
    if verdict.chain:
        inner += attribute(_VERDICT_CHAIN, encode_name(verdict.chain))
    return attribute(_DATA_VERDICT | NESTED, inner)


def encode_value(value: bytes) -> bytes:
    """A value as the content of a data attribute."""
    return attribute(_DATA_VALUE, value)


def decode_data(body: bytes) -> bytes | Verdict:
    """The content of a data attribute."""
    found = attributes(body)
    if _DATA_VERDICT not in found:
        return found.get(_DATA_VALUE, b"")
    inner = attributes(found[_DATA_VERDICT])
    code = struct.unpack(">i", inner[_VERDICT_CODE])[0]
    return Verdict(code, decode_name(inner.get(_VERDICT_CHAIN, b"")))


def encode_name(name: str) -> bytes:
    """A name, ended by a zero."""
    return name.encode() + b"\0"


def decode_name(body: bytes) -> str:
    """A name, with or without the zero at its end."""
    return body.rstrip(b"\0").decode(errors="replace")


def _encode_data(data: bytes | Verdict) -> bytes:
    return encode_verdict(data) if isinstance(data, Verdict) else encode_value(data)


_NUMBER = _Codec(_U32.pack, lambda body: int.from_bytes(body, "big"))
_BYTE = _Codec(lambda value: bytes([value]), lambda body: body[0])
_NAME = _Codec(encode_name, decode_name)
_DATA = _Codec(_encode_data, decode_data, NESTED)


class _Field(NamedTuple):
    """One attribute of an expression."""

    attribute: int
    name: str
    codec: _Codec = _NUMBER
    absent: int | None = None
    """What a dump without it means."""


class Expression:
    """Base of every expression; subclasses say which attributes they have."""

    __slots__ = ()
    KIND: ClassVar[str]
    FIELDS: ClassVar[tuple[_Field, ...]]


@dataclass(frozen=True, slots=True)
class Payload(Expression):
    """Load a part of a header."""

    base: int
    offset: int
    length: int
    register: int = 1
    KIND = "payload"
    FIELDS = (_Field(1, "register"), _Field(2, "base"), _Field(3, "offset"), _Field(4, "length"))


@dataclass(frozen=True, slots=True)
class Meta(Expression):
    """Load what the kernel knows about a packet, or set it from a register."""

    key: int
    register: int | None = 1
    source: int | None = None
    KIND = "meta"
    FIELDS = (_Field(1, "register"), _Field(2, "key"), _Field(3, "source"))


@dataclass(frozen=True, slots=True)
class Ct(Expression):
    """Load what connection tracking knows."""

    key: int
    register: int = 1
    KIND = "ct"
    FIELDS = (_Field(1, "register"), _Field(2, "key"))


@dataclass(frozen=True, slots=True)
class Fib(Expression):
    """Load what the routing tables say."""

    result: int
    flags: int
    register: int = 1
    KIND = "fib"
    FIELDS = (_Field(1, "register"), _Field(2, "result"), _Field(3, "flags"))


@dataclass(frozen=True, slots=True)
class Numgen(Expression):
    """Load a number below `modulus`."""

    modulus: int
    type: int = NUMGEN_RANDOM
    offset: int = 0
    register: int = 1
    KIND = "numgen"
    FIELDS = (_Field(1, "register"), _Field(2, "modulus"), _Field(3, "type"), _Field(4, "offset"))


@dataclass(frozen=True, slots=True)
class Cmp(Expression):
    """Go on if a register compares so."""

    data: bytes
    operation: int = EQUAL
    register: int = 1
    KIND = "cmp"
    FIELDS = (_Field(1, "register"), _Field(2, "operation"), _Field(3, "data", _DATA))


@dataclass(frozen=True, slots=True)
class Bitwise(Expression):
    """Register = register & mask ^ xor."""

    mask: bytes
    xor: bytes
    length: int
    source: int = 1
    register: int = 1
    operation: int = 0
    KIND = "bitwise"
    FIELDS = (
        _Field(1, "source"),
        _Field(2, "register"),
        _Field(3, "length"),
        _Field(4, "mask", _DATA),
        _Field(5, "xor", _DATA),
        _Field(6, "operation", absent=0),
    )


@dataclass(frozen=True, slots=True)
class Immediate(Expression):
    """Put a value into a register; a verdict into register 0 decides."""

    data: bytes | Verdict
    register: int = VERDICT_REGISTER
    KIND = "immediate"
    FIELDS = (_Field(1, "register"), _Field(2, "data", _DATA))


@dataclass(frozen=True, slots=True)
class Lookup(Expression):
    """Go on if a set has (with INVERT: has not) the key; a map's value goes into `register`."""

    set: str
    source: int = 1
    register: int | None = None
    flags: int = 0
    KIND = "lookup"
    FIELDS = (
        _Field(1, "set", _NAME),
        _Field(2, "source"),
        _Field(3, "register"),
        _Field(5, "flags"),
    )


@dataclass(frozen=True, slots=True)
class Dynset(Expression):
    """Add the key in a register to a set."""

    set: str
    operation: int = SET_UPDATE
    source: int = 1
    KIND = "dynset"
    FIELDS = (_Field(1, "set", _NAME), _Field(3, "operation"), _Field(4, "source"))


@dataclass(frozen=True, slots=True)
class Nat(Expression):
    """Translate to the address and port in registers."""

    family: int
    address: int
    port: int
    type: int = NAT_DESTINATION
    flags: int = NAT_FLAGS_ADDRESS_AND_PORT
    address_max: int | None = None
    port_max: int | None = None
    KIND = "nat"
    FIELDS = (
        _Field(1, "type"),
        _Field(2, "family"),
        _Field(3, "address"),
        _Field(4, "address_max"),
        _Field(5, "port"),
        _Field(6, "port_max"),
        _Field(7, "flags"),
    )


@dataclass(frozen=True, slots=True)
class Masquerade(Expression):
    """Translate the source to the address of the outgoing device."""

    flags: int = FULLY_RANDOM
    KIND = "masq"
    FIELDS = (_Field(1, "flags"),)


@dataclass(frozen=True, slots=True)
class Reject(Expression):
    """Answer with an ICMP error of that code, or with a reset."""

    code: int | None
    type: int = 0
    KIND = "reject"
    FIELDS = (_Field(1, "type"), _Field(2, "code", _BYTE))


@dataclass(frozen=True, slots=True)
class Unknown(Expression):
    """An expression we never write."""

    kind: str
    body: bytes
    KIND = ""
    FIELDS = ()


_EXPRESSIONS: dict[str, type[Any]] = {
    each.KIND: each
    for each in (
        *(Payload, Meta, Ct, Fib, Numgen, Cmp, Bitwise, Immediate, Lookup, Dynset),
        *(Nat, Masquerade, Reject),
    )
}


@lru_cache(maxsize=4096)
def encode_expression(expression: Expression) -> bytes:
    """An expression as an element of a rule's list. Most rules are made of the same few."""
    inner = b"".join(
        attribute(field.attribute | field.codec.nested, field.codec.encode(value))
        for field in expression.FIELDS
        if (value := getattr(expression, field.name)) is not None
    )
    body = attribute(1, encode_name(expression.KIND)) + attribute(2 | NESTED, inner)
    return attribute(_LIST_ELEMENT | NESTED, body)


@lru_cache(maxsize=4096)
def decode_expression(body: bytes) -> Expression:
    """The content of an element of a rule's list."""
    outer = attributes(body)
    kind = decode_name(outer[1])
    made = _EXPRESSIONS.get(kind)
    inner = attributes(outer.get(2, b""))
    if made is None:
        return Unknown(kind, outer.get(2, b""))
    try:
        values = {
            field.name: field.codec.decode(inner[field.attribute])
            if field.attribute in inner
            else field.absent
            for field in made.FIELDS
        }
        expression: Expression = made(**values)
    except (IndexError, KeyError, struct.error):
        return Unknown(kind, outer.get(2, b""))
    return expression


def expressions_in(body: bytes) -> tuple[Expression, ...]:
    """Decode a rule's list of expressions."""
    return tuple(map(decode_expression, listed(body)))


def listed(body: bytes) -> Iterator[bytes]:
    """The contents of a list's elements."""
    at = 0
    while at + 4 <= len(body):
        (length,) = _LENGTH.unpack_from(body, at)
        yield body[at + 4 : at + length]
        at += length + (-length % 4)
