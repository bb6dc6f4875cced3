"""The client's port in words: what it is in use for, and which port the endpoint therefore sees."""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_svc.dataplane.ebpf.constants import FlowFlag
from ebpf_svc.explain.explain import Explanation
from ebpf_svc.explain.model import ChosenBy, End, Verdict
from ebpf_svc.explain.recollection import PortFacts
from ebpf_svc.host.nft import PORTS
from ebpf_svc.model.net import Protocol, Sources
from ebpf_svc.monitor.view import at

ANSWER = "an answer to a process of this node: left to it"
"""What becomes of it, in one line."""


def sentences(told: Explanation) -> Iterator[str]:
    """Which port the endpoint sees and why; nothing unless the client's port was named."""
    verdict, reason = told.prediction.verdict, told.prediction.reason
    is_sent = verdict in (Verdict.FORWARDED, Verdict.OTHER_PORT) or _is_direct(told)
    if not told.has_port or not (is_sent or reason == "client_port_clash"):
        return
    if told.scene.mode != "ebpf":
        how = "the agent opens a connection of its own" if told.is_relayed else "netfilter decides"
        yield f"not known before: {how} when the packet comes, in mode {told.scene.mode}."
    elif told.call.at_socket:
        yield from _at_socket(told)
    elif told.port is not None and (endpoint := endpoint_of(told)) is not None:
        yield from _by_packet(told, told.port, endpoint)


def _at_socket(told: Explanation) -> Iterator[str]:
    port = told.call.client[1]
    yield f"{port} is the socket's own, and the endpoint is called from it, as in a direct call."
    if told.call.kind is Sources.POD:
        backend = at(*told.backend) if told.backend else "ENDPOINT:PORT"
        yield (
            "Whether it is in use there: ebpf-svc explain "
            f"{told.call.client[0]} {backend} --client-port {port}."
        )


def _by_packet(told: Explanation, facts: PortFacts, backend: End) -> Iterator[str]:
    port, seen = told.call.client[1], seen_port(told)
    uses = in_use(facts, backend)
    by_netfilter = told.prediction.verdict is Verdict.FORWARDED and seen is None
    if told.prediction.reason == "client_port_clash":
        why = "none of those it could get is free"
        if told.call.frontend.protocol is Protocol.SCTP:
            why = "SCTP's ports cannot be changed"
        yield f"client port {port} is in use for {_listed(uses)}, and {why}: dropped."
    elif told.prediction.by is ChosenBy.FLOW:
        if not by_netfilter:
            how = ", as connection tracking has it" if told.tracked else ""
            yield f"the flow that port {port} has keeps port {seen} at the endpoint{how}."
    elif uses and seen == port:
        yield (
            f"client port {port} is in use for {_listed(uses)}; it can get no other, and the "
            "endpoint cannot tell the two apart."
        )
    elif uses and not by_netfilter:
        yield f"client port {port} is in use for {_listed(uses)}, so the endpoint sees port {seen}."
    elif uses and told.proof is not None and told.proof.outcome.seen_as is not None:
        left = told.proof.outcome.seen_as[1]
        yield f"client port {port} is in use for {_listed(uses)}, so the program makes it {left}."
    elif seen == port:
        yield f"client port {port} is not in use towards {at(*backend)}: the endpoint sees it."
    elif not by_netfilter:
        yield f"the endpoint sees port {seen}, which stands for the client's."
    if passed_over(told):
        held = ", ".join(f"{number} ({holder})" for number, holder in passed_over(told))
        yield f"Taken there{'' if seen in (None, port) else ' before it'}: {held}."
    if by_netfilter:
        yield _by_netfilter(told)


def _by_netfilter(told: Explanation) -> str:
    if told.prediction.by is ChosenBy.FLOW:
        return "Netfilter chose the port when the flow began; connection tracking does not tell it."
    first, last = PORTS
    return (
        f"Netfilter masquerades it from a port it draws from {first} to {last} when the packet "
        "leaves: which, cannot be known before."
    )


def _listed(uses: list[tuple[str, str, int]]) -> str:
    said = []
    for called, endpoint, idle_s in uses:
        what = f"a call of {called} that is with {endpoint}"
        if called == endpoint:
            what = f"a direct call to {endpoint}"
        said.append(f"{what} ({idle_s} s ago)")
    return " and ".join(said)


def _is_direct(told: Explanation) -> bool:
    """An endpoint itself is called."""
    return told.view is None and told.port is not None


def endpoint_of(told: Explanation) -> End | None:
    """Where the packet goes, or would if it could have a port there; None when not known."""
    if _is_direct(told):
        return told.call.frontend.address, told.call.frontend.port
    return told.backend or told.prediction.chosen


def in_use(facts: PortFacts, backend: End) -> list[tuple[str, str, int]]:
    """What an endpoint sees the client's own port for: what was called, the endpoint, seconds since
    the last packet; since the first one of a direct call by TCP.
    """
    endpoint = at(*backend)
    direct = [(endpoint, endpoint, facts.direct[backend])] if backend in facts.direct else []
    return direct + [
        (at(*use.frontend), endpoint, use.idle_s) for use in facts.uses if use.endpoint == backend
    ]


def seen_port(told: Explanation) -> int | None:
    """The port the endpoint sees; None = netfilter's to choose, or none sees the packet."""
    proof = told.proof
    if _is_direct(told) and told.prediction.verdict is Verdict.UNTOUCHED:
        return told.call.client[1]
    if proof is None or told.proof_is_of_packet or proof.outcome.seen_as is None:
        return None
    if proof.outcome.by_netfilter:
        return told.tracked[1] if told.tracked else None
    return proof.outcome.seen_as[1]


def passed_over(told: Explanation) -> list[tuple[int, str]]:
    """Ports that a new flow would have got and did not: others have them towards the endpoint."""
    facts, proof, backend = told.port, told.proof, endpoint_of(told)
    if facts is None or proof is None or backend is None or told.prediction.by is ChosenBy.FLOW:
        return []
    seen = proof.outcome.seen_as
    address = told.call.client[0]
    if seen is not None and proof.outcome.flags & (FlowFlag.SNAT | FlowFlag.HOST):
        address = seen[0]
    elif not in_use(facts, backend):
        return []
    found = []
    for each in facts.tries.get((backend, address), ()):
        if each.holder is None:
            break
        found.append((each.port, at(*each.holder)))
    return found


def answer(told: Explanation) -> Iterator[str]:
    """Why the datagram is no request (B9); nothing when it is one."""
    if told.prediction.reason != "own_answer" or told.port is None or told.port.asked is None:
        return
    asked, client = told.port.asked, at(*told.call.client)
    end = at(told.call.frontend.address, told.call.frontend.port)
    if asked.is_connected:
        why = f"a socket of this node at {end} is connected to {client}"
    else:
        why = f"a process of this node sent {client} a datagram from {end}, {asked.idle_s} s ago"
        why += " at most, and its socket is open"
    yield f"{why}: the packet is what it waits for, no request (B9)."
