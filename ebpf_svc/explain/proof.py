"""Ask the loaded program: a trial of the call, of its answer, and what differs from the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field

from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.constants import HAIRPIN_ADDRESS, BackendFlag, Drop
from ebpf_svc.dataplane.ebpf.live import Entry, Live, Remembered
from ebpf_svc.dataplane.ebpf.trial import Ran, Trial
from ebpf_svc.explain import packet
from ebpf_svc.explain.model import Call, ChosenBy, End, ListName, Memory, Prediction, Verdict
from ebpf_svc.explain.packet import Ends
from ebpf_svc.model.desired import FrontendView
from ebpf_svc.model.net import Family

_FORWARD, _SHOT, _REDIRECT = 0xFFFFFFFF, 2, 7
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
    hairpin: bool = False

    @property
    def backend(self) -> End | None:
        """Where it went."""
        forwarded = self.verdict is Verdict.FORWARDED and self.after
        return self.after.destination if forwarded and self.after else None


@dataclass(slots=True)
class Proof:
    """What the trial showed."""

    program: str
    """The C function."""
    tag: str
    outcome: Outcome
    reply: Ends | None = None
    """The backend's answer as the client gets it."""
    differences: list[str] = field(default_factory=list)
    """Where program and model do not agree, a sentence each."""


@dataclass(frozen=True, slots=True)
class Seeds:
    """What the client has in the live maps."""

    flows: tuple[Entry, ...] = ()
    affinity: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Recollection:
    """What the live maps remember of a client."""

    memory: Memory
    affinity: Remembered | None
    flow: Remembered | None
    seeds: Seeds


NOTHING = Recollection(Memory(), None, None, Seeds())


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
        port_matters: the caller's port was named, so flows it has count.
    """
    value = live.frontend(call.frontend)
    if value is None:
        return NOTHING
    is_local = name is ListName.LOCAL
    member = BackendFlag.IN_LOCAL if is_local else BackendFlag.IN_CLUSTER
    affinity = flow = None
    if view.affinity_s and (call.client[0] or call.at_socket):
        who = netns if call.at_socket else 0
        affinity = live.affinity(value, member, client=call.client[0], netns=who)
    maglev = None
    if not call.at_socket:
        slots = (
            (value.local_first, value.local_count)
            if is_local
            else (value.cluster_first, value.cluster_count)
        )
        maglev = live.maglev(value, slots, call.frontend, call.client)
        flow = live.flow(value, call.frontend, call.client) if port_matters else None
    flows = tuple(live.flows_of(call.client)) if port_matters and not call.at_socket else ()
    seeds = Seeds(flows, (affinity.entry,) if affinity and not call.at_socket else ())
    memory = Memory(
        flow.backend if flow and flow.counts else None,
        affinity.backend if affinity and affinity.counts else None,
        maglev,
    )
    return Recollection(memory, affinity, flow, seeds)


class Prover:
    """Runs one family's programs for one call; `close` gives them back."""

    def __init__(self, artifact: Artifact, live: Live, program: str, *, mark: int) -> None:
        """Prepare.

        Args:
            program: the C function on the caller's way in.
            mark: bit of the mark that asks for a masquerade.
        """
        self._family: Family = live.family
        self._program, self._mark = program, mark
        self._ethernet = not program.endswith("_l3")
        self._trial = Trial(artifact, live)

    def close(self) -> None:
        """Unload."""
        self._trial.close()

    def seed(self, seeds: Seeds) -> None:
        """Let the caller have what it has in the live maps."""
        self._trial.seed(flows=seeds.flows, affinity=seeds.affinity)

    def prove(
        self, call: Call, view: FrontendView | None, prediction: Prediction, seeds: Seeds
    ) -> Proof:
        """Send the packet, and the backend's answer; compare with what must happen."""
        self.seed(seeds)
        outcome = self.send(call)
        proof = Proof(self._program, self._trial.tag(self._program), outcome)
        proof.differences += compare(call, view, prediction, outcome)
        if outcome.backend is not None:
            proof.reply = self._answer(call, outcome)
            wanted = (call.frontend.address, call.frontend.port)
            if proof.reply is None or proof.reply.source != wanted:
                got = proof.reply.source if proof.reply else "not translated"
                proof.differences.append(f"the answer must come from {wanted}, and is {got}")
        return proof

    def send(self, call: Call) -> Outcome:
        """Send the first packet of a call."""
        frontend = call.frontend
        sent = packet.opening(
            call.client,
            (frontend.address, frontend.port),
            frontend.protocol,
            ethernet=self._ethernet,
        )
        ran = self._trial.run(self._program, sent)
        return self._read(sent, ran)

    def _read(self, sent: bytes, ran: Ran) -> Outcome:
        reason = ran.drop.name.lower() if ran.drop is not None else ""
        if ran.verdict == _SHOT:
            return Outcome(Verdict.DROPPED, reason)
        if ran.verdict == _FORWARD and ran.data == sent:
            return Outcome(Verdict.UNTOUCHED)
        after = packet.ends_of(ran.data, self._family, ethernet=self._ethernet)
        if ran.drop is Drop.NO_ENDPOINT:
            return Outcome(Verdict.REFUSED, reason, after)
        masquerade = bool(ran.mark & self._mark)
        return Outcome(Verdict.FORWARDED, "", after, masquerade, ran.verdict == _REDIRECT)

    def _answer(self, call: Call, outcome: Outcome) -> Ends | None:
        """What the client gets when the backend answers; None when it is not translated."""
        assert outcome.backend is not None
        program, to = "egress", call.client
        if outcome.hairpin:
            program, to = "pod_ingress", (HAIRPIN_ADDRESS[self._family], call.client[1])
        sent = packet.answer(outcome.backend, to, call.frontend.protocol)
        ran = self._trial.run(program, sent)
        if ran.verdict not in (_FORWARD, _REDIRECT) or ran.data == sent:
            return None
        return packet.ends_of(ran.data, self._family)


def compare(
    call: Call, view: FrontendView | None, prediction: Prediction, outcome: Outcome
) -> Iterable[str]:
    """Say where the program did something else than it must: a sentence each."""
    if outcome.verdict is not prediction.verdict or outcome.reason != prediction.reason:
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
    if prediction.by is ChosenBy.FLOW:
        return
    is_itself = backend[0] == call.client[0]
    masquerade = prediction.masquerade(view, call, backend)
    if is_itself:
        if not (outcome.hairpin or outcome.masquerade):
            yield "the backend is the client itself, and its source stays its own (P9)"
    elif outcome.hairpin:
        yield "the packet is sent back though its backend is another"
    elif outcome.masquerade is not masquerade:
        yield f"masquerade must be {masquerade}, and is {outcome.masquerade}"


def spread(
    artifact: Artifact, live: Live, program: str, call: Call, seeds: Seeds, *, mark: int, count: int
) -> Counter[End | str]:
    """Where calls from many ports of the client go; what is not forwarded counts by its verdict."""
    found: Counter[End | str] = Counter()
    with closing(Prover(artifact, live, program, mark=mark)) as prover:
        prover.seed(seeds)
        for number in range(count):
            port = FIRST_PORT + number % (LAST_PORT - FIRST_PORT)
            again = Call((call.client[0], port), call.kind, call.frontend)
            outcome = prover.send(again)
            found[outcome.backend or outcome.verdict.value] += 1
    return found
