"""Ask the loaded program: a trial of the call, of its answer, and what differs from the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.constants import Drop, FlowFlag
from ebpf_svc.dataplane.ebpf.live import Live, Noted
from ebpf_svc.dataplane.ebpf.trial import Ran, Trial
from ebpf_svc.explain import packet
from ebpf_svc.explain.model import Call, ChosenBy, End, Prediction, Verdict
from ebpf_svc.explain.packet import Ends
from ebpf_svc.explain.recollection import PortFacts, Seeds
from ebpf_svc.model.desired import FrontendView
from ebpf_svc.model.net import Family, Sources

FORWARD, _SHOT, _STOLEN, REDIRECT = 0xFFFFFFFF, 2, 4, 7
"""`TC_ACT_*`: to the next filter and the stack; away; to a device."""
XDP_PASS = 2
FIRST_PORT, LAST_PORT = 40_000, 48_000
"""Client ports tried; within what a trial's maps hold."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the program made of the packet."""

    verdict: Verdict
    reason: str = ""
    after: Ends | None = None
    """Of the packet that left, when it was translated; of the answer, when it was refused."""
    masquerade: bool = False
    """The backend sees an address of the node: by netfilter's rule, or a port of ours."""
    code: int = FORWARD
    """What the program returned, `TC_ACT_*`."""
    noted: Noted | None = None
    """What the flow has noted of its way."""
    is_cold: bool = False
    """It was redirected without a neighbour's address: the kernel has to ask for that first."""

    @property
    def flags(self) -> FlowFlag:
        """Of the flow; none without one."""
        return self.noted.flags if self.noted else FlowFlag(0)

    @property
    def seen_as(self) -> End | None:
        """Whom the backend sees, before netfilter; None when it went nowhere."""
        return self.after.source if self.backend is not None and self.after else None

    @property
    def by_netfilter(self) -> bool:
        """It is a rule of netfilter that masquerades."""
        return self.masquerade and not self.flags & FlowFlag.SNAT

    @property
    def hairpin(self) -> bool:
        """It is turned round at the device it came by."""
        return self.code == REDIRECT and bool(self.flags & FlowFlag.HAIRPIN)

    @property
    def is_fast(self) -> bool:
        """It was sent past the stack."""
        return self.code == REDIRECT and bool(self.flags & FlowFlag.FAST)

    @property
    def backend(self) -> End | None:
        """Where it went."""
        is_sent = self.verdict in (Verdict.FORWARDED, Verdict.OTHER_PORT)
        return self.after.destination if is_sent and self.after else None


@dataclass(frozen=True, slots=True)
class Place:
    """A program at a device."""

    program: str
    """The C function; empty = none."""
    link: int = 0
    """Index of the device; 0 = not known, and to the program no device of the fast path's."""

    @property
    def has_ethernet(self) -> bool:
        """What passes there begins with an Ethernet header."""
        return not self.program.endswith("_l3")


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of the backend's answer."""

    ends: Ends
    """As the client gets it."""
    is_fast: bool = False
    """It was sent past the stack."""


@dataclass(frozen=True, slots=True)
class Driver:
    """What XDP's program made of a flow's packets, `XDP_*`."""

    first: int | None
    """None: this kernel cannot try it."""
    later: int | None = XDP_PASS
    answers: int | None = None
    """None: they come in by no device that runs it."""


@dataclass(slots=True)
class Proof:
    """What the trial showed."""

    program: str
    """The C function."""
    tag: str
    outcome: Outcome
    reply: Answer | None = None
    """The backend's answer; None = not translated."""
    driver: Driver | None = None
    """None: no driver runs our program where the client's packets come in."""
    differences: list[str] = field(default_factory=list)
    """Where program and model do not agree, a sentence each."""


class Prover:
    """Runs one family's programs for one call; `close` gives them back."""

    def __init__(
        self,
        artifact: Artifact,
        live: Live,
        place: Place,
        *,
        mark: int,
        back: Callable[[str], Place] = lambda _: Place("node_ingress"),
        drivers: frozenset[int] = frozenset(),
    ) -> None:
        """Prepare.

        Args:
            artifact: what the agent's programs were loaded from.
            live: the agent's maps.
            place: the program the caller's packets meet first.
            mark: bit of the mark that asks for a masquerade.
            back: where an address's packets come in.
            drivers: devices whose drivers run XDP's program.
        """
        self._family: Family = live.family
        self._place, self._mark = place, mark
        self._back, self._drivers = back, drivers
        self._trial = Trial(artifact, live)

    def close(self) -> None:
        """Unload."""
        self._trial.close()

    def seed(self, seeds: Seeds) -> None:
        """Let the caller have what it has in the live maps."""
        self._trial.seed(
            flows=seeds.flows, affinity=seeds.affinity, reverse=seeds.reverse, direct=seeds.direct
        )

    def prove(
        self, call: Call, view: FrontendView | None, prediction: Prediction, seeds: Seeds
    ) -> Proof:
        """Send the packet, and the backend's answer; compare with what must happen."""
        self.seed(seeds)
        by_driver = self._place.link in self._drivers
        first = self._drive(self._opening(call), self._place.link) if by_driver else None
        outcome = self.send(call)
        proof = Proof(self._place.program, self._trial.tag(self._place.program), outcome)
        proof.differences += compare(call, view, prediction, outcome)
        if by_driver:
            proof.driver = Driver(first)
        if outcome.backend is not None:
            proof.reply = self._answer(call, outcome)
            wanted = (call.frontend.address, call.frontend.port)
            got = (proof.reply.ends.source, proof.reply.ends.destination) if proof.reply else None
            if got != (wanted, call.client):
                says = f"comes from {got[0]} to {got[1]}" if got else "is not translated"
                proof.differences.append(
                    f"the answer must come from {wanted} to {call.client}, and {says}"
                )
            if first is not None:
                proof.driver = self._drive_on(first, call, outcome)
        return proof

    def send(self, call: Call) -> Outcome:
        """Send the first packet of a call."""
        sent = self._opening(call)
        ran = self._trial.run(self._place.program, sent, ifindex=self._place.link)
        return self._read(call, sent, ran)

    def _opening(self, call: Call) -> bytes:
        to = (call.frontend.address, call.frontend.port)
        ethernet = self._place.has_ethernet
        return packet.opening(call.client, to, call.frontend.protocol, ethernet=ethernet)

    def _read(self, call: Call, sent: bytes, ran: Ran) -> Outcome:
        reason = ran.drop.name.lower() if ran.drop is not None else ""
        if ran.verdict in (_SHOT, _STOLEN):
            return Outcome(Verdict.DROPPED, reason, code=ran.verdict)
        if ran.verdict == FORWARD and ran.data == sent:
            return Outcome(Verdict.UNTOUCHED)
        after = packet.ends_of(ran.data, self._family, ethernet=self._place.has_ethernet)
        if ran.drop is Drop.NO_ENDPOINT:
            return Outcome(Verdict.REFUSED, reason, after, code=ran.verdict)
        if after.destination == (call.frontend.address, call.frontend.port):
            return Outcome(Verdict.OTHER_PORT, "", after, code=ran.verdict)
        noted = self._trial.noted(call.frontend, call.client)
        flags = noted.flags if noted else FlowFlag(0)
        masquerade = bool(ran.mark & self._mark or flags & FlowFlag.SNAT)
        to_peer = bool(noted and noted.backend_link)
        is_cold = (
            ran.verdict == REDIRECT
            and bool(flags & FlowFlag.FAST)
            and not to_peer
            and ran.data[: packet.MACS_BYTES] == sent[: packet.MACS_BYTES]
        )
        return Outcome(Verdict.FORWARDED, "", after, masquerade, ran.verdict, noted, is_cold)

    def _answer(self, call: Call, outcome: Outcome) -> Answer | None:
        """Send the backend's answer the way it comes: in by the backend's device, and out by the
        client's if that did not end it; None when nothing translates it.
        """
        assert outcome.backend is not None and outcome.after is not None
        seen_as = outcome.after.source
        sent = data = packet.answer(outcome.backend, seen_as, call.frontend.protocol)
        place = self._place if outcome.hairpin else self._back(outcome.backend[0])
        if place.program and outcome.flags & (FlowFlag.HAIRPIN | FlowFlag.FAST | FlowFlag.HOST):
            ran = self._run_frame(place, data)
            if ran.verdict == REDIRECT:
                is_fast = bool(outcome.flags & FlowFlag.FAST)
                return Answer(packet.ends_of(ran.data, self._family), is_fast)
            if ran.verdict != FORWARD:
                return None
            data = ran.data
        if data == sent or not outcome.flags & FlowFlag.HOST:
            ran = self._trial.run("egress", data, ifindex=self._place.link)
            if ran.verdict not in (FORWARD, REDIRECT) or ran.data == sent:
                return None
            data = ran.data
        return Answer(packet.ends_of(data, self._family))

    def _run_frame(self, place: Place, frame: bytes) -> Ran:
        """Send a frame through a program, which may be one that knows no Ethernet."""
        if place.has_ethernet:
            return self._trial.run(place.program, frame, ifindex=place.link)
        head, rest = frame[: packet.ETHERNET_BYTES], frame[packet.ETHERNET_BYTES :]
        ran = self._trial.run(place.program, rest, ifindex=place.link)
        return replace(ran, data=head + ran.data)

    def _drive(self, frame: bytes, link: int) -> int | None:
        return self._trial.run_driver(frame, ifindex=link)

    def _drive_on(self, first: int, call: Call, outcome: Outcome) -> Driver:
        """Send later packets of an open flow, of both ends, to the drivers they come by."""
        assert outcome.backend is not None and outcome.after is not None
        frontend, protocol = call.frontend, call.frontend.protocol
        to = (frontend.address, frontend.port)
        later = self._drive(packet.later(call.client, to, protocol), self._place.link)
        answers = None
        back = self._back(outcome.backend[0])
        if back.link in self._drivers:
            frame = packet.later(outcome.backend, outcome.after.source, protocol)
            answers = self._drive(frame, back.link)
        return Driver(first, later, answers)


def compare(
    call: Call, view: FrontendView | None, prediction: Prediction, outcome: Outcome
) -> Iterable[str]:
    """Say where the program did something else than it must: a sentence each."""
    is_untouched = outcome.verdict is Verdict.UNTOUCHED  # the program does not say why
    same_reason = is_untouched or outcome.reason == prediction.reason
    if outcome.verdict is not prediction.verdict or not same_reason:
        must = f"{prediction.verdict.value} {prediction.reason}".strip()
        did = f"{outcome.verdict.value} {outcome.reason}".strip()
        yield f"the packet must be {must}, and the program has it {did}"
        return
    backend = outcome.backend
    if backend is None or view is None:
        return
    if prediction.chosen is not None and backend != prediction.chosen:
        by = prediction.by.value
        yield f"the backend must be {prediction.chosen} by {by}, and is {backend}"
    elif backend not in prediction.candidates:
        yield f"the backend is {backend}, which is none of {list(prediction.candidates)}"
    if prediction.by is ChosenBy.FLOW or call.kind is Sources.NODE:
        return  # of what the node sends the source is its own
    is_itself = backend[0] == call.client[0]
    masquerade = prediction.masquerade(view, call, backend)
    if is_itself:
        if not (outcome.hairpin or outcome.masquerade):
            yield "the backend is the client itself, and its source stays its own (P9)"
    elif outcome.hairpin:
        yield "the packet is sent back though its backend is another"
    elif outcome.masquerade is not masquerade:
        yield f"masquerade must be {masquerade}, and is {outcome.masquerade}"


def compare_port(
    call: Call, prediction: Prediction, outcome: Outcome, facts: PortFacts | None
) -> Iterator[str]:
    """Say where the endpoint sees another port than it must, a sentence each."""
    backend, seen = outcome.backend, outcome.seen_as
    if facts is None or backend is None or seen is None or prediction.by is ChosenBy.FLOW:
        return
    is_other = outcome.verdict is Verdict.OTHER_PORT or bool(outcome.flags & FlowFlag.PORT)
    is_nodes = bool(outcome.flags & (FlowFlag.SNAT | FlowFlag.HOST))
    if not is_nodes and is_other is not (backend in facts.taken):
        must = "another port than" if backend in facts.taken else "port"
        yield f"the endpoint must see {must} {call.client[1]}, and sees {seen[1]}"
    elif is_other or seen[1] != call.client[1]:
        # Who is turned round is seen under the hairpin address, by a port of its own.
        port = facts.other_port(backend, seen[0] if is_nodes else call.client[0])
        if seen[1] != port:
            yield f"the endpoint must see port {port}, and sees {seen[1]}"


def spread(
    artifact: Artifact, live: Live, place: Place, call: Call, seeds: Seeds, *, mark: int, count: int
) -> Counter[End | str]:
    """Where calls from many ports of the client go; what is not forwarded counts by its verdict."""
    found: Counter[End | str] = Counter()
    with closing(Prover(artifact, live, place, mark=mark)) as prover:
        prover.seed(seeds)
        for number in range(count):
            port = FIRST_PORT + number % (LAST_PORT - FIRST_PORT)
            again = Call((call.client[0], port), call.kind, call.frontend)
            outcome = prover.send(again)
            found[outcome.backend or outcome.verdict.value] += 1
    return found
