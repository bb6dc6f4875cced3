"""Build packets and judge them: the cast of every packet test, and what a program did to a packet.

Addresses are those of `Net`, the same cast in both families. Comparisons are of whole packets,
every byte, so that each checksum must be the one Scapy computes anew.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from scapy.all import (
    ICMP,
    IP,
    SCTP,
    TCP,
    UDP,
    Ether,
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPOption_NOP,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    Packet,
    PadN,
    Raw,
    SCTPChunkInit,
    fragment,
)

from ebpf_svc.dataplane.ebpf import constants
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.model.net import Family, Protocol

Address = tuple[str, int]
"""An address and a port."""

MASQUERADED = constants.MASQUERADE_MARK
CLUSTER_CIDRS = ("10.244.0.0/16", "fd00:10:244::/48")

_CLIENT_MAC, _NODE_MAC = "02:00:00:00:00:0a", "02:00:00:00:00:01"


class Verdict(IntEnum):
    """`TC_ACT_*`, those our programs may give."""

    FORWARD = 0xFFFFFFFF
    """`TC_ACT_UNSPEC`: on to the next filter."""
    SHOT = 2
    STOLEN = 4
    REDIRECT = 7


@dataclass(frozen=True, slots=True)
class Net:
    """Who is who."""

    vip: str
    other_vip: str
    node: str
    """An address of this node, for NodePorts."""
    node_too: str
    outside: str
    """A client beyond the cluster."""
    outside_too: str
    router: str
    pod: str
    """A client inside the cluster."""
    a: str
    """Pods that serve."""
    b: str
    c: str
    hairpin: str
    discard: str


NETS = {
    Family.V4: Net(
        *("10.96.0.10", "10.96.0.11", "172.18.0.2", "172.18.1.2"),
        *("192.0.2.10", "192.0.2.77", "192.0.2.1", "10.244.1.5"),
        *("10.244.1.21", "10.244.2.22", "10.244.3.23"),
        *(constants.HAIRPIN_ADDRESS[Family.V4], constants.DISCARD_ADDRESS[Family.V4]),
    ),
    Family.V6: Net(
        *("fd00:10:96::a", "fd00:10:96::b", "2001:db8:18::2", "2001:db8:18:1::2"),
        *("2001:db8:2::10", "2001:db8:2::77", "2001:db8:2::1", "fd00:10:244:1::5"),
        *("fd00:10:244:1::21", "fd00:10:244:2::22", "fd00:10:244:3::23"),
        *(constants.HAIRPIN_ADDRESS[Family.V6], constants.DISCARD_ADDRESS[Family.V6]),
    ),
}


def ip_of(packet: Packet) -> Packet:
    """The outer IP layer."""
    return packet[IP] if IP in packet else packet[IPv6]


def l4_of(packet: Packet) -> Packet | None:
    """The outer transport layer, None when there is none."""
    return next((packet[kind] for kind in (TCP, UDP, SCTP) if kind in packet), None)


def fresh(packet: Packet) -> Packet:
    """The packet with every outer checksum and length computed anew."""
    packet = packet.copy()
    ip = ip_of(packet)
    l4 = l4_of(packet)
    for layer, fields in ((ip, ("chksum", "len", "plen")), (l4, ("chksum", "len"))):
        for field in fields:
            if layer is not None and field in layer.fields and not isinstance(layer, SCTP):
                del layer.fields[field]
    return Ether(bytes(packet))


def with_ends(
    packet: Packet,
    *,
    src: Address | None = None,
    dst: Address | None = None,
    turned: bool = False,
) -> Packet:
    """The packet with other ends and right checksums: what a translation must make of it.

    Args:
        turned: the MAC addresses have changed places.
    """
    packet = packet.copy()
    ip, l4 = ip_of(packet), l4_of(packet)
    no_checksum = isinstance(l4, UDP) and l4.chksum == 0
    if src is not None:
        ip.src = src[0]
        if l4 is not None:
            l4.sport = src[1]
    if dst is not None:
        ip.dst = dst[0]
        if l4 is not None:
            l4.dport = dst[1]
    if turned:
        packet.src, packet.dst = packet.dst, packet.src
    packet = fresh(packet)
    if no_checksum:
        packet[UDP].chksum = 0
    return packet


def difference(got: bytes, wanted: bytes) -> str:
    """Say layer by layer what differs, as Scapy reads both."""
    lines: list[str] = []
    one, two = Ether(got), Ether(wanted)
    while one.name != "NoPayload" or two.name != "NoPayload":
        if one.name != two.name:
            return "\n".join([*lines, f"{one.summary()}  instead of  {two.summary()}"])
        for field in one.fields_desc:
            left, right = getattr(one, field.name), getattr(two, field.name)
            if left != right:
                lines.append(f"{one.name}.{field.name}: {left!r} instead of {right!r}")
        one, two = one.payload, two.payload
    return "\n".join([*lines, f"got    {got.hex()}", f"wanted {wanted.hex()}"])


@dataclass(frozen=True, slots=True)
class Result:
    """What a program did with a packet."""

    verdict: int
    data: bytes
    mark: int
    sent: bytes

    @property
    def packet(self) -> Packet:
        """The packet as it left."""
        return Ether(self.data)

    @property
    def src(self) -> Address:
        """Where it came from, to those it went to."""
        l4 = l4_of(self.packet)
        return ip_of(self.packet).src, l4.sport if l4 is not None else 0

    @property
    def dst(self) -> Address:
        """Where it went."""
        l4 = l4_of(self.packet)
        return ip_of(self.packet).dst, l4.dport if l4 is not None else 0

    def expect(
        self, packet: Packet | bytes, *, verdict: Verdict = Verdict.FORWARD, mark: int = 0
    ) -> Packet:
        """Assert that it left exactly so, every byte; gives the packet that left."""
        wanted = bytes(packet)
        assert self.verdict == verdict, f"verdict {self.verdict} instead of {verdict!r}"
        assert self.data == wanted, difference(self.data, wanted)
        assert self.mark == mark, f"mark {self.mark:#x} instead of {mark:#x}"
        return self.packet

    def expect_untouched(self, *, mark: int = 0) -> None:
        """Assert that it passed, not a byte changed."""
        self.expect(self.sent, mark=mark)

    def expect_dropped(self, verdict: Verdict = Verdict.SHOT) -> None:
        """Assert that it went nowhere."""
        assert self.verdict == verdict, f"verdict {self.verdict} instead of {verdict!r}"


_ICMPV6_ERRORS = {
    1: ICMPv6DestUnreach,
    2: ICMPv6PacketTooBig,
    3: ICMPv6TimeExceeded,
    4: ICMPv6ParamProblem,
}


class Wire:
    """Packets of one family."""

    def __init__(self, family: Family) -> None:
        self.family, self.net = family, NETS[family]

    @property
    def cluster_cidr(self) -> str:
        """Where pods live."""
        return CLUSTER_CIDRS[0 if self.family is Family.V4 else 1]

    @property
    def next_header(self) -> str:
        """Scapy's name of the field that says what follows the IP header."""
        return "proto" if self.family is Family.V4 else "nh"

    @property
    def longer_header(self) -> dict[str, Any]:
        """Arguments for a packet whose IP header is not the shortest."""
        if self.family is Family.V4:
            return {"options": [IPOption_NOP()] * 4}
        return {"extension": IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))])}

    def wire(self, at: Address) -> tuple[bytes, int]:
        """An address and port as map fields hold them."""
        return self._packed(at[0]), wire_port(at[1])

    def ip(self, src: str, dst: str, **fields: Any) -> Packet:
        """Ethernet and IP headers."""
        kind = IP if self.family is Family.V4 else IPv6
        return Ether(src=_CLIENT_MAC, dst=_NODE_MAC) / kind(src=src, dst=dst, **fields)

    def tcp(
        self, src: Address, dst: Address, flags: str = "S", payload: bytes = b"", **how: Any
    ) -> Packet:
        """A TCP segment."""
        segment = TCP(sport=src[1], dport=dst[1], flags=flags, seq=1000, ack=2000)
        return self._packet(src, dst, segment / payload, **how)

    def udp(self, src: Address, dst: Address, payload: bytes = b"question", **how: Any) -> Packet:
        """A UDP datagram."""
        return self._packet(src, dst, UDP(sport=src[1], dport=dst[1]) / payload, **how)

    def sctp(self, src: Address, dst: Address, chunk: type[Packet] = SCTPChunkInit) -> Packet:
        """An SCTP packet; by default it opens an association."""
        return self._packet(src, dst, SCTP(sport=src[1], dport=dst[1]) / chunk())

    def l4(self, proto: Protocol, src: Address, dst: Address, **how: Any) -> Packet:
        """A TCP segment or UDP datagram."""
        return (self.tcp if proto is Protocol.TCP else self.udp)(src, dst, **how)

    def icmp_echo(self, src: str, dst: str) -> Packet:
        """A ping."""
        echo = ICMP() if self.family is Family.V4 else ICMPv6EchoRequest()
        return Ether(bytes(self.ip(src, dst) / echo / b"ping"))

    def _packet(
        self,
        src: Address,
        dst: Address,
        rest: Packet,
        *,
        options: Sequence[Packet] = (),
        extension: Packet | None = None,
    ) -> Packet:
        headers = self.ip(src[0], dst[0], **({"options": list(options)} if options else {}))
        if extension is not None:
            headers = headers / extension
        return Ether(bytes(headers / rest))

    def icmp_error(
        self, src: str, dst: str, quoted: Packet, *, quoted_bytes: int = 28, **fields: Any
    ) -> Packet:
        """An ICMP error about a packet; by default it is unreachable for want of a port.

        Args:
            quoted: with its Ethernet header, which is not quoted.
            quoted_bytes: how much of it, when its IP header takes 20 bytes; more for IPv6.
            fields: of the ICMP header, by Scapy's names.
        """
        inner = bytes(quoted)[14:]
        if self.family is Family.V4:
            header = ICMP(**{"type": 3, "code": 3, **fields})
            # Not a layer of Scapy's: it would mend the quoted checksums.
            return Ether(bytes(self.ip(src, dst) / header / Raw(inner[:quoted_bytes])))
        kind = _ICMPV6_ERRORS[fields.pop("type", 1)]
        header = kind(**({"code": 4} | fields if kind is ICMPv6DestUnreach else fields))
        return Ether(bytes(self.ip(src, dst) / header / Raw(inner[: quoted_bytes + 20])))

    def fragments(self, packet: Packet, *, ident: int = 77, size: int = 800) -> list[Packet]:
        """The packet in pieces of `size` bytes behind the headers."""
        if self.family is Family.V4:
            whole = packet.copy()
            whole[IP].id, whole[IP].chksum = ident, None
            return [Ether(bytes(piece)) for piece in fragment(whole, fragsize=size)]
        rest = bytes(packet)[54:]
        pieces = []
        for start in range(0, len(rest), size):
            header = IPv6ExtHdrFragment(
                offset=start // 8, m=int(start + size < len(rest)), id=ident, nh=packet[IPv6].nh
            )
            ip = self.ip(packet[IPv6].src, packet[IPv6].dst, nh=44)
            ip.src, ip.dst = packet.src, packet.dst
            pieces.append(Ether(bytes(ip / header / Raw(rest[start : start + size]))))
        return pieces

    def _packed(self, address: str) -> bytes:
        return socket.inet_pton(
            socket.AF_INET if self.family is Family.V4 else socket.AF_INET6, address
        )
