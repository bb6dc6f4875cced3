"""What the relay listens at: one door for each service port, family and list of backends (U1)."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ebpf_svc.model.desired import PlanKey
from ebpf_svc.model.net import Family, Protocol

BACKLOG = 4096
"""The kernel takes less where net.core.somaxconn says so."""
IP_FREEBIND = 15
"""Not in Python's socket module. The address is ours by a route, and IPv6 wants to be told."""
UDP_QUEUE_BYTES = 1 << 20


class DoorId(NamedTuple):
    """What makes a door the same from plan to plan."""

    key: PlanKey
    name: str
    """`cluster`, `local`, or the address of a frontend."""


def no_guard(_: socket.socket) -> None:
    """Netfilter has judged already."""


@dataclass(frozen=True, slots=True)
class DoorPlan:
    """How one door is to be."""

    id: DoorId
    address: str
    number: int
    """The port; 0 = any of `port_range`."""
    is_local: Callable[[str], bool]
    """Whether a client, given by its address, gets the Local list."""
    guard: Callable[[socket.socket], None] = no_guard
    """Lets the kernel drop what this door is not open for."""
    preferred: int = 0
    """A port to be tried first: flows of an earlier agent go there."""

    @property
    def key(self) -> PlanKey:
        return self.id.key

    @property
    def protocol(self) -> Protocol:
        return self.id.key.port_name.protocol


def listen(plan: DoorPlan, ports: tuple[int, int]) -> socket.socket:
    """Open the socket of a door, in this thread's network namespace.

    Args:
        plan: the door.
        ports: where it may listen, unless its plan says (U1).

    Raises:
        OSError: no port is free, or the address is not of this host.
    """
    family = socket.AF_INET6 if plan.key.family is Family.V6 else socket.AF_INET
    kind = socket.SOCK_DGRAM if plan.protocol is Protocol.UDP else socket.SOCK_STREAM
    failure: OSError | None = None
    for number in _candidates(plan, ports):
        sock = socket.socket(family, kind)
        try:
            sock.setblocking(False)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
            plan.guard(sock)
            if kind == socket.SOCK_STREAM:
                # Connections of an agent that died must not keep the next one from its port.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((plan.address, number))
                sock.listen(BACKLOG)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_QUEUE_BYTES)
                sock.bind((plan.address, number))
        except OSError as error:
            sock.close()
            failure = error
            continue
        return sock
    raise failure or OSError(f"no port of {ports[0]}-{ports[1]} is free")


def _candidates(plan: DoorPlan, ports: tuple[int, int]) -> Iterator[int]:
    if plan.number:
        yield plan.number
        return
    low, high = ports
    if plan.preferred and (ports == (0, 0) or low <= plan.preferred <= high):
        yield plan.preferred
    if ports == (0, 0):
        yield 0
        return
    # From a random place, so that the ports taken already are seldom tried first.
    count = high - low + 1
    start = random.randrange(count)
    yield from (low + (start + step) % count for step in range(count))
