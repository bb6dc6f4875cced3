"""What live maps remember of a client: flows, affinity, and what its port is in use for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ebpf_svc.dataplane.ebpf.constants import (
    DIRECT_SERVICE,
    UDP_IDLE_S,
    BackendFlag,
    FrontendFlag,
)
from ebpf_svc.dataplane.ebpf.entries import FrontendValue
from ebpf_svc.dataplane.ebpf.live import Entry, Live, Remembered
from ebpf_svc.dataplane.ebpf.ports import NatPort, Ports, Use
from ebpf_svc.explain.model import Call, End, ListName, Memory, members
from ebpf_svc.host import sockets
from ebpf_svc.model.desired import FrontendView
from ebpf_svc.model.net import Protocol


@dataclass(frozen=True, slots=True)
class Seeds:
    """What a client meets in the live maps."""

    flows: tuple[Entry, ...] = ()
    """Its own, and those that hold ports it might get."""
    affinity: tuple[Entry, ...] = ()
    reverse: tuple[Entry, ...] = ()
    """The note that the node asked it."""
    direct: bytes = b""
    """All notes of calls to endpoints themselves; empty = none."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A process of the node that waits for a datagram from a client's port (B9)."""

    is_connected: bool
    """Its socket says to whom it talks; else the sending was noted."""
    idle_s: int | None = None
    """Since the last datagram either way, where that is noted."""


@dataclass(frozen=True, slots=True)
class PortFacts:
    """What is known of a client's port beforehand."""

    uses: tuple[Use, ...] = ()
    """Flows for which endpoints see it, alive, besides the one of the call."""
    direct: Mapping[End, int] = field(default_factory=dict)
    """Endpoints that it calls directly -> seconds since, as noted."""
    tries: Mapping[tuple[End, str], tuple[NatPort, ...]] = field(default_factory=dict)
    """By endpoint and address: which ports a flow tries there."""
    asked: Asked | None = None

    @property
    def taken(self) -> frozenset[End]:
        """Endpoints that see the port in use."""
        return frozenset({*(use.endpoint for use in self.uses), *self.direct})

    def other_port(self, endpoint: End, address: str) -> int | None:
        """The first port that is free; None = none is."""
        tries = self.tries.get((endpoint, address), ())
        return next((each.port for each in tries if each.holder is None), None)


@dataclass(frozen=True, slots=True)
class Recollection:
    """What the live maps remember of a client."""

    memory: Memory
    affinity: Remembered | None = None
    flow: Remembered | None = None
    seeds: Seeds = Seeds()
    port: PortFacts | None = None
    """None: no port was named, or no packet of it meets a program."""


NOTHING = Recollection(Memory())


def recall(
    live: Live, call: Call, view: FrontendView, name: ListName, *, netns: int, port_matters: bool
) -> Recollection:
    """Look up what the maps remember of a caller.

    Args:
        live: the maps.
        call: who calls what.
        view: the frontend.
        name: the list the caller gets.
        netns: cookie of the node's namespace, for calls at sockets.
        port_matters: the caller's port was named, so what it is in use for counts.
    """
    value = live.frontend(call.frontend)
    if value is None:
        return NOTHING
    is_local = name is ListName.LOCAL
    affinity = None
    if view.affinity_s and (call.client[0] or call.at_socket):
        member = BackendFlag.IN_LOCAL if is_local else BackendFlag.IN_CLUSTER
        who = netns if call.at_socket else 0
        affinity = live.affinity(value, member, client=call.client[0], netns=who)
    lasting = affinity.backend if affinity and affinity.counts else None
    if call.at_socket or not call.client[0]:
        return Recollection(Memory(affinity=lasting), affinity)
    slots = (
        (value.local_first, value.local_count)
        if is_local
        else (value.cluster_first, value.cluster_count)
    )
    seeds = Seeds(affinity=(affinity.entry,) if affinity else ())
    known = Recollection(Memory(affinity=lasting), affinity, seeds=seeds)
    if port_matters:
        endpoints = members(view, name)
        return _recall_port(live, call, value, known, slots=slots, endpoints=endpoints)
    if not value.flags & FrontendFlag.MAGLEV:
        return known
    drawn = live.drawn(value, slots, call.frontend, call.client)
    return replace(known, memory=replace(known.memory, maglev=drawn))


def _recall_port(
    live: Live,
    call: Call,
    value: FrontendValue,
    known: Recollection,
    *,
    slots: tuple[int, int],
    endpoints: tuple[End, ...],
) -> Recollection:
    """Add what the caller's port is in use for."""
    key, client, ports = call.frontend, call.client, Ports(live)
    flow, flows = live.flow(value, key, client), tuple(live.flows_of(client))
    uses = tuple(ports.uses(flows, key.protocol))
    other = _other(uses, value.service, call)
    drawn = live.drawn(value, slots, key, client)
    if other is not None and other.is_alive and other.endpoint == drawn and not value.affinity_s:
        drawn = live.beside(slots, key, client, drawn) or drawn
    note = ports.own_note(key, client)
    addresses = {client[0], *ports.own_addresses()}
    facts = PortFacts(
        _shown(uses, endpoints, value.service, other),
        _direct(ports, call, endpoints),
        _tries(ports, live.client_hash(key, client), call, endpoints, addresses),
        _asked(call, note[0] if note else None),
    )
    by_table = bool(value.flags & FrontendFlag.MAGLEV)
    memory = replace(
        known.memory,
        flow=flow.backend if flow and flow.counts else None,
        maglev=drawn if by_table else None,
        drawn=None if by_table else drawn,
        taken=facts.taken,
        stuck=_stuck(facts, call),
        answers=facts.asked is not None,
    )
    seeds = replace(
        known.seeds,
        flows=(*flows, *_held(facts)),
        reverse=(note[1],) if note else (),
        direct=ports.direct_notes(),
    )
    return replace(known, memory=memory, flow=flow, seeds=seeds, port=facts)


def recall_direct(live: Live, call: Call) -> Recollection:
    """The same of a port that calls an endpoint itself."""
    ports, endpoint = Ports(live), call.frontend[:2]
    if not ports.is_endpoint(call.frontend):
        return NOTHING
    flows = tuple(live.flows_of(call.client))
    uses = tuple(ports.uses(flows, call.frontend.protocol))
    goes_on = ports.searches_direct() and any(
        use.is_direct and use.is_alive and use.endpoint == endpoint for use in uses
    )
    first = ports.direct_hash(call.client, endpoint, call.frontend.protocol)
    facts = PortFacts(
        _shown(uses, [endpoint], DIRECT_SERVICE, None),
        tries=_tries(ports, first, call, [endpoint], [call.client[0]]),
    )
    memory = Memory(
        flow=endpoint if goes_on else None, taken=facts.taken, stuck=_stuck(facts, call)
    )
    seeds = Seeds((*flows, *_held(facts)), direct=ports.direct_notes())
    return Recollection(memory, seeds=seeds, port=facts)


def _other(uses: Iterable[Use], service: int, call: Call) -> Use | None:
    """The flow to another frontend of the service that the program finds, which looks for the
    second of two only where it has to.
    """
    same = sorted((use for use in uses if use.service == service), key=lambda use: use.second)
    others = [use for use in same if use.frontend != call.frontend[:2]]
    if not others:
        return None
    is_found = call.frontend.protocol is Protocol.UDP or len(others) < len(same)
    return others[0] if is_found or not others[0].second else None


def _shown(
    uses: Iterable[Use], endpoints: Collection[End], service: int, other: Use | None
) -> tuple[Use, ...]:
    """Flows for which these endpoints see the client's own port, besides those of the service."""
    return tuple(
        use
        for use in uses
        if use.is_alive
        and not use.has_other_port
        and use.endpoint in endpoints
        and (use is other or use.service != service)
    )


def _direct(ports: Ports, call: Call, endpoints: Iterable[End]) -> dict[End, int]:
    noted = {
        endpoint: ports.direct_note(call.client, endpoint, call.frontend.protocol)
        for endpoint in endpoints
    }
    return {endpoint: idle_s for endpoint, idle_s in noted.items() if idle_s is not None}


def _tries(
    ports: Ports, first: int, call: Call, endpoints: Iterable[End], addresses: Collection[str]
) -> dict[tuple[End, str], tuple[NatPort, ...]]:
    return {
        (endpoint, address): tuple(
            ports.nat_ports(first, call.frontend, call.client, endpoint, address)
        )
        for endpoint in endpoints
        for address in addresses
    }


def _asked(call: Call, idle_s: int | None) -> Asked | None:
    if call.frontend.protocol is not Protocol.UDP:
        return None
    is_connected = sockets.is_connected_receiver(call.client, call.frontend[:2])
    is_noted = idle_s is not None and idle_s <= UDP_IDLE_S
    if is_connected is None or not (is_connected or is_noted):
        return None
    return Asked(is_connected, idle_s if is_noted else None)


def _stuck(facts: PortFacts, call: Call) -> frozenset[End]:
    """SCTP's ports cannot be changed, others unless all that are tried are taken."""
    if call.frontend.protocol is Protocol.SCTP:
        return facts.taken
    return frozenset(
        endpoint for endpoint in facts.taken if facts.other_port(endpoint, call.client[0]) is None
    )


def _held(facts: PortFacts) -> tuple[Entry, ...]:
    return tuple({each.flow for tries in facts.tries.values() for each in tries if each.flow})
