"""Which way a packet takes behind the program: past the stack, or through it, and why.

The way is what the program's verdict and the flow it noted say, never worked out anew. Reasons are
given where a table or a route holds them, and otherwise none.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.constants import FlowFlag, LinkKind
from ebpf_svc.dataplane.ebpf.live import LinkFacts
from ebpf_svc.dataplane.ebpf.options import uses_fast_path, why_no_fast_path
from ebpf_svc.explain.model import Call, ChosenBy, Verdict
from ebpf_svc.explain.proof import REDIRECT, XDP_PASS, Driver, Outcome, Place, Proof
from ebpf_svc.explain.surroundings import Device
from ebpf_svc.model.net import Protocol

FAST_DEVICES = "pods' interfaces, their bridges and Ethernet NICs, no tunnels"
_TC = {
    0xFFFFFFFF: "TC_ACT_UNSPEC",
    2: "TC_ACT_SHOT",
    4: "TC_ACT_STOLEN",
    REDIRECT: "TC_ACT_REDIRECT",
}
_XDP = {0: "XDP_ABORTED", 1: "XDP_DROP", XDP_PASS: "XDP_PASS", 3: "XDP_TX", 4: "XDP_REDIRECT"}


class Path(StrEnum):
    """Where a packet goes on."""

    STACK = "stack"
    FAST = "fast"
    TURNED = "turned"
    """Back through the device it came by."""


@dataclass(frozen=True, slots=True)
class Way:
    """The way of a connection's first packet."""

    path: Path
    verdict: str
    """What the program returned, by the kernel's name."""
    why: str = ""
    """Why it is left to the stack, as far as that is known."""
    device: str = ""
    """Where it is redirected to."""
    to_pod: bool = False
    """Into the pod at that device's other end."""
    is_cold: bool = False
    """The kernel has to ask for the neighbour's address first."""
    answer: Path | None = None
    """None: the answer was not tried."""
    driver: DriverWay | None = None
    """None: XDP is off, or not asked where this packet comes in."""


@dataclass(frozen=True, slots=True)
class DriverWay:
    """What the NIC's driver does, `XDP_*` by name."""

    device: str
    is_ours: bool
    """It runs our program; all the rest is empty if not."""
    first: str = ""
    """Empty though it does: this kernel cannot try it."""
    later: str = ""
    answers: str = ""
    """Empty: they do not come in by such a device."""
    why: str = ""
    """Why later packets of the client are left to tc, as far as that is known."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What of the node decides a way."""

    ebpf: EbpfSettings
    device: Device | None
    """Where the packet comes in."""
    way_out: Callable[[str], Device | None]
    link: Callable[[int], LinkFacts | None]
    """What the fast path may know of a device."""


def judge(call: Call, proof: Proof, place: Place, by: ChosenBy, ground: Ground) -> Way | None:
    """Say which way the packet of a trial went; None when there is nothing to say of one.

    Args:
        call: who called what.
        proof: what the trial showed.
        place: the program that was tried, and where.
        by: what chose the backend.
        ground: of this node.
    """
    outcome = proof.outcome
    if outcome.verdict is not Verdict.FORWARDED or outcome.flags & FlowFlag.HOST:
        return None
    answer = None
    if proof.reply is not None:
        answer = Path.FAST if proof.reply.is_fast else Path.STACK
    verdict, driver = _TC.get(outcome.code, str(outcome.code)), None
    if ground.ebpf.xdp and uses_fast_path(ground.ebpf) and place.program == "node_ingress":
        driver = _driver(call, proof.driver, outcome, ground)
    if outcome.hairpin:
        return Way(Path.TURNED, verdict, device=_name(ground.device), driver=driver)
    if outcome.is_fast:
        assert outcome.noted is not None
        to_pod, out = outcome.noted.backend_link, ""
        if not to_pod and outcome.backend is not None:
            out = _name(ground.way_out(outcome.backend[0]))
        return Way(
            Path.FAST,
            verdict,
            device=_name_of(to_pod) if to_pod else out,
            to_pod=bool(to_pod),
            is_cold=outcome.is_cold,
            answer=answer,
            driver=driver,
        )
    why = _why_stack(call, outcome, place, by, ground)
    return Way(Path.STACK, verdict, why, answer=answer, driver=driver)


def _why_stack(call: Call, outcome: Outcome, place: Place, by: ChosenBy, ground: Ground) -> str:
    """Why a flow does not take the fast path; empty = the tables do not tell."""
    if not uses_fast_path(ground.ebpf):
        missing = why_no_fast_path(ground.ebpf)
        return f"ebpf.fastPath is on, but {missing}" if ground.ebpf.fast_path else _OFF
    if by is ChosenBy.FLOW and not outcome.flags & FlowFlag.FAST:
        return "the flow began that way, and keeps to it"
    if not place.has_ethernet:
        return f"{_name(ground.device)} has no Ethernet header, which the fast path needs"
    if outcome.flags & FlowFlag.PORT:
        return (
            "the client has a connection from this port to that endpoint already, so the endpoint "
            "sees another port"
        )
    if ground.device is None or ground.link(place.link) is None:
        return f"it comes by {_name(ground.device)}, which is none of {FAST_DEVICES}"
    return _why_not_out(call, outcome, ground)


_OFF = "ebpf.fastPath is off"


def _why_not_out(call: Call, outcome: Outcome, ground: Ground) -> str:
    assert outcome.backend is not None
    address = outcome.backend[0]
    out = ground.way_out(address)
    if out is None:
        return f"no route leads to {address}"
    link = ground.link(out.index)
    if link is None:
        return f"the route to {address} leaves by {out.name}, which is none of {FAST_DEVICES}"
    if outcome.masquerade and call.frontend.protocol is Protocol.SCTP:
        return "a masquerade is due, and for SCTP no port of the node's can stand for the client's"
    if outcome.masquerade and not link.has_address:
        return f"a masquerade is due, and {out.name} has no address for it"
    return ""


def _driver(call: Call, found: Driver | None, outcome: Outcome, ground: Ground) -> DriverWay:
    if found is None:
        return DriverWay(_name(ground.device), is_ours=False)
    if found.first is None or found.later is None:
        return DriverWay(_name(ground.device), is_ours=True)
    why = "" if found.later != XDP_PASS else _why_not_driver(call, outcome, ground)
    return DriverWay(
        _name(ground.device),
        is_ours=True,
        first=_xdp(found.first),
        later=_xdp(found.later),
        answers="" if found.answers is None else _xdp(found.answers),
        why=why,
    )


def _why_not_driver(call: Call, outcome: Outcome, ground: Ground) -> str:
    """Why a driver leaves later packets to tc; empty = the tables do not tell."""
    assert outcome.backend is not None
    if call.frontend.protocol is Protocol.SCTP:
        return "it is for TCP and UDP"
    if not outcome.flags & FlowFlag.FAST:
        return "the flow does not take the fast path"
    if outcome.noted is not None and outcome.noted.backend_link:
        return "the endpoint is a pod of this node, which tc reaches"
    out = ground.way_out(outcome.backend[0])
    link = ground.link(out.index) if out else None
    if out is not None and link is not None and link.kind is not LinkKind.DRIVER:
        return f"they leave by {out.name}, whose driver runs no program"
    if outcome.is_cold:
        return "the neighbour's address is not known yet"
    return ""


def sentences(way: Way) -> list[str]:
    """The way of the packet and its answer in words."""
    if way.path is Path.TURNED:
        how = f"the program sent the packet back through {way.device}"
        return [f"turned round: {how} ({way.verdict}), as the endpoint is the client itself (P9)."]
    if way.path is Path.STACK:
        why = way.why or "why, the tables do not tell"
        told = [f"through the stack: the program left the packet to it ({way.verdict}); {why}."]
        if way.answer is Path.FAST:
            told.append("The answer was redirected past it.")
        return told
    where = f"into the pod behind {way.device}" if way.to_pod else f"to {way.device}, by its route"
    cold = "; the kernel asks for the neighbour's address first" if way.is_cold else ""
    told = [f"past the stack: the program redirected the packet {where} ({way.verdict}){cold}."]
    if way.answer is Path.FAST:
        told.append("It did so with the answer, too.")
    elif way.answer is Path.STACK:
        told.append("The answer it left to the stack.")
    return told


def driver_sentences(way: DriverWay) -> list[str]:
    """What the NIC's driver does, in words."""
    name = way.device
    if not way.is_ours:
        return [f"{name}'s driver runs no program of ours: tc sees every packet."]
    if not way.first:
        return [
            f"XDP runs at {name}: what is open between machines it may send itself. Kernels before "
            "5.15 cannot try that."
        ]
    told = [f"XDP at {name} sends the packet itself ({way.first}): its flow is open."]
    if way.first == _xdp(XDP_PASS):
        told = [f"XDP at {name} passes the packet up to tc ({way.first}), which opens flows."]
    if way.later == _xdp(XDP_PASS):
        why = way.why or "why, the tables do not tell"
        told.append(f"Later ones, too ({way.later}): {why}.")
    else:
        told.append(f"Later ones it sends itself ({way.later}).")
    if way.answers == _xdp(XDP_PASS):
        told.append(f"Answers it leaves to tc ({way.answers}).")
    elif way.answers:
        told.append(f"Answers it sends itself ({way.answers}).")
    return told


def _xdp(code: int) -> str:
    return _XDP.get(code, str(code))


def _name(device: Device | None) -> str:
    return device.name if device else "no known device"


def _name_of(index: int) -> str:
    with suppress(OSError):
        return socket.if_indextoname(index)
    return f"device {index}"
