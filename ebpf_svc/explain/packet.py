"""The packets of a trial as bytes: one that opens a connection, one that answers it, later ones."""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass

from ebpf_svc.explain.model import End
from ebpf_svc.model.net import Family, Protocol, family_of

ETHERNET_BYTES = 14
MACS_BYTES = 12
"""Of it, where it goes to and comes from."""
_ETHERNET = b"\x02\0\0\0\0\x01\x02\0\0\0\0\x0a"
_TYPES = {Family.V4: b"\x08\x00", Family.V6: b"\x86\xdd"}
_SYN, _ACK, _RST = 0x02, 0x10, 0x04
_SCTP_INIT, _SCTP_INIT_ACK, _SCTP_HEARTBEAT = 1, 2, 4
_ICMP = {Family.V4: 1, Family.V6: 58}


@dataclass(frozen=True, slots=True)
class Ends:
    """Where a packet comes from and goes to."""

    source: End
    destination: End
    protocol: int
    """Its number; ICMP's ends have no ports."""
    is_reset: bool = False


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tells a packet of a connection's beginning from others."""

    tcp_flags: int
    sctp_chunk: int


_OPENING = _Kind(_SYN, _SCTP_INIT)
_ANSWER = _Kind(_SYN | _ACK, _SCTP_INIT_ACK)
_LATER = _Kind(_ACK, _SCTP_HEARTBEAT)


def opening(source: End, destination: End, protocol: Protocol, *, ethernet: bool = True) -> bytes:
    """The first packet of a flow."""
    return _packet(source, destination, protocol, _OPENING, ethernet=ethernet)


def answer(source: End, destination: End, protocol: Protocol) -> bytes:
    """The first answer."""
    return _packet(source, destination, protocol, _ANSWER)


def later(source: End, destination: End, protocol: Protocol) -> bytes:
    """One of an open connection, either way."""
    return _packet(source, destination, protocol, _LATER)


def _packet(
    source: End, destination: End, protocol: Protocol, kind: _Kind, *, ethernet: bool = True
) -> bytes:
    family = family_of(source[0])
    ends = _wire(source[0]) + _wire(destination[0])
    ports = struct.pack("!HH", source[1], destination[1])
    if protocol is Protocol.TCP:
        body = ports + struct.pack("!IIBBHHH", 1000, 0, 5 << 4, kind.tcp_flags, 64240, 0, 0)
        at = 16
    elif protocol is Protocol.UDP:
        body = ports + struct.pack("!HH", 8 + 8, 0) + b"question"
        at = 6
    else:
        body = ports + struct.pack("!IIBBH", 0, 0, kind.sctp_chunk, 0, 20) + bytes(16)
        at = 0
    if at:  # SCTP's checksum covers no address, and nobody looks at it here
        pseudo = ends + struct.pack("!II", len(body), protocol.number)
        check = _checksum(pseudo + body) or 0xFFFF
        body = body[:at] + struct.pack("!H", check) + body[at + 2 :]
    if family is Family.V4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0x4000, 64, protocol.number, 0)
        check = _checksum(head + ends)
        head = head[:10] + struct.pack("!H", check) + ends
    else:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol.number, 64) + ends
    return (_ETHERNET + _TYPES[family] if ethernet else b"") + head + body


def ends_of(data: bytes, family: Family, *, ethernet: bool = True) -> Ends:
    """Read the ends of a packet such as the programs leave behind."""
    l3 = ETHERNET_BYTES if ethernet else 0
    size, at, number_at, l4 = (4, 12, 9, 20) if family is Family.V4 else (16, 8, 6, 40)
    number = data[l3 + number_at]
    kind = socket.AF_INET if family is Family.V4 else socket.AF_INET6
    source = socket.inet_ntop(kind, data[l3 + at : l3 + at + size])
    destination = socket.inet_ntop(kind, data[l3 + at + size : l3 + at + 2 * size])
    if number == _ICMP[family]:
        return Ends((source, 0), (destination, 0), number)
    sport, dport = struct.unpack_from("!HH", data, l3 + l4)
    is_reset = number == Protocol.TCP.number and bool(data[l3 + l4 + 13] & _RST)
    return Ends((source, sport), (destination, dport), number, is_reset)


def _wire(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
