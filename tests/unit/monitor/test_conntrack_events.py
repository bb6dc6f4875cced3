"""What connection tracking's notifications say, byte by byte."""

from __future__ import annotations

import socket
import struct

import pytest

from ebpf_svc.dataplane.inspect import Happening
from ebpf_svc.dataplane.netfilter.events import event_from
from ebpf_svc.host.netlink import Message, attribute
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Protocol

NEW, DESTROY = 0x100, 0x102
End = tuple[str, int]
CLIENT, VIP, POD, NODE = ("203.0.113.9", 4000), ("10.96.0.1", 80), ("10.244.1.5", 8080), "10.0.0.1"


def _tuple(kind: int, source: End, destination: End, number: int) -> bytes:
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    first = 3 if family == socket.AF_INET6 else 1
    addresses = b"".join(
        attribute(first + i, socket.inet_pton(family, end[0]))
        for i, end in enumerate((source, destination))
    )
    ports = attribute(1, bytes([number])) + b"".join(
        attribute(2 + i, struct.pack("!H", end[1])) for i, end in enumerate((source, destination))
    )
    return attribute(kind | 0x8000, attribute(1 | 0x8000, addresses) + attribute(2 | 0x8000, ports))


def _message(
    kind: int, original: tuple[End, End], reply: tuple[End, End], number: int = 6
) -> Message:
    family = socket.AF_INET6 if ":" in original[0][0] else socket.AF_INET
    body = struct.pack("=BBH", family, 0, 0)
    return Message(kind, body + _tuple(1, *original, number) + _tuple(2, *reply, number))


@pytest.mark.parametrize(
    ("kind", "what"), [(NEW, Happening.OPENED), (DESTROY, Happening.CLOSED)], ids=["new", "destroy"]
)
def test_translated_flow_is_told(kind: int, what: Happening) -> None:
    """Client and frontend from one direction, endpoint and masquerade from the other."""
    event = event_from(_message(kind, (CLIENT, VIP), (POD, (NODE, 1234))), 5.0)
    assert event is not None
    assert (event.what, event.client, event.client_port) == (what, *CLIENT)
    assert (event.frontend, event.backend) == (FrontendKey(*VIP, Protocol.TCP), POD)
    assert (event.masquerade, event.hairpin) == (True, False)


def test_ipv6_and_udp() -> None:
    """Kept source, and a pod that calls itself."""
    pod, vip = ("fd00::5", 4000), ("fd00:96::1", 53)
    message = _message(NEW, (pod, vip), (("fd00::5", 5353), pod), 17)
    event = event_from(message, 5.0)
    assert event is not None
    assert (event.frontend.protocol, event.masquerade, event.hairpin) == (Protocol.UDP, False, True)


@pytest.mark.parametrize(
    "message",
    [
        _message(NEW, (CLIENT, POD), (POD, CLIENT)),
        _message(NEW, (CLIENT, VIP), (POD, CLIENT), 47),
        _message(0x101, (CLIENT, VIP), (POD, CLIENT)),
        Message(NEW, struct.pack("=BBH", socket.AF_INET, 0, 0) + attribute(1, b"")),
    ],
    ids=["not translated", "GRE", "another message", "cut"],
)
def test_the_rest_is_not_told(message: Message) -> None:
    """What no service translated is nobody's business."""
    assert event_from(message, 5.0) is None
