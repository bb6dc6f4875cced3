"""The kernel's table of tracked connections: read over netlink, single entries deleted.

Of a table that may hold a million entries only what is asked for becomes an object.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from dataclasses import dataclass

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import netlink
from ebpf_svc.host.netlink import attribute, attributes
from ebpf_svc.model.net import Family, Protocol, family_of

NETLINK_NETFILTER = 12
_GET, _DELETE = 0x101, 0x102
"""IPCTNL_MSG_CT_GET and _DELETE of the subsystem ctnetlink."""
_ORIGINAL, _REPLY, _STATUS, _ID, _ZONE = 1, 2, 3, 12, 18
_DST_NAT = 1 << 5
"""IPS_DST_NAT."""
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER, _PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 1, 2, 3
_NESTED = 0x8000
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_SOURCE = {Family.V4: 1, Family.V6: 3}
_DESTINATION = {Family.V4: 2, Family.V6: 4}
_PORT = struct.Struct("!H")
DUMPS = 5
"""How often an interrupted dump is tried again; then what was read is used (C3)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tracked flow, as its first packet was sent and as answers come."""

    destination: tuple[str, int]
    """Where its client sent it."""
    answers_from: tuple[str, int]
    """Where answers come from: another place when the destination was translated."""
    handle: bytes
    """What names this very entry to the kernel."""
    by_rule: bool = False
    """A rule translated its destination; IPVS and eBPF need none."""


def entries(
    family: Family,
    protocol: Protocol,
    keep: Callable[[tuple[str, int], tuple[str, int]], bool],
    *,
    answers_to: Collection[tuple[str, int]] = (),
) -> list[Entry]:
    """The flows of a protocol in this thread's network namespace that `keep` asks for.

    Args:
        family: of the addresses.
        protocol: others are skipped unread.
        keep: given `destination` and `answers_from` of an entry.
        answers_to: also those whose answers come to one of these.

    Raises:
        DataplaneError: the kernel gives no list, e.g. it has no connection tracking.
    """
    found: dict[bytes, Entry] = {}
    try:
        with closing(netlink.Socket(NETLINK_NETFILTER)) as link:
            for _ in range(DUMPS):
                try:
                    for message in link.stream(_GET, struct.pack("=BBH", _AF[family], 0, 0)):
                        entry = _parse(message.body, family, protocol, keep, answers_to)
                        if entry is not None:
                            found[entry.handle] = entry
                    break
                except netlink.Interrupted:
                    continue
    except OSError as error:
        raise DataplaneError(f"connection tracking cannot be read: {error.strerror}") from error
    return list(found.values())


def seen_as(
    source: tuple[str, int], destination: tuple[str, int], protocol: Protocol
) -> tuple[str, int] | None:
    """Whom the destination of a tracked flow answers: not its source where a rule masquerades.

    Returns:
        None when no such flow is tracked, or the kernel does not say.
    """
    family = family_of(source[0])
    ends = ((_SOURCE, source), (_DESTINATION, destination))
    packed = [(kinds[family], socket.inet_pton(_AF[family], end[0])) for kinds, end in ends]
    ports = [
        (_PROTO_NUMBER, bytes([protocol.number])),
        (_PROTO_SOURCE_PORT, _PORT.pack(source[1])),
        (_PROTO_DESTINATION_PORT, _PORT.pack(destination[1])),
    ]
    halves = _nested(_TUPLE_IP, packed) + _nested(_TUPLE_PROTO, ports)
    wanted = attribute(_ORIGINAL | _NESTED, halves)
    try:
        with closing(netlink.Socket(NETLINK_NETFILTER)) as link:
            found = link.get(_GET, struct.pack("=BBH", _AF[family], 0, 0) + wanted)
    except OSError:
        return None
    reply = attributes(attributes(found[4:]).get(_REPLY, b""))
    try:
        address = attributes(reply[_TUPLE_IP])[_DESTINATION[family]]
        return _end(family, address, attributes(reply[_TUPLE_PROTO])[_PROTO_DESTINATION_PORT])
    except KeyError:
        return None


def _nested(kind: int, inner: Iterable[tuple[int, bytes]]) -> bytes:
    return attribute(kind | _NESTED, b"".join(attribute(*each) for each in inner))


def delete(family: Family, doomed: Iterable[Entry]) -> int:
    """Delete entries; one that ended meanwhile is fine, one the kernel keeps does no harm (C9).

    Returns:
        How many were deleted.
    """
    header = struct.pack("=BBH", _AF[family], 0, 0)
    wanted = [(_DELETE, 0, header + entry.handle) for entry in doomed]
    if not wanted:
        return 0
    try:
        with closing(netlink.Socket(NETLINK_NETFILTER)) as link:
            return link.requests(wanted).count(None)
    except OSError as error:
        raise DataplaneError(f"connection tracking: {error.strerror}") from error


def can_be_read() -> str:
    """Try; returns why not, empty when it can be."""
    try:
        entries(Family.V4, Protocol.UDP, lambda destination, source: False)
    except DataplaneError as error:
        return str(error)
    return ""


def _parse(
    body: bytes,
    family: Family,
    protocol: Protocol,
    keep: Callable[[tuple[str, int], tuple[str, int]], bool],
    answers_to: Collection[tuple[str, int]],
) -> Entry | None:
    fields = attributes(body[4:])
    try:
        original, reply = attributes(fields[_ORIGINAL]), attributes(fields[_REPLY])
        ports = attributes(original[_TUPLE_PROTO])
        if ports[_PROTO_NUMBER][0] != protocol.number:
            return None
        addresses = attributes(original[_TUPLE_IP])
        destination = _end(family, addresses[_DESTINATION[family]], ports[_PROTO_DESTINATION_PORT])
        ports, addresses = attributes(reply[_TUPLE_PROTO]), attributes(reply[_TUPLE_IP])
        source = _end(family, addresses[_SOURCE[family]], ports[_PROTO_SOURCE_PORT])
        is_asked_for = keep(destination, source) or (
            bool(answers_to)
            and _end(family, addresses[_DESTINATION[family]], ports[_PROTO_DESTINATION_PORT])
            in answers_to
        )
    except KeyError:  # no protocol with ports
        return None
    if not is_asked_for:
        return None
    # The kernel looks by the tuple (without one it would delete everything) and then compares the
    # id, which a later flow of the same tuple has only if it lies in the same memory (C9).
    handle = attribute(_ORIGINAL | _NESTED, fields[_ORIGINAL])
    handle += b"".join(attribute(kind, fields[kind]) for kind in (_ID, _ZONE) if kind in fields)
    status = int.from_bytes(fields.get(_STATUS, b""), "big")
    return Entry(destination, source, handle, by_rule=bool(status & _DST_NAT))


def _end(family: Family, address: bytes, port: bytes) -> tuple[str, int]:
    return socket.inet_ntop(_AF[family], address), _PORT.unpack(port)[0]
