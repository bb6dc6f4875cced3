"""Read flows in bulk: columns of a chunk of the map, and single entries of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ebpf_svc.dataplane.ebpf.codec import Codec
from ebpf_svc.dataplane.ebpf.constants import SYN_IDLE_S, TCP_IDLE_S, UDP_IDLE_S, FlowState
from ebpf_svc.dataplane.ebpf.tables import FamilyTables
from ebpf_svc.model.net import Protocol

CLOSED_S = 10
"""How long a closed TCP flow still translates what was under way."""

_UDP = Protocol.UDP.number
_BOTH_FINS = int(FlowState.CLIENT_FIN | FlowState.BACKEND_FIN)
_RESET, _ESTABLISHED = int(FlowState.RESET), int(FlowState.ESTABLISHED)


class Flow(NamedTuple):
    """One entry, as far as anybody but the programs needs it."""

    client: bytes
    client_port: int
    protocol: int
    service: int
    frontend: bytes
    """An `l4_addr`, as the key of the frontends."""
    backend: bytes
    backend_id: int
    state: int
    idle_s: int


def is_closed(flow: Flow) -> bool:
    """Whether a flow of TCP or SCTP was reset, or ended by both sides."""
    return _is_closed(flow.state)


def is_alive(flow: Flow) -> bool:
    """Whether the next packet of the client goes on with this flow, as the programs see it."""
    return flow.idle_s <= idle_limit_s(flow.protocol, flow.state)


def idle_limit_s(protocol: int, state: int) -> int:
    """How long a flow may go unused, in seconds; SCTP's chunks are told as TCP's flags."""
    if protocol == _UDP:
        return UDP_IDLE_S
    if _is_closed(state):
        return CLOSED_S
    return TCP_IDLE_S if state & _ESTABLISHED else SYN_IDLE_S


def has_connections(codec: Codec, tables: FamilyTables) -> bool:
    """Whether any flow needs the programs until it ends: of TCP or SCTP, alive and not closed."""
    return any(
        flow.protocol != _UDP and is_alive(flow) and not is_closed(flow)
        for chunk in FlowReader(codec, tables).chunks()
        for flow in map(chunk.flow, range(len(chunk.services())))
    )


def _is_closed(state: int) -> bool:
    return bool(state & _RESET) or state & _BOTH_FINS == _BOTH_FINS


class Chunk:
    """Some flows of one family."""

    def __init__(self, reader: FlowReader, keys: bytes, values: bytes) -> None:
        self._reader, self._keys, self._values = reader, keys, values

    def backend_ids(self) -> Sequence[int]:
        """The backend of each flow, without a line of Python per flow."""
        reader = self._reader
        return memoryview(self._values).cast("I")[reader.backend_at :: reader.value_words]

    def services(self) -> Sequence[int]:
        """The service of each flow."""
        reader = self._reader
        return memoryview(self._keys).cast("I")[reader.service_at :: reader.key_words]

    def key(self, index: int) -> bytes:
        size = self._reader.key_words * 4
        return self._keys[index * size : (index + 1) * size]

    def flow(self, index: int) -> Flow:
        return self._reader.parse(self._keys, self._values, index)


class FlowReader:
    """Reads the flows of one family."""

    def __init__(self, codec: Codec, tables: FamilyTables) -> None:
        """Bind to the layouts; raises LayoutMismatch."""
        self._table, self._codec = tables.flows, codec
        key, value = tables.flows.key, tables.flows.value
        key.require("client", "service", "client_port", "proto", "second")
        self._key, self._value = key, value
        self.key_words, self.value_words = key.size // 4, value.size // 4
        self.service_at = key.offset("service") // 4
        self.backend_at = value.offset("backend_id") // 4
        self._now_s = 0

    def chunks(self) -> Iterator[Chunk]:
        """All flows; those that change meanwhile may be missed or seen twice."""
        # Programs read its coarse sister, which stops in suspend as this one does.
        for keys, values, _ in self._table.chunks():
            self._now_s = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000_000
            yield Chunk(self, keys, values)

    def parse(self, keys: bytes, values: bytes, index: int) -> Flow:
        key = self._key.unpack(keys, index * self._key.size)
        value = self._value.unpack(values, index * self._value.size)
        at = self._codec.at_raw
        return Flow(
            client=key.client,
            client_port=key.client_port,
            protocol=key.proto,
            service=key.service,
            frontend=at(value.frontend_addr, value.frontend_port, value.frontend_proto),
            backend=at(value.backend_addr, value.backend_port, value.backend_proto),
            backend_id=value.backend_id,
            state=value.state,
            idle_s=_idle_s(self._now_s, value.seen_s),
        )


def _idle_s(now_s: int, seen_s: int) -> int:
    """Seconds since a flow was seen, in the 32 bits the programs count with; never negative."""
    difference = now_s - seen_s & 0xFFFFFFFF
    return 0 if difference >> 31 else difference
