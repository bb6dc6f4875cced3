"""What must become of a new connection, worked out from what the kernel holds.

Pure, and written apart from the programs: a trial run of them is compared with this, and where the
two differ one of them is wrong.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import StrEnum

from ebpf_svc.model.desired import FrontendKey, FrontendKind, FrontendView
from ebpf_svc.model.net import Protocol, Sources, family_of

End = tuple[str, int]
"""An address and a port."""


class Verdict(StrEnum):
    """What becomes of the packet."""

    FORWARDED = "forwarded"
    REFUSED = "refused"
    DROPPED = "dropped"
    UNTOUCHED = "untouched"
    """No service's business."""
    OTHER_PORT = "other_port"
    """No service's business either, but the endpoint that is called sees another source port."""


class ChosenBy(StrEnum):
    """What decides among the candidates."""

    NOTHING = ""
    FLOW = "flow"
    AFFINITY = "affinity"
    ONLY = "only"
    MAGLEV = "maglev"
    RANDOM = "random"


class ListName(StrEnum):
    """The two lists of a service port."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


@dataclass(frozen=True, slots=True)
class Call:
    """A client that opens a connection, or sends a first datagram."""

    client: End
    """The address is empty where routing has yet to choose it: a process of the node."""
    kind: Sources
    """Exactly one."""
    frontend: FrontendKey
    at_socket: bool = False
    """The socket hooks translate it, so no packet to the frontend is ever sent."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of the client and counts."""

    flow: End | None = None
    """The backend of the flow its port has."""
    affinity: End | None = None
    maglev: End | None = None
    """The backend the Maglev table gives it; None where there is no table."""
    drawn: End | None = None
    """The backend its port gets from a list without a table; None when no port was named."""
    taken: frozenset[End] = frozenset()
    """Endpoints that see its port in use already, so they must see another."""
    stuck: frozenset[End] = frozenset()
    """Those of them at which it can get no other."""
    answers: bool = False
    """What its port sends is an answer to a process of the node (B9)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What must happen."""

    verdict: Verdict
    reason: str = ""
    """Why it is refused or dropped: as `FlowEvent.reason`."""
    list_name: ListName | None = None
    candidates: tuple[End, ...] = ()
    """Backends it may go to."""
    chosen: End | None = None
    """The one it must go to, where that is certain."""
    by: ChosenBy = ChosenBy.NOTHING
    admitting: str = ""
    """The source range that lets the client in."""

    def masquerade(self, view: FrontendView, call: Call, backend: End) -> bool | None:
        """Whether a packet to that backend asks for a masquerade; None = an old flow decides."""
        if self.by is ChosenBy.FLOW:
            return None
        if call.at_socket or backend[0] == call.client[0]:
            return False
        return bool(view.frontend.masquerade_for & call.kind)


def predict(
    call: Call,
    view: FrontendView | None,
    memory: Memory,
    *,
    filtered_as: str = "",
    moves_sctp: bool = False,
) -> Prediction:
    """Say what must become of a call.

    Args:
        call: who calls what.
        view: the frontend as the kernel holds it; None = there is none.
        memory: what is remembered of the client.
        filtered_as: the address that source ranges must hold; empty = the client's.
        moves_sctp: SCTP may go to another port than the frontend's.
    """
    if view is None:
        return Prediction(Verdict.UNTOUCHED)
    if memory.flow is not None:
        flow = memory.flow
        return Prediction(Verdict.FORWARDED, "", None, (flow,), flow, ChosenBy.FLOW)
    if memory.answers:
        return Prediction(Verdict.UNTOUCHED, "own_answer")
    frontend, admitting = view.frontend, ""
    if frontend.source_ranges is not None:
        admitting = admitting_range(filtered_as or call.client[0], frontend.source_ranges)
        if not admitting:
            return Prediction(Verdict.DROPPED, "source_range")
    if not view.has_endpoints:
        return Prediction(Verdict.REFUSED, "no_endpoint", admitting=admitting)
    return _choose(call, view, memory, admitting, moves_sctp=moves_sctp)


def predict_direct(call: Call, memory: Memory) -> Prediction:
    """Say what must become of a call to an endpoint itself."""
    endpoint = call.frontend.address, call.frontend.port
    if memory.flow is not None:
        return Prediction(Verdict.OTHER_PORT, by=ChosenBy.FLOW)
    if endpoint in memory.taken - memory.stuck:
        return Prediction(Verdict.OTHER_PORT)
    return Prediction(Verdict.UNTOUCHED)


def _choose(
    call: Call, view: FrontendView, memory: Memory, admitting: str, *, moves_sctp: bool
) -> Prediction:
    """Among the endpoints of a service that has some."""
    name = list_for(view, call.kind)
    candidates = members(view, name)
    if not candidates:
        return Prediction(Verdict.DROPPED, "no_local_endpoint", name, admitting=admitting)
    is_fixed = call.frontend.protocol is Protocol.SCTP and not moves_sctp
    if is_fixed and all(port != call.frontend.port for _, port in candidates):
        return Prediction(Verdict.DROPPED, "rewrite_failed", name, candidates, admitting=admitting)
    chosen: End | None = None
    by = ChosenBy.RANDOM
    if memory.affinity in candidates:
        chosen, by = memory.affinity, ChosenBy.AFFINITY
    elif len(candidates) == 1:
        chosen, by = candidates[0], ChosenBy.ONLY
    elif memory.maglev is not None:
        chosen, by = memory.maglev, ChosenBy.MAGLEV
    elif memory.drawn in candidates:
        chosen = memory.drawn
    if chosen in memory.stuck:
        return Prediction(
            Verdict.DROPPED, "client_port_clash", name, candidates, chosen, by, admitting
        )
    return Prediction(Verdict.FORWARDED, "", name, candidates, chosen, by, admitting)


def list_for(view: FrontendView, kind: Sources) -> ListName:
    """Which list a class of clients gets."""
    return ListName.LOCAL if view.frontend.local_for & kind else ListName.CLUSTER


def members(view: FrontendView, name: ListName) -> tuple[End, ...]:
    """The backends of a list."""
    return tuple(
        (each.address, each.port)
        for each in view.backends
        if (each.in_local if name is ListName.LOCAL else each.in_cluster)
    )


def is_local_policy(view: FrontendView) -> bool:
    """Whether the policy that governs this frontend is Local, for any client (P1)."""
    return bool(view.frontend.local_for)


def is_short_circuit(view: FrontendView, kind: Sources) -> bool:
    """Whether the policy is Local and this client is spared it (P5)."""
    internal = view.frontend.kind is FrontendKind.CLUSTER_IP
    return not internal and is_local_policy(view) and not view.frontend.local_for & kind


def admitting_range(client: str, ranges: tuple[str, ...]) -> str:
    """The narrowest range a client is in; empty = none (P10)."""
    address = ipaddress.ip_address(client)
    inside = [
        network
        for network in (ipaddress.ip_network(text) for text in ranges)
        if family_of(str(network)) is family_of(client) and address in network
    ]
    return str(max(inside, key=lambda network: network.prefixlen)) if inside else ""
