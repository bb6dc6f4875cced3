"""Look single things up in the maps of an agent that runs or ran: what one client would meet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ebpf_svc.dataplane.ebpf.codec import Codec, number
from ebpf_svc.dataplane.ebpf.constants import (
    BESIDE_TRIES,
    NO_BACKEND,
    SYN_IDLE_S,
    UDP_IDLE_S,
    BackendFlag,
    FlowFlag,
    FlowState,
    FrontendFlag,
    LinkKind,
)
from ebpf_svc.dataplane.ebpf.entries import FrontendValue
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.ebpf.table import HashTable
from ebpf_svc.dataplane.ebpf.tables import FamilyTables, Tables
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol

Entry = tuple[bytes, bytes]
"""Key and value of a map."""
End = tuple[str, int]
"""An address and a port."""

_32_BITS = 0xFFFFFFFF
_ENDED = FlowState.CLIENT_FIN | FlowState.BACKEND_FIN | FlowState.RESET


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a client's affinity or flow leads to."""

    backend: End
    idle_s: int
    counts: bool
    """False: it is there, and a new connection takes no notice: over, or its endpoint is gone."""
    entry: Entry


@dataclass(frozen=True, slots=True)
class Noted:
    """What the entry of a flow says of the way its packets take."""

    flags: FlowFlag
    client_link: int
    """Index of the device whose other end is the client; 0 = none, or not known."""
    backend_link: int


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What the fast path may know of a device."""

    kind: LinkKind
    has_address: bool
    """The node has one of this family for what leaves by it."""


class Live:
    """The maps of one family."""

    def __init__(self, family: Family, tables: Tables) -> None:
        """Bind to open maps; raises LayoutMismatch."""
        self.family, self.tables = family, tables
        self.maps: FamilyTables = tables.family[family]
        self.codec = Codec(family, self.maps)

    def frontend(self, key: FrontendKey) -> FrontendValue | None:
        """The value of a frontend, draining ones included."""
        data = self.maps.frontends.lookup(self.codec.key(key))
        return None if data is None else self.codec.frontend_value(data)

    def affinity(
        self, value: FrontendValue, member: BackendFlag, *, client: str = "", netns: int = 0
    ) -> Remembered | None:
        """The backend a client stays with; None when nothing is remembered.

        Args:
            value: of the frontend it calls.
            member: of which list the backend must be.
            client: its address, on the packet path.
            netns: else the cookie of its network namespace, at the socket hooks.
        """
        table = self.maps.affinity
        who = netns.to_bytes(8, sys.byteorder) if netns else self.codec.pton(client)
        key = table.key.pack(
            client=who.ljust(16, b"\0"), service=value.service, by_netns=int(bool(netns))
        )
        found = table.lookup(key)
        if found is None:
            return None
        entry = table.value.unpack(found)
        idle_s = since_s(entry.seen_s)
        service, flags = self._backend(entry.backend_id)
        counts = idle_s <= value.affinity_s and service == value.service and bool(flags & member)
        return Remembered(self.endpoint(entry.backend_id), idle_s, counts, (key, found))

    def flow(self, value: FrontendValue, frontend: FrontendKey, client: End) -> Remembered | None:
        """The flow a client's port has to a frontend; None when there is none."""
        found = self._flow(self.maps.flows, value, frontend, client)
        if found is None:
            return None
        entry, at = self.maps.flows.value.unpack(found[1]), self.codec.at_raw
        idle_s = since_s(entry.seen_s)
        backend = at(entry.backend_addr, entry.backend_port, entry.backend_proto)
        service, flags = self._backend(entry.backend_id)
        counts = (
            not has_ended(frontend.protocol, entry.state, idle_s)
            and service == value.service
            and bool(flags & BackendFlag.SERVING)
            and self.at(entry.backend_id) == backend
        )
        return Remembered(self.codec.endpoint(backend), idle_s, counts, found)

    def noted(
        self, frontend: FrontendKey, client: End, flows: HashTable | None = None
    ) -> Noted | None:
        """What a client's flow to a frontend has noted of its way; None when there is none.

        Args:
            frontend: what was called.
            client: who called.
            flows: a table of the same layout to look in, instead of the live one.
        """
        value, table = self.frontend(frontend), flows or self.maps.flows
        found = self._flow(table, value, frontend, client) if value else None
        if found is None:
            return None
        entry = table.value.unpack(found[1])
        return Noted(FlowFlag(entry.flags), entry.client_link, entry.backend_link)

    def _flow(
        self, table: HashTable, value: FrontendValue, frontend: FrontendKey, client: End
    ) -> Entry | None:
        for second in (0, 1):
            key = table.key.pack(
                client=self.codec.pton(client[0]),
                service=value.service,
                client_port=wire_port(client[1]),
                proto=frontend.protocol.number,
                second=second,
            )
            found = table.lookup(key)
            if found is None:
                continue
            entry = table.value.unpack(found)
            at = self.codec.at_raw(entry.frontend_addr, entry.frontend_port, entry.frontend_proto)
            if at == self.codec.key(frontend):
                return key, found
        return None

    def reversed(self, flow: Entry) -> Entry:
        """The entry of `reverse` by which answers find a flow its backend knows by other ends."""
        key = self.maps.flows.key.unpack(flow[0])
        value = self.maps.flows.value.unpack(flow[1])
        has_port = value.flags & (FlowFlag.SNAT | FlowFlag.PORT)
        packed = self.maps.reverse.key.pack(
            backend_addr=value.backend_addr,
            backend_port=value.backend_port,
            backend_proto=value.backend_proto,
            client=value.nat if value.flags & FlowFlag.SNAT else key.client,
            port=value.nat_port if has_port else key.client_port,
        )
        return packed, flow[0]

    def link(self, index: int) -> LinkFacts | None:
        """What the fast path may know of a device; None = it must not use it."""
        table = self.maps.links
        found = table.lookup(table.key.pack(value=index))
        if found is None:
            return None
        entry = table.value.unpack(found)
        return LinkFacts(LinkKind(entry.kind), any(entry.addr))

    def flows_of(self, client: End) -> Iterator[Entry]:
        """Every flow of a client's port, whatever the service; walks the whole table."""
        layout = self.maps.flows.key
        packed, port = self.codec.pton(client[0]), wire_port(client[1])
        for key, value in self.maps.flows.items():
            if key.startswith(packed) and layout.unpack(key).client_port == port:
                yield key, value

    def drawn(
        self, value: FrontendValue, slots: tuple[int, int], frontend: FrontendKey, client: End
    ) -> End | None:
        """The backend a list gives a client's port, computed here as the programs compute it.

        Args:
            value: of the frontend.
            slots: first slot and length of the list.
            frontend: what is called.
            client: its port counts unless affinity goes by a Maglev table.

        Returns:
            None when the list is empty.
        """
        is_sticky = value.affinity_s and value.flags & FrontendFlag.MAGLEV
        return self._slot(slots, self.client_hash(frontend, client, sticky=bool(is_sticky)))

    def beside(
        self, slots: tuple[int, int], frontend: FrontendKey, client: End, endpoint: End
    ) -> End | None:
        """Another backend of the list than the one where the client's port is in use for another
        address of the service; None = there is none near.
        """
        fraction = self.client_hash(frontend, client)
        for _ in range(BESIDE_TRIES if slots[1] else 0):
            fraction = fraction + _32_BITS // slots[1] + 1 & _32_BITS
            if (found := self._slot(slots, fraction)) != endpoint:
                return found
        return None

    def _slot(self, slots: tuple[int, int], fraction: int) -> End | None:
        first, count = slots
        if not count:
            return None
        backend = number(self.tables.slots.read(first + (fraction * count >> 32), 1))
        return None if backend == NO_BACKEND else self.endpoint(backend)

    def client_hash(self, frontend: FrontendKey, client: End, *, sticky: bool = False) -> int:
        """What the programs choose by; sticky: whatever the client's port is."""
        settings = self.tables.settings
        found = settings.lookup(settings.key.pack(value=0))
        seed = settings.value.unpack(found).hash_seed if found else 0
        port = 0 if sticky else client[1]
        return _client_hash(seed, self.codec.pton(client[0]), frontend, port)

    def endpoint(self, backend: int) -> End:
        """Address and port of a backend."""
        return self.codec.endpoint(self.at(backend))

    def at(self, backend: int) -> bytes:
        """The `l4_addr` of a backend."""
        maps, start = self.maps.backends, backend * self.maps.backends.stride
        return bytes(maps.view(backend + 1)[start : start + self.codec.at_size])

    def _backend(self, backend: int) -> tuple[int, int]:
        """Service and flags of a backend."""
        maps = self.maps.backends
        if not NO_BACKEND < backend < maps.max_entries:
            return 0, 0
        service, _, flags = self.codec.backend_words(maps.view(backend + 1), backend * maps.stride)
        return service, flags


def since_s(seen_s: int) -> int:
    """Seconds since the programs noted a time."""
    now_s = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000_000
    difference = now_s - seen_s & _32_BITS
    return 0 if difference >> 31 else difference


def has_ended(protocol: Protocol, state: int, idle_s: int) -> bool:
    """Whether a client may use its port for another flow, as the programs see it."""
    if protocol is Protocol.UDP:
        return idle_s > UDP_IDLE_S
    if state & _ENDED:
        return True
    return not state & FlowState.ESTABLISHED and idle_s > SYN_IDLE_S


def _client_hash(seed: int, client: bytes, frontend: FrontendKey, client_port: int) -> int:
    ports = wire_port(frontend.port) << 16 | wire_port(client_port)
    value = mixed(seed, [*words(client), ports, frontend.protocol.number])
    value = value * 0xC2B2AE35 & _32_BITS
    return value ^ value >> 16


def words(address: bytes) -> list[int]:
    """An address as the programs hash it."""
    return [int.from_bytes(address[i : i + 4], sys.byteorder) for i in range(0, len(address), 4)]


def mixed(value: int, numbers: Iterable[int]) -> int:
    """A hash the programs make (`mix` in C), but for what some do to it in the end."""
    for word in numbers:
        value ^= word * 0xCC9E2D51 & _32_BITS
        value = (value << 13 | value >> 19) & _32_BITS
        value = value * 5 + 0xE6546B64 & _32_BITS
    value ^= value >> 16
    value = value * 0x85EBCA6B & _32_BITS
    return value ^ value >> 13
