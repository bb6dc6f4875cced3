"""Lead packets to the relay without netfilter: it listens at the frontends' own addresses.

The addresses of services become this node's by routes, so a packet to a frontend without a door is
refused by the kernel itself (P2). Who must hear nothing (P3, P4, P10) is dropped by a classic BPF
program on the listening socket, before there is a connection.

What netfilter does better: here a program of the node that listens at every address gets what comes
to a service's address at a port that is none of the service's, and a port of its own may be taken.
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.inspect import KernelPart
from ebpf_svc.dataplane.netfilter.pods import pod_match
from ebpf_svc.dataplane.userspace.doors import DoorId, DoorPlan
from ebpf_svc.dataplane.userspace.rules import CLASSES
from ebpf_svc.dataplane.userspace.written import Written
from ebpf_svc.host import localroute
from ebpf_svc.model.desired import Frontend, FrontendKey, FrontendKind, PlanKey, ServicePlan
from ebpf_svc.model.net import Family, Sources, family_of

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
"""BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_ALU|AND|K, BPF_RET|K."""
_NETWORK_HEADER = 0xFFF00000
"""SKF_NET_OFF: offsets count from the IP header."""
_SOURCE_AT = {Family.V4: 12, Family.V6: 8}
PASS, DROP = 0xFFFFFFFF, 0
_INSTRUCTION = struct.Struct("=HBBI")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class DirectSteering:
    """Routes and sockets of the calling thread's network namespace."""

    def __init__(self, settings: Settings) -> None:
        self._pods: dict[Family, Network | None] = {}
        for family in settings.families:
            match = pod_match(settings, family)
            # Through which device a packet came no socket tells: such pods look like anyone (D2).
            prefix = match.prefix if match is not None else ""
            self._pods[family] = ipaddress.ip_network(prefix) if prefix else None
        self._held: set[str] = set()
        self._own: frozenset[str] = frozenset()

    def open(self) -> None:
        """Look at what an earlier run left."""
        self._held = localroute.present()
        self._own = localroute.own_addresses()

    def doors(self, plan: ServicePlan) -> list[DoorPlan]:
        """A door for each frontend; none where the kernel shall refuse."""
        if not plan.has_endpoints:
            return []
        self._own = localroute.own_addresses()
        return [
            DoorPlan(
                DoorId(plan.key, str(frontend.key)),
                frontend.key.address,
                frontend.key.port,
                partial(self._is_local, frontend),
                partial(attach, judge(list(self._verdicts(plan, frontend)), plan.key.family)),
            )
            for frontend in plan.frontends
        ]

    def write(self, plans: Mapping[PlanKey, ServicePlan], numbers: Mapping[DoorId, int]) -> Written:
        """Make every address of a service this node's own."""
        wanted = {
            frontend.key.address
            for plan in plans.values()
            for frontend in plan.frontends
            if frontend.kind is not FrontendKind.NODE_PORT
        }
        if wanted == self._held:
            return Written()
        added, gone = wanted - self._held, self._held - wanted
        localroute.add(added)
        localroute.remove(gone)
        self._held = wanted
        return Written(len(added) + len(gone))

    def verify(self) -> tuple[str, ...]:
        """Read the routes back."""
        self._own = localroute.own_addresses()
        present = localroute.present()
        missing = self._held - present - self._own
        foreign = present - self._held
        self._held = (self._held - missing) | foreign
        return (
            *(f"route to {address} was missing" for address in sorted(missing)),
            *(f"route to {address} was foreign" for address in sorted(foreign)),
        )

    def held(
        self, plans: Mapping[PlanKey, ServicePlan], numbers: Mapping[DoorId, int]
    ) -> set[FrontendKey]:
        """The frontends whose address is this node's and, unless refused, whose door is open."""
        here = localroute.present() | localroute.own_addresses()
        return {
            frontend.key
            for plan in plans.values()
            for frontend in plan.frontends
            if frontend.kind is FrontendKind.NODE_PORT or frontend.key.address in here
            if not plan.has_endpoints or DoorId(plan.key, str(frontend.key)) in numbers
        }

    def retire(self) -> None:
        """The doors are closed by then; open connections need the addresses."""

    def let_go(self) -> None:
        """Nothing but the doors holds a client."""

    def close(self) -> None:
        """Nothing is held."""

    def parts(self) -> list[KernelPart]:
        """The routes."""
        return [
            KernelPart("route", address, "table local", f"protocol {localroute.PROTOCOL}")
            for address in sorted(localroute.present())
        ]

    def drops(self) -> dict[str, int]:
        """The kernel counts what a socket's filter drops for all sockets together only."""
        return {}

    def _is_local(self, frontend: Frontend, address: str) -> bool:
        return bool(frontend.local_for & self._class_of(frontend, address))

    def _class_of(self, frontend: Frontend, address: str) -> Sources:
        # What the node sends to an address of its own has that address as source, too.
        if address == frontend.key.address or address in self._own:
            return Sources.NODE
        pods = self._pods.get(family_of(address))
        if pods is not None and ipaddress.ip_address(address) in pods:
            return Sources.POD
        return Sources.EXTERNAL

    def _verdicts(self, plan: ServicePlan, frontend: Frontend) -> Iterator[tuple[Network, bool]]:
        """Which sources may come in; the first prefix that has a source decides, the last has all.

        Outside the ranges nobody may (P10); inside, those whose list has a backend (P3, P4).
        """
        family = plan.key.family
        everyone = ipaddress.ip_network("0.0.0.0/0" if family is Family.V4 else "::/0")
        serves = {
            source: any(
                each.in_local if frontend.local_for & source else each.in_cluster
                for each in plan.backends
            )
            for source in CLASSES
        }
        ranges = [ipaddress.ip_network(each) for each in frontend.source_ranges or ()]
        classes: list[tuple[Network, bool]] = [
            (ipaddress.ip_network(each), serves[Sources.NODE])
            for each in sorted({frontend.key.address, *self._own})
            if family_of(each) is family
        ]
        pods = self._pods[family]
        if pods is not None:
            classes.append((pods, serves[Sources.POD]))
        classes.append((everyone, serves[Sources.EXTERNAL]))
        if frontend.source_ranges is None:
            yield from classes
            return
        for prefix, may in classes:
            for inside in ranges:
                # Two prefixes are apart, or one has the other.
                if prefix.subnet_of(inside):  # type: ignore[arg-type]
                    yield prefix, may
                elif inside.subnet_of(prefix):  # type: ignore[arg-type]
                    yield inside, may
            # Of this class, but in none of the ranges; later ones must not let it in.
            yield prefix, False


def judge(verdicts: Iterable[tuple[Network, bool]], family: Family) -> bytes | None:
    """A classic BPF program that finds the first prefix with a packet's source.

    Returns:
        The instructions; None when everyone may come in.
    """
    listed = list(verdicts)
    if all(may for _, may in listed):
        return None
    program: list[tuple[int, int, int, int]] = []
    for prefix, may in listed:
        program += _match(prefix, family, PASS if may else DROP)
    program.append((_RETURN, 0, 0, DROP))
    return b"".join(_INSTRUCTION.pack(*each) for each in program)


def _match(prefix: Network, family: Family, verdict: int) -> list[tuple[int, int, int, int]]:
    """Instructions that return a verdict for sources inside a prefix, and go on for others."""
    words = []
    packed, mask = prefix.network_address.packed, prefix.netmask.packed
    for at in range(0, len(packed), 4):
        bits = int.from_bytes(mask[at : at + 4])
        if bits:
            words.append((at, bits, int.from_bytes(packed[at : at + 4])))
    found: list[tuple[int, int, int, int]] = []
    for number, (at, bits, value) in enumerate(words):
        # Over the three instructions of each word that follows, and the verdict.
        beyond = 3 * (len(words) - number - 1) + 1
        found.append((_LOAD, 0, 0, _NETWORK_HEADER + _SOURCE_AT[family] + at))
        found.append((_AND, 0, 0, bits))
        found.append((_EQUAL, 0, beyond, value))
    found.append((_RETURN, 0, 0, verdict))
    return found


def attach(program: bytes | None, sock: socket.socket) -> None:
    """Let the kernel judge what comes to a socket by a program; None = let all in."""
    if program is None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        except FileNotFoundError:  # there was none
            return
        return
    code = ctypes.create_string_buffer(program)
    value = struct.pack("HL", len(program) // _INSTRUCTION.size, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, value)
