"""Judge what a program did to any packet at all, without knowing what it should have done.

Reads packets on its own, strictly: a packet that is cut, or whose lengths do not agree, is
nobody's. What may be said of every packet: one that calls no frontend and answers for no backend
leaves as it came; one that was translated differs in addresses, ports and checksums only, goes
between a frontend and one of its backends, and has each checksum exactly as right or wrong as
before.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from ebpf_svc.dataplane.ebpf.constants import NAT_PORTS
from ebpf_svc.model.net import Family, Protocol
from tests.lib.packets import NETS, Address, Result, Verdict

ICMP_NUMBERS = {Family.V4: 1, Family.V6: 58}
_HEADER_BYTES = {6: 20, 17: 8, 132: 16}
_CHECKSUM_AT = {6: 16, 17: 6}
_EXTENSIONS = {0, 43, 44, 60}
_EXTENSIONS_MAX = 4


class Piece(Enum):
    """Which part of a datagram a packet is."""

    WHOLE = "whole"
    FIRST = "first"
    LATER = "later"


@dataclass(frozen=True, slots=True)
class View:
    """A well-formed packet of TCP, UDP, SCTP or ICMP as the oracle reads it."""

    src: Address
    dst: Address
    proto: int
    piece: Piece
    ident: int
    l3: int
    l4: int
    end: int


def read(data: bytes, l3: int, family: Family, *, end: int | None = None) -> View | None:
    """Read a packet whose IP header is at `l3`; None when it is not well-formed.

    Args:
        end: where the packet was cut, for a quote, whose own lengths then mean nothing.
    """
    found = (_read_v4 if family is Family.V4 else _read_v6)(data, l3)
    if found is None:
        return None
    ends, proto, piece, ident, l4, own_end = found
    limit = end if end is not None else own_end
    if end is None and not l4 <= own_end <= len(data):
        return None
    ports = (0, 0)
    if piece is not Piece.LATER:
        if proto == ICMP_NUMBERS[family] and end is None:
            need = 8
        elif proto in _HEADER_BYTES:
            need = _HEADER_BYTES[proto] if end is None else 4
        else:
            return None
        if l4 + need > limit:
            return None
        if proto in _HEADER_BYTES:
            ports = struct.unpack_from("!HH", data, l4)
    elif end is not None:
        return None
    kind = socket.AF_INET if family is Family.V4 else socket.AF_INET6
    src, dst = (socket.inet_ntop(kind, address) for address in ends)
    return View((src, ports[0]), (dst, ports[1]), proto, piece, ident, l3, l4, limit)


_Found = tuple[tuple[bytes, bytes], int, Piece, int, int, int]


def _read_v4(data: bytes, l3: int) -> _Found | None:
    if len(data) < l3 + 20 or data[l3] >> 4 != 4 or data[l3] & 15 < 5:
        return None
    header = (data[l3] & 15) * 4
    length, ident, fragment = struct.unpack_from("!HHH", data, l3 + 2)
    end = l3 + length if length else len(data)  # 0: too long to say, with GSO
    piece = Piece.LATER if fragment & 0x1FFF else Piece.FIRST if fragment & 0x2000 else Piece.WHOLE
    ends = data[l3 + 12 : l3 + 16], data[l3 + 16 : l3 + 20]
    return ends, data[l3 + 9], piece, ident, l3 + header, end


def _read_v6(data: bytes, l3: int) -> _Found | None:
    if len(data) < l3 + 40 or data[l3] >> 4 != 6:
        return None
    length = struct.unpack_from("!H", data, l3 + 4)[0]
    end = l3 + 40 + length if length else len(data)
    proto, at = data[l3 + 6], l3 + 40
    piece, ident = Piece.WHOLE, 0
    for _ in range(_EXTENSIONS_MAX):
        if proto not in _EXTENSIONS or piece is Piece.LATER:
            break
        if at + 8 > min(end, len(data)):
            return None
        size = 8
        if proto == 44:
            offset, ident = struct.unpack_from("!HI", data, at + 2)
            if offset & 0xFFF8:
                piece = Piece.LATER
            elif offset & 1:
                piece = Piece.FIRST
        else:
            size = (data[at + 1] + 1) * 8
        proto, at = data[at], at + size
    return (data[l3 + 8 : l3 + 24], data[l3 + 24 : l3 + 40]), proto, piece, ident, at, end


@dataclass(slots=True)
class Oracle:
    """What the world of a test contains, and which fragments it has seen."""

    family: Family
    frontends: Mapping[tuple[str, int, int], frozenset[Address]]
    """(address, port, protocol number) -> endpoints; none: the service refuses."""
    touched: int = 0
    """Packets that did not leave as they came."""
    _firsts: set[tuple[str, str, int, int]] = field(default_factory=set)

    def judge(self, program: str, result: Result, l3: int) -> str | None:
        """Say what is wrong with a result; None when nothing is."""
        sent = read(result.sent, l3, self.family)
        if sent is not None and sent.piece is Piece.FIRST:
            self._firsts.add((sent.src[0], sent.dst[0], sent.ident, sent.proto))
        if result.verdict not in set(Verdict):
            return f"verdict {result.verdict}"
        if result.verdict == Verdict.FORWARD and result.data == result.sent:
            return None
        self.touched += 1
        if sent is None:
            return "a malformed packet was touched"
        return self._judge_touched(program, result, sent)

    def _judge_touched(self, program: str, result: Result, sent: View) -> str | None:
        if result.verdict in (Verdict.SHOT, Verdict.STOLEN):
            return self._judge_drop(program, sent)
        if sent.proto == ICMP_NUMBERS[self.family]:
            return self._judge_error(program, result, sent)
        if self._refuses(sent) and not program.startswith("egress"):
            return self._judge_refusal(result, sent)
        return self._judge_translation(program, result, sent)

    def _endpoints(self, address: Address, proto: int) -> frozenset[Address] | None:
        return self.frontends.get((*address, proto))

    def _ends(self, called: Address, proto: int) -> frozenset[Address]:
        """Where a call may end: at the frontend's endpoints, or at the endpoint that was called."""
        endpoints = self._endpoints(called, proto)
        if endpoints is None and self._is_backend(called, proto):
            return frozenset({called})
        return endpoints or frozenset()

    def _refuses(self, sent: View) -> bool:
        return self._endpoints(sent.dst, sent.proto) == frozenset()

    def _is_backend(self, address: Address, proto: int) -> bool:
        return any(
            address in endpoints for (_, _, of), endpoints in self.frontends.items() if of == proto
        )

    def _judge_drop(self, program: str, sent: View) -> str | None:
        net = NETS[self.family]
        if program.startswith("egress"):
            return None if sent.dst[0] == net.discard else "an answer was dropped"
        if sent.piece is Piece.LATER:
            return None
        if self._endpoints(sent.dst, sent.proto) is None and sent.dst[0] != net.hairpin:
            return "a packet to no service was dropped"
        return None

    def _judge_refusal(self, result: Result, sent: View) -> str | None:
        """The answer is a reset, or a well-formed ICMP error about the packet, to its sender."""
        got = read(result.data, sent.l3, self.family)
        if result.verdict != Verdict.REDIRECT or got is None:
            return "not refused but neither dropped"
        if sent.proto == socket.IPPROTO_TCP:
            return self._judge_reset(result, sent, got)
        quote = result.data[got.l4 + 8 :]
        wrong = {
            "refused by no ICMP packet": got.proto != ICMP_NUMBERS[self.family],
            "refused at a wrong length": got.end != len(result.data),
            "refused to somebody else": (got.src[0], got.dst[0]) != (sent.dst[0], sent.src[0]),
            "refused about something else": not result.sent[sent.l3 :].startswith(quote),
            "ICMP checksum": _sum(result.data[got.l4 :], self._pseudo_sum(result.data, got))
            % 0xFFFF,
            "IP checksum": self.family is Family.V4 and _sum(result.data[got.l3 : got.l4]) % 0xFFFF,
        }
        return next((text for text, is_so in wrong.items() if is_so), None)

    def _judge_reset(self, result: Result, sent: View, got: View) -> str | None:
        """The segment turned round; a checksum that was wrong stays wrong by as much."""
        asked, answer = (
            struct.unpack_from("!IIBB", data, view.l4 + 4)
            for data, view in ((result.sent, sent), (result.data, got))
        )
        before, after = (
            (_sum(data[view.l4 : view.end]) + _sum(_ends(data, view.l3, self.family))) % 0xFFFF
            for data, view in ((result.sent, sent), (result.data, got))
        )
        wrong = {
            "refused by another protocol": got.proto != sent.proto,
            "refused at another length": len(result.data) != len(result.sent),
            "refused to somebody else": (got.src, got.dst) != (sent.dst, sent.src),
            "no reset": answer != (0, (asked[0] + 1) % 2**32, asked[2], 0x14),
            "TCP checksum": before != after,
        }
        return next((text for text, is_so in wrong.items() if is_so), None)

    def _pseudo_sum(self, data: bytes, view: View) -> int:
        if self.family is Family.V4:
            return 0
        return _sum(_ends(data, view.l3, self.family)) + view.proto + (view.end - view.l4)

    def _judge_translation(self, program: str, result: Result, sent: View) -> str | None:
        got = read(result.data, sent.l3, self.family)
        if got is None or len(result.data) != len(result.sent):
            return "the packet became malformed"
        turned = result.verdict == Verdict.REDIRECT
        wrong = (
            self._wrong_ends(program, sent, got, turned)
            if sent.piece is not Piece.LATER
            else self._wrong_fragment(sent)
        )
        return wrong or self._wrong_bytes(result, sent, turned) or self._wrong_sums(result, sent)

    def _wrong_fragment(self, sent: View) -> str | None:
        if (sent.src[0], sent.dst[0], sent.ident, sent.proto) in self._firsts:
            return None
        return "a fragment was touched whose first was never seen"

    def _wrong_ends(self, program: str, sent: View, got: View, turned: bool) -> str | None:
        net = NETS[self.family]
        if program.startswith("egress"):
            endpoints = self._ends(got.src, sent.proto)
            right = sent.src in endpoints and _stands_for(sent.dst, got.dst, sent.proto)
            return None if right else "wrong answer"
        if sent.dst[0] == net.hairpin:
            endpoints = self._ends(got.src, sent.proto)
            seen = sent.src[0], sent.dst[1]
            right = sent.src in endpoints and _stands_for(seen, got.dst, sent.proto) and turned
            return None if right else "wrong answer to itself"
        if got.dst not in self._ends(sent.dst, sent.proto):
            return f"sent to {got.dst}, which is no endpoint of {sent.dst}"
        source = (net.hairpin, sent.src[1]) if turned else sent.src
        if not _stands_for(got.src, source, sent.proto) or (turned and got.dst[0] != sent.src[0]):
            return f"source {got.src}"
        return None

    def _wrong_bytes(self, result: Result, sent: View, turned: bool) -> str | None:
        allowed = set(_address_bytes(sent.l3, self.family))
        if sent.piece is not Piece.LATER:
            allowed |= set(range(sent.l4, sent.l4 + 4))
            if sent.proto in _CHECKSUM_AT:
                at = sent.l4 + _CHECKSUM_AT[sent.proto]
                allowed |= {at, at + 1}
        return _stray(result, allowed, sent.l3 if turned else 0)

    def _wrong_sums(self, result: Result, sent: View) -> str | None:
        if self.family is Family.V4:
            header = slice(sent.l3, sent.l4)
            if not _same(_sum(result.sent[header]), _sum(result.data[header])):
                return "IP checksum"
        if sent.piece is Piece.LATER or sent.proto not in _CHECKSUM_AT:
            return None
        at = sent.l4 + _CHECKSUM_AT[sent.proto]
        if sent.proto == 17 and result.sent[at : at + 2] == b"\0\0":
            return None if result.data[at : at + 2] == b"\0\0" else "a checksum was invented"
        sums = [
            _sum(data[sent.l4 :], _sum(_ends(data, sent.l3, self.family)))
            for data in (result.sent, result.data)
        ]
        return None if _same(*sums) else "transport checksum"

    def _judge_error(self, program: str, result: Result, sent: View) -> str | None:
        """An ICMP error: the quoted packet's one end and the error's are translated."""
        if sent.piece is Piece.LATER or result.verdict != Verdict.FORWARD:
            return "no ICMP error"
        before, after = (
            read(data, sent.l4 + 8, self.family, end=sent.end)
            for data in (result.sent, result.data)
        )
        got = read(result.data, sent.l3, self.family)
        if before is None or after is None or got is None or before.src[0] != sent.dst[0]:
            return "an ICMP error about nothing was touched"
        if program.startswith("egress"):
            endpoints = self._ends(after.dst, after.proto)
            right = before.dst in endpoints and got.dst == sent.dst
            right = right and _stands_for(before.src, after.src, after.proto)
        else:
            endpoints = self._ends(before.src, before.proto)
            right = after.src in endpoints and got.src == sent.src
            right = right and _stands_for(after.dst, before.dst, after.proto)
            right = right and got.dst[0] == after.src[0]
        if not right:
            return f"ICMP error about {before} became one about {after}"
        return self._wrong_error_bytes(result, sent, before)

    def _wrong_error_bytes(self, result: Result, sent: View, quoted: View) -> str | None:
        allowed = set(_address_bytes(sent.l3, self.family))
        allowed |= set(_address_bytes(quoted.l3, self.family))
        allowed |= {sent.l4 + 2, sent.l4 + 3, *range(quoted.l4, quoted.l4 + 4)}
        parts = [slice(sent.l4, None)]
        if self.family is Family.V4:
            parts += [slice(sent.l3, sent.l4), slice(quoted.l3, quoted.l4)]
        for part in parts:
            sums = [
                _sum(data[part], self._pseudo_sum(data, sent) if part is parts[0] else 0)
                for data in (result.sent, result.data)
            ]
            if not _same(*sums):
                return f"checksum of bytes {part}"
        return _stray(result, allowed, 0)


def _stands_for(seen: Address, client: Address, proto: int) -> bool:
    """Whether a backend may know the client so: by another port where two of its flows clash."""
    is_other_port = proto != Protocol.SCTP.number and seen[1] in NAT_PORTS
    return seen[0] == client[0] and (seen[1] == client[1] or is_other_port)


def _stray(result: Result, allowed: set[int], turned: int) -> str | None:
    """Bytes outside `allowed` that changed; `turned`: MAC addresses up to there change places."""
    sent = result.sent
    if turned == 14:
        sent = sent[6:12] + sent[:6] + sent[12:]
    pairs = enumerate(zip(sent, result.data, strict=True))
    stray = [at for at, (was, now) in pairs if was != now and at not in allowed]
    return f"bytes {stray} changed" if stray else None


def _address_bytes(l3: int, family: Family) -> range:
    """Where addresses and, with IPv4, the header checksum are."""
    return range(l3 + 10, l3 + 20) if family is Family.V4 else range(l3 + 8, l3 + 40)


def _ends(data: bytes, l3: int, family: Family) -> bytes:
    return data[l3 + 12 : l3 + 20] if family is Family.V4 else data[l3 + 8 : l3 + 40]


def _sum(data: bytes, start: int = 0) -> int:
    if len(data) % 2:
        data += b"\0"
    words: tuple[int, ...] = struct.unpack(f"!{len(data) // 2}H", data)
    return start + sum(words)


def _same(one: int, two: int) -> bool:
    """Equal as sums of ones' complement."""
    return one % 0xFFFF == two % 0xFFFF
