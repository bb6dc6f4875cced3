"""Put everything together: who calls what, what must become of it, and what the program does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

from ebpf_svc.config import SocketLB
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.dataplane import EbpfDataplane
from ebpf_svc.dataplane.ebpf.devices import DeviceRole
from ebpf_svc.dataplane.ebpf.filters import NAME_PREFIX
from ebpf_svc.dataplane.ebpf.live import Live, Remembered
from ebpf_svc.dataplane.ebpf.options import (
    hooks_see_pods,
    translates_host_packets,
    uses_fast_path,
)
from ebpf_svc.explain import nothing, proof, recollection
from ebpf_svc.explain.client import Client
from ebpf_svc.explain.endpoints import Row, rows_of
from ebpf_svc.explain.model import (
    Call,
    ChosenBy,
    End,
    ListName,
    Memory,
    Prediction,
    Verdict,
    list_for,
    members,
    predict,
    predict_direct,
)
from ebpf_svc.explain.proof import Place, Proof, Prover
from ebpf_svc.explain.recollection import NOTHING, PortFacts, Recollection
from ebpf_svc.explain.scene import Scene
from ebpf_svc.explain.surroundings import Device, attached
from ebpf_svc.explain.way import Ground, Way, judge
from ebpf_svc.host import bpf_prog, callers, conntrack_table
from ebpf_svc.host.links import Side
from ebpf_svc.model.desired import FrontendKey, FrontendView
from ebpf_svc.model.endpoint import Endpoint
from ebpf_svc.model.net import Sources, family_of
from ebpf_svc.model.service import ServiceName
from ebpf_svc.model.snapshot import NodeFacts
from ebpf_svc.plan.endpoints import candidates_of
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.place import place_of
from ebpf_svc.plan.planner import Planner

DEFAULT_PORT = 49_999
"""The client's port when none was named."""
LOOPBACK = ("127.0.0.1", "::1")
_NOWHERE = NodeFacts(name="")


@dataclass(slots=True)
class Explanation:
    """What there is to say; `words` says it."""

    scene: Scene
    client: Client
    call: Call
    view: FrontendView | None
    prediction: Prediction
    lags: str = ""
    """How the kernel differs from the plan of this moment; empty = not at all, or not known."""
    problems: list[str] = field(default_factory=list)
    """Conflicts between Services about the frontend."""
    rows: list[Row] = field(default_factory=list)
    affinity: Remembered | None = None
    flow: Remembered | None = None
    has_port: bool = False
    """The client's port was named, so what it is in use for counts."""
    port: PortFacts | None = None
    """What that is; None = not asked, or the packet meets no program."""
    tracked: End | None = None
    """Whom the endpoint sees of a flow that netfilter masquerades: connection tracking has it."""
    device: Device | None = None
    """Where a program meets the packet: as it comes in, or leaves a process of this node."""
    side: Side = Side.INGRESS
    """Which of the two."""
    program: str = ""
    """The C function there; empty when no program is."""
    loaded_tag: str = ""
    """Of the program attached there; empty when there is none."""
    proof: Proof | None = None
    proof_is_of_packet: bool = False
    """The trial is of the packet such a client would send if no hook saw its socket."""
    way: Way | None = None
    """Which way the packet of the trial went; None when there was none, or it went nowhere."""
    spread: Counter[End | str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """The service port's name; `?` when nobody wrote it down."""
        named = self.scene.names.get(self.call.frontend)
        if named is None:
            return "?"
        return f"{named.namespace}/{named.name}" + (f":{named.port}" if named.port else "")

    @property
    def backend(self) -> End | None:
        """Where it goes, as far as that is certain or the trial chose."""
        if self.proof is not None and not self.proof_is_of_packet:
            return self.proof.outcome.backend
        if self.prediction.chosen is None and self.proof is not None:
            return self.proof.outcome.backend
        return self.prediction.chosen

    @property
    def taken(self) -> End | None:
        """The source a program of ours gave the packet; None when it left that as it was."""
        if self.proof is None or self.proof_is_of_packet:
            return None
        seen_as = self.proof.outcome.seen_as
        return seen_as if seen_as != self.call.client else None

    @property
    def is_relayed(self) -> bool:
        """Two connections, one to the agent and one from it, instead of a translated one."""
        return self.scene.mode == "userspace"

    @property
    def masquerades(self) -> bool:
        """Whether the endpoint sees an address of this node in place of the client's."""
        forwarded = self.prediction.verdict is Verdict.FORWARDED
        if self.view is None or not forwarded or self.call.at_socket:
            return False
        if self.proof is not None:
            return self.proof.outcome.masquerade
        backend = self.backend or ("", 0)  # whichever it will be
        is_itself = backend[0] == self.call.client[0]
        by_rule = self.prediction.masquerade(self.view, self.call, backend)
        return self.is_relayed or is_itself or bool(by_rule)

    @property
    def by_host_packet(self) -> bool:
        """A process of this node calls whose packets are translated where they leave."""
        is_ours = self.scene.mode == "ebpf" and self.call.kind is Sources.NODE
        return is_ours and translates_host_packets(self.scene.settings.ebpf)

    @property
    def list_name(self) -> ListName:
        """The list this client gets."""
        assert self.view is not None
        return list_for(self.view, self.call.kind)


def explain(
    scene: Scene,
    client: Client,
    frontend: FrontendKey,
    *,
    port: int = 0,
    by_packet: bool = False,
    spread: int = 0,
) -> Explanation:
    """Explain one call.

    Args:
        scene: what was looked at.
        client: who calls.
        frontend: what is called.
        port: the client's; 0 = any, and what it is in use for does not count.
        by_packet: the socket hooks do not see the client, e.g. a sandbox.
        spread: how many further ports to try, for the distribution.

    Raises:
        OSError, VerifierError: the kernel does not run the trial.
    """
    key = folded(frontend) if client.kind is Sources.NODE else frontend
    view = scene.views.get(key)
    is_packet = by_packet and client.kind is not Sources.NODE
    at_socket = not is_packet and is_at_socket(scene, client, view)
    address = client.address
    if not address and not at_socket:
        address = scene.around.source_to(key.address)
    call = Call((address, port or DEFAULT_PORT), client.kind, key, at_socket)
    told = Explanation(scene, client, call, view, Prediction(Verdict.UNTOUCHED))
    told.device, told.has_port = client.device, bool(port)
    if told.by_host_packet:
        told.device, told.side = scene.around.way_out(key.address, client.address), Side.EGRESS
    _look_at_plan(told)
    view = told.view
    with ExitStack() as stack:
        found = None
        if isinstance(scene.dataplane, EbpfDataplane):
            found = stack.enter_context(scene.dataplane.looking_at(family_of(key.address)))
        known = _recall(told, call, found)
        told.affinity, told.flow, told.port = known.affinity, known.flow, known.port
        told.prediction = _predict(told, call, known.memory)
        if found is not None and _can_be_tried(told):
            _prove(told, *found, known, spread=spread)
    if view is not None:
        snapshot = scene.known.snapshot
        place = place_of(snapshot.node if snapshot else _NOWHERE)
        told.rows = rows_of(view, told.list_name, _candidates(told), place)
    return told


def folded(frontend: FrontendKey) -> FrontendKey:
    """All of 127.0.0.0/8 is this host; frontends know its first address."""
    if frontend.address.startswith("127."):
        return frontend._replace(address=LOOPBACK[0])
    return frontend


def is_at_socket(scene: Scene, client: Client, view: FrontendView | None) -> bool:
    """Whether a socket hook translates: of pods what needs neither their address nor a masquerade,
    of the node everything.
    """
    is_off = scene.settings.ebpf.socket_lb is SocketLB.OFF
    if scene.mode != "ebpf" or view is None or is_off:
        return False
    if client.kind is Sources.NODE:
        return True
    frontend = view.frontend
    return (
        client.is_pod_here
        and hooks_see_pods(scene.settings.ebpf)
        and frontend.key.address not in LOOPBACK
        and not view.affinity_s
        and frontend.source_ranges is None
        and not frontend.masquerade_for & Sources.POD
    )


def _predict(told: Explanation, call: Call, memory: Memory) -> Prediction:
    if told.view is None:
        found = nothing.verdict(told.scene, call.frontend)
        if told.scene.mode == "ebpf":
            return predict_direct(call, memory)
        return Prediction(found, "" if found is Verdict.UNTOUCHED else "not_served")
    if told.by_host_packet and (told.device is None or told.device.role is None):
        return Prediction(Verdict.UNTOUCHED, "no_program" if told.device else "no_route")
    # The hooks do not know the source yet. A set with the node's address holds the VIP's own, too.
    filtered_as = call.frontend.address if call.at_socket or not call.client[0] else ""
    moves_sctp = told.scene.mode != "ebpf"
    return predict(call, told.view, memory, filtered_as=filtered_as, moves_sctp=moves_sctp)


def _recall(told: Explanation, call: Call, found: tuple[Live, Artifact] | None) -> Recollection:
    if found is None:
        return NOTHING
    if told.view is None:
        comes_in = _can_be_tried(told) and call.kind is not Sources.NODE
        if not (told.has_port and comes_in):
            return NOTHING
        return recollection.recall_direct(found[0], call)
    cookie = callers.own_cookie() if call.kind is Sources.NODE else 0
    if call.at_socket and not cookie:
        return NOTHING
    return recollection.recall(
        found[0], call, told.view, told.list_name, netns=cookie, port_matters=told.has_port
    )


def _can_be_tried(told: Explanation) -> bool:
    """Whether a program meets the call that can be run: socket hooks cannot."""
    if told.call.kind is Sources.NODE:
        has_program = told.device is not None and told.device.role is not None
        return told.by_host_packet and has_program and bool(told.call.client[0])
    return bool(told.client.address)


def _prove(
    told: Explanation, live: Live, artifact: Artifact, known: Recollection, *, spread: int
) -> None:
    """Run the program the client's packets meet; where a socket hook comes first, for comparison
    the one a client without it would meet.
    """
    device, scene = told.device, told.scene
    role = device.role if device and device.role else DeviceRole.NODE
    told.program = role.program(told.side)
    place = Place(told.program, device.index if device else 0)
    call = replace(told.call, at_socket=False)
    if told.call.at_socket:
        known = _recall(told, call, (live, artifact))
    prediction = _predict(told, call, known.memory)
    mark = 1 << scene.settings.masquerade_bit
    has_drivers = scene.settings.ebpf.xdp and uses_fast_path(scene.settings.ebpf)
    drivers = scene.around.drivers() if has_drivers else frozenset()
    back = _back(scene)
    with closing(Prover(artifact, live, place, mark=mark, back=back, drivers=drivers)) as prover:
        told.proof = prover.prove(call, told.view, prediction, known.seeds)
    told.proof.differences += proof.compare_port(call, prediction, told.proof.outcome, known.port)
    told.proof_is_of_packet = told.call.at_socket
    outcome = told.proof.outcome
    if prediction.by is ChosenBy.FLOW and outcome.by_netfilter and outcome.after is not None:
        ends = outcome.after.source, outcome.after.destination
        told.tracked = conntrack_table.seen_as(*ends, call.frontend.protocol)
    if not told.call.at_socket:
        ground = Ground(
            scene.settings.ebpf, device, lambda to: scene.around.way_out(to, ""), live.link
        )
        told.way = judge(call, told.proof, place, prediction.by, ground)
    _compare_tags(told, live)
    if spread:
        told.spread = proof.spread(
            *(artifact, live, place, call, known.seeds), mark=mark, count=spread
        )


def _back(scene: Scene) -> Callable[[str], Place]:
    """Where an endpoint's answers come in."""

    def place(address: str) -> Place:
        device = scene.around.device_of(address)
        if device is None or device.role is None:
            return Place("")
        return Place(device.role.program(Side.INGRESS), device.index)

    return place


def _compare_tags(told: Explanation, live: Live) -> None:
    """See that the program that was tried is the one that is attached."""
    device = told.device
    if told.proof is None or device is None or device.role is None or device.is_guess:
        return
    name = f"{NAME_PREFIX}{told.program}{int(live.family)}"  # as filters call it
    program_id = attached(device, told.side).get(name)
    if program_id is None:
        told.proof.differences.append(f"{name} is not attached to {device.name}: no agent serves")
        return
    try:
        fd = bpf_prog.by_id(program_id)
    except FileNotFoundError:
        return
    try:
        told.loaded_tag = bpf_prog.facts(fd).tag
    finally:
        os.close(fd)
    if told.loaded_tag != told.proof.tag:
        told.proof.differences.append(
            f"{name} on {device.name} is other code than what was tried (tag {told.loaded_tag} "
            f"instead of {told.proof.tag}): an agent of another version attached it"
        )


def _look_at_plan(told: Explanation) -> None:
    """Compare with the plan of this moment; where the kernel does not hold all that a plan says of
    a frontend, as rules do not, take the plan's word.
    """
    scene, key = told.scene, told.call.frontend
    if scene.known.snapshot is None:
        return
    planner = Planner(PlanOptions.from_settings(scene.settings))
    desired = planner.plan(scene.known.snapshot)
    told.problems = [str(each) for each in desired.problems if str(key) in str(each)]
    planned = scene.dataplane.view(desired).get(key)
    if planned == told.view:
        whole = desired.view().get(key)
        told.view = _fallen_back(whole, told.view) if scene.mode == "ipvs" else whole
    elif told.view is None:
        told.lags = "has it, the kernel not"
    else:
        told.lags = "has another frontend there" if planned else "has it no more"


def _fallen_back(planned: FrontendView | None, held: FrontendView | None) -> FrontendView | None:
    """Ipvs sends whom the Local list leaves with nothing to the Cluster list (V8)."""
    if planned is None or held is None or not held.backends:
        return planned
    if members(planned, ListName.LOCAL):
        return planned
    return replace(planned, frontend=replace(planned.frontend, local_for=Sources.NONE))


def _candidates(told: Explanation) -> Mapping[End, Endpoint] | None:
    """The endpoints the API has for the service port."""
    scene, key = told.scene, told.call.frontend
    named, snapshot = scene.names.get(key), scene.known.snapshot
    if named is None or snapshot is None:
        return None
    name = ServiceName(named.namespace, named.name)
    service = snapshot.services.get(name)
    if service is None:
        return None
    for port in service.ports:
        if port.name == named.port and port.protocol is key.protocol:
            return candidates_of(snapshot.slices.get(name, ()), family_of(key.address), port)
    return None
