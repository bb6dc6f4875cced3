"""Sets of addresses and ports in the kernel (ipset), made, filled and listed over netlink.

No program of the host is needed, and only differences travel: a set of a hundred thousand entries
is changed by one message. Knows nothing of what the sets mean.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, Self

from ebpf_svc.host import netlink
from ebpf_svc.host.netlink import Failure, attribute, attributes
from ebpf_svc.model.net import Family, Protocol, family_of

NETLINK_NETFILTER = 12
_SUBSYSTEM = 6 << 8
_PROTOCOL_CMD, _CREATE, _DESTROY, _SWAP, _LIST, _ADD, _DEL = 1, 2, 3, 6, 7, 9, 10
_PROTOCOL, _NAME, _TYPE, _REVISION, _FAMILY, _DATA, _ADT = 1, 2, 3, 4, 5, 7, 8
_IP, _PORT_FROM, _PORT_TO, _PROTO, _HASHSIZE, _MAXELEM = 1, 4, 5, 7, 18, 19
_IP2, _CIDR2 = 20, 21
_NESTED, _NET_ORDER = 0x8000, 0x4000
_HEADER = {family: struct.pack("=BBH", int(af), 0, 0) for family, af in (
    (Family.V4, socket.AF_INET), (Family.V6, socket.AF_INET6),
)}  # fmt: skip
_VERSION = 6
"""Of the protocol: the oldest any kernel in use speaks, and newer ones still do."""
HASHSIZE = 1024
"""At first; the kernel lets it grow."""
PORTS = (0, 65535)

ERR_FIND_TYPE, ERR_BUSY, ERR_HASH_FULL = 4098, 4100, 4352
_WORDS = {
    4097: "the kernel speaks another ipset protocol",
    ERR_FIND_TYPE: "the kernel has no set of that type",
    4099: "there are too many sets",
    ERR_BUSY: "a rule uses the set",
    4102: "a set of that name has another type",
    ERR_HASH_FULL: "the set is full",
}


class Entry(NamedTuple):
    """An element; what its set's type has no place for is empty."""

    address: str = ""
    protocol: int = 0
    """IANA number; 0 in sets of ports alone."""
    port: int = 0
    other: str = ""
    """Of hash:ip,port,ip an address, of hash:ip,port,net a prefix."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A set as it is to be made."""

    name: str
    type: str
    """In the tool's words: `hash:ip,port`, `bitmap:port` …"""
    family: Family
    maxelem: int = 0
    """Entries at most; a bitmap has every port instead."""


@dataclass(slots=True)
class Held:
    """A set as the kernel has it."""

    spec: Spec
    entries: set[Entry]


class Sets:
    """The sets of this thread's network namespace; use it as a context manager, or `close()`."""

    def __init__(self) -> None:
        """Open a socket; raises OSError without netfilter."""
        self._link = netlink.Socket(NETLINK_NETFILTER)

    def close(self) -> None:
        """Give the descriptor back."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, specs: Iterable[Spec]) -> list[Failure | None]:
        """Make sets; one that is there already in that shape is fine."""
        return self._requests((_CREATE, spec.family, _create(spec)) for spec in specs)

    def destroy(self, names: Iterable[str]) -> list[Failure | None]:
        """Remove sets; one that is gone is fine, one a rule uses stays (ERR_BUSY)."""
        gone = self._requests((_DESTROY, Family.V4, _named(name)) for name in names)
        return [None if one is not None and one.errno == errno.ENOENT else one for one in gone]

    def swap(self, name: str, other: str) -> Failure | None:
        """Let two sets of one type change names: rules of the one then use the other."""
        body = _named(name) + attribute(_TYPE, other.encode() + b"\0")
        return self._requests([(_SWAP, Family.V4, body)])[0]

    def add(self, entries: Iterable[tuple[Spec, Entry]]) -> list[Failure | None]:
        """Put entries; one that is there is fine."""
        return self._requests((_ADD, spec.family, _element(spec, one)) for spec, one in entries)

    def remove(self, entries: Iterable[tuple[Spec, Entry]]) -> list[Failure | None]:
        """Take entries out; one that is gone is fine."""
        return self._requests((_DEL, spec.family, _element(spec, one)) for spec, one in entries)

    def read(self, name: str) -> Held | None:
        """A set and all it holds; None = there is none of that name.

        Raises:
            OSError: the kernel does not say.
        """
        held: Held | None = None
        try:
            for message in self._link.dump(_SUBSYSTEM | _LIST, _HEADER[Family.V4] + _named(name)):
                found = attributes(message.body[4:])
                if held is None:
                    held = Held(_spec(name, found), set())
                held.entries.update(_entries(found.get(_ADT, b""), held.spec))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return held

    def names(self) -> tuple[str, ...]:
        """Every set of this namespace, sorted."""
        body = _HEADER[Family.V4] + attribute(_PROTOCOL, bytes([_VERSION]))
        body += attribute(6 | _NET_ORDER, struct.pack("!I", 1 << 1))  # IPSET_FLAG_LIST_SETNAME
        messages = self._link.dump(_SUBSYSTEM | _LIST, body)
        names = (attributes(message.body[4:]).get(_NAME, b"") for message in messages)
        return tuple(sorted({name.rstrip(b"\0").decode() for name in names if name}))

    def _requests(self, wanted: Iterable[tuple[int, Family, bytes]]) -> list[Failure | None]:
        # Without NLM_F_EXCL adding what is there and deleting what is not are no errors.
        answers = self._link.requests(
            [(_SUBSYSTEM | command, 0, _HEADER[family] + body) for command, family, body in wanted]
        )
        return [
            Failure(one.errno, _WORDS[one.errno]) if one and one.errno in _WORDS else one
            for one in answers
        ]


def is_there() -> bool:
    """Whether this kernel has sets, loading the module if it can."""
    try:
        with closing(netlink.Socket(NETLINK_NETFILTER)) as link:
            body = _HEADER[Family.V4] + attribute(_PROTOCOL, bytes([_VERSION]))
            return link.requests([(_SUBSYSTEM | _PROTOCOL_CMD, 0, body)]) == [None]
    except OSError:
        return False


def _named(name: str) -> bytes:
    return attribute(_PROTOCOL, bytes([_VERSION])) + attribute(_NAME, name.encode() + b"\0")


def _create(spec: Spec) -> bytes:
    if spec.type == "bitmap:port":
        shape = attribute(_PORT_FROM | _NET_ORDER, struct.pack("!H", PORTS[0]))
        shape += attribute(_PORT_TO | _NET_ORDER, struct.pack("!H", PORTS[1]))
        family = socket.AF_UNSPEC
    else:
        shape = attribute(_HASHSIZE | _NET_ORDER, struct.pack("!I", HASHSIZE))
        shape += attribute(_MAXELEM | _NET_ORDER, struct.pack("!I", spec.maxelem))
        family = socket.AF_INET if spec.family is Family.V4 else socket.AF_INET6
    return (
        _named(spec.name)
        + attribute(_TYPE, spec.type.encode() + b"\0")
        + attribute(_REVISION, bytes([0]))
        + attribute(_FAMILY, bytes([family]))
        + attribute(_DATA | _NESTED, shape)
    )


def _element(spec: Spec, entry: Entry) -> bytes:
    data = attribute(_IP | _NESTED, _address(entry.address)) if entry.address else b""
    if entry.port:
        data += attribute(_PORT_FROM | _NET_ORDER, struct.pack("!H", entry.port))
    if entry.protocol:
        data += attribute(_PROTO, bytes([entry.protocol]))
    if entry.other:
        address, _, length = entry.other.partition("/")
        data += attribute(_IP2 | _NESTED, _address(address))
        if length:
            data += attribute(_CIDR2, bytes([int(length)]))
    return _named(spec.name) + attribute(_DATA | _NESTED, data)


def _address(text: str) -> bytes:
    if family_of(text) is Family.V4:
        return attribute(1 | _NET_ORDER, socket.inet_aton(text))
    return attribute(2 | _NET_ORDER, socket.inet_pton(socket.AF_INET6, text))


def _spec(name: str, found: dict[int, bytes]) -> Spec:
    family = Family.V6 if found.get(_FAMILY, b"\0")[0] == socket.AF_INET6 else Family.V4
    header = attributes(found.get(_DATA, b""))
    (maxelem,) = struct.unpack("!I", header.get(_MAXELEM, bytes(4)))
    return Spec(name, found.get(_TYPE, b"").rstrip(b"\0").decode(), family, maxelem)


def _entries(data: bytes, spec: Spec) -> Iterator[Entry]:
    """Split a list of elements: all of them have the same kind."""
    at = 0
    while at + 4 <= len(data):
        length, _ = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield _entry(attributes(data[at + 4 : at + length]), spec)
        at += length + (-length % 4)


def _entry(found: dict[int, bytes], spec: Spec) -> Entry:
    other = _text(found[_IP2]) if _IP2 in found else ""
    if other and spec.type.endswith(",net"):
        # A prefix of full length is listed without one.
        full = 32 if spec.family is Family.V4 else 128
        other += f"/{found[_CIDR2][0] if _CIDR2 in found else full}"
    return Entry(
        _text(found[_IP]) if _IP in found else "",
        found[_PROTO][0] if _PROTO in found else 0,
        struct.unpack("!H", found[_PORT_FROM][:2])[0] if _PORT_FROM in found else 0,
        other,
    )


def _text(nested: bytes) -> str:
    (packed,) = attributes(nested).values()
    return str(ipaddress.ip_address(packed))


def failures(answers: Sequence[Failure | None]) -> list[Failure]:
    """Those that are failures."""
    return [one for one in answers if one is not None]


def protocol_entry(address: str, port: int, protocol: Protocol, other: str = "") -> Entry:
    """An element of a hash:ip,port… set."""
    return Entry(address, protocol.number, port, other)
