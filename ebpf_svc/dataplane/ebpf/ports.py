"""What a client's port is in use for, by the maps of an agent that runs or ran.

Nothing is written. A note of a direct call that another has replaced is not there to be found.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ebpf_svc.dataplane.ebpf.constants import (
    DIRECT_LEASE,
    DIRECT_NOTES,
    DIRECT_SERVICE,
    NAT_PORTS,
    NAT_TRIES,
    UDP_IDLE_S,
    FlowFlag,
)
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.ebpf.live import End, Entry, Live, has_ended, mixed, since_s, words
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Protocol


@dataclass(frozen=True, slots=True)
class Use:
    """A flow of a client's port."""

    service: int
    second: int
    """As in its key."""
    frontend: End
    """What was called: of a direct call the endpoint."""
    endpoint: End
    idle_s: int
    is_alive: bool
    has_other_port: bool
    """The endpoint sees another port, and the client's own is free there."""

    @property
    def is_direct(self) -> bool:
        """The endpoint itself was called."""
        return self.service == DIRECT_SERVICE


@dataclass(frozen=True, slots=True)
class NatPort:
    """A port that may stand for a client's towards an endpoint."""

    port: int
    holder: End | None = None
    """The client for which it does already; None = it is free."""
    flow: Entry | None = None
    """The holder's."""


class Ports:
    """Looks in the maps of one family."""

    def __init__(self, live: Live) -> None:
        """Bind to open maps."""
        self._live, self._maps, self._codec = live, live.maps, live.codec

    def uses(self, flows: Iterable[Entry], protocol: Protocol) -> Iterator[Use]:
        """What the flows of a client's port are for; those of other protocols are left out."""
        codec, layouts = self._codec, self._maps.flows
        for packed, data in flows:
            key, value = layouts.key.unpack(packed), layouts.value.unpack(data)
            if key.proto != protocol.number:
                continue
            frontend = codec.at_raw(value.frontend_addr, value.frontend_port, value.frontend_proto)
            backend = codec.at_raw(value.backend_addr, value.backend_port, value.backend_proto)
            is_there = key.service == DIRECT_SERVICE or self._live.at(value.backend_id) == backend
            idle_s = since_s(value.seen_s)
            yield Use(
                service=key.service,
                second=key.second,
                frontend=codec.endpoint(frontend),
                endpoint=codec.endpoint(backend),
                idle_s=idle_s,
                is_alive=is_there and not has_ended(protocol, value.state, idle_s),
                has_other_port=bool(value.flags & FlowFlag.PORT),
            )

    def is_endpoint(self, at: FrontendKey) -> bool:
        """Whether a service has an endpoint there, or one had that still has flows."""
        return self._maps.backend_index.lookup(self._codec.key(at)) is not None

    def direct_notes(self) -> bytes:
        """A copy of the notes of calls to endpoints themselves."""
        notes = self._maps.direct
        return notes.read(0, notes.max_entries)

    def direct_note(self, client: End, endpoint: End, protocol: Protocol) -> int | None:
        """Seconds since a client's port called an endpoint itself, by TCP since it began to; None
        when there is no note that counts.
        """
        ends = self.direct_hash(client, endpoint, protocol)
        note = self._maps.direct.value.unpack(self._maps.direct.read(1 + ends % DIRECT_NOTES, 1))
        if note.ends != ends or not note.seen_s or protocol is Protocol.SCTP:
            return None
        idle_s = since_s(note.seen_s)
        return None if protocol is Protocol.UDP and idle_s > UDP_IDLE_S else idle_s

    def searches_direct(self) -> bool:
        """Whether packets of direct calls are searched for a flow."""
        lease = self._maps.direct.value.unpack(self._maps.direct.read(DIRECT_LEASE, 1))
        return bool(lease.seen_s)

    def own_note(self, frontend: FrontendKey, asked: End) -> tuple[int, Entry] | None:
        """The note that a process of the node asked somebody from a frontend's own address and
        port, and the seconds since the last datagram of the two (B9).
        """
        end = frontend.address, frontend.port
        key = self._reverse_key(end, asked, frontend.protocol)
        found = self._maps.reverse.lookup(key)
        if found is None or (note := self._maps.flows.key.unpack(found)).proto:
            return None
        return since_s(note.service), (key, found)

    def nat_ports(
        self, first: int, call: FrontendKey, client: End, endpoint: End, seen_as: str
    ) -> Iterator[NatPort]:
        """The ports a new flow tries, in order.

        Args:
            first: the hash that says where it begins.
            call: what is called: a flow that is there may go on with its port.
            client: who calls.
            endpoint: where it goes.
            seen_as: the address those ports are of.
        """
        for step in range(NAT_TRIES):
            port = NAT_PORTS[(first + step & 0xFFFFFFFF) % len(NAT_PORTS)]
            flow = self._flow_at(endpoint, (seen_as, port), call.protocol)
            holder = None if flow is None else self._client(flow[0])
            if flow is None or (holder == client and self._frontend(flow) == call):
                yield NatPort(port)
            else:
                yield NatPort(port, holder, flow)

    def _flow_at(self, endpoint: End, seen_as: End, protocol: Protocol) -> Entry | None:
        """The living flow that an endpoint knows by these ends."""
        reverse = self._reverse_key(endpoint, seen_as, protocol)
        key = self._maps.reverse.lookup(reverse)
        data = self._maps.flows.lookup(key) if key else None
        if key is None or data is None or self._live.reversed((key, data))[0] != reverse:
            return None
        value = self._maps.flows.value.unpack(data)
        return None if has_ended(protocol, value.state, since_s(value.seen_s)) else (key, data)

    def _client(self, packed: bytes) -> End:
        key = self._maps.flows.key.unpack(packed)
        return self._text(key.client), wire_port(key.client_port)

    def _frontend(self, flow: Entry) -> FrontendKey:
        value = self._maps.flows.value.unpack(flow[1])
        at = self._codec.at_raw(value.frontend_addr, value.frontend_port, value.frontend_proto)
        return self._codec.frontend_key(at)

    def _reverse_key(self, backend: End, client: End, protocol: Protocol) -> bytes:
        return self._maps.reverse.key.pack(
            backend_addr=self._codec.pton(backend[0]),
            backend_port=wire_port(backend[1]),
            backend_proto=protocol.number,
            client=self._codec.pton(client[0]),
            port=wire_port(client[1]),
        )

    def own_addresses(self) -> set[str]:
        """Addresses of this node whose ports may stand for clients'."""
        links = self._maps.links
        addresses = {links.value.unpack(value).addr for _, value in links.items()}
        return {self._text(each) for each in addresses if any(each)}

    def _text(self, packed: bytes) -> str:
        kind = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
        return socket.inet_ntop(kind, packed)

    def direct_hash(self, client: End, endpoint: End, protocol: Protocol) -> int:
        """By what a direct call is noted, and its other port chosen."""
        both = zip(
            words(self._codec.pton(endpoint[0])), words(self._codec.pton(client[0])), strict=True
        )
        ports = wire_port(endpoint[1]) << 16 | wire_port(client[1])
        return mixed(protocol.number, [*(word for pair in both for word in pair), ports])
