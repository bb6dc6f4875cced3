"""Trials of the programs beside a live world: they agree with the model, and touch nothing."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace

import pytest

from ebpf_svc.dataplane.ebpf import readback
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.codec import Codec
from ebpf_svc.dataplane.ebpf.constants import MASQUERADE_MARK, FrontendFlag
from ebpf_svc.dataplane.ebpf.live import Live
from ebpf_svc.dataplane.ebpf.tables import SHARED, Tables
from ebpf_svc.explain import proof, recollection
from ebpf_svc.explain.model import (
    Call,
    ChosenBy,
    ListName,
    Memory,
    Prediction,
    Verdict,
    list_for,
    predict,
    predict_direct,
)
from ebpf_svc.explain.proof import Place, Proof, Prover
from ebpf_svc.explain.recollection import Recollection
from ebpf_svc.model.desired import FrontendKey, FrontendView
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.plan.frontends import Matrix, Treatment
from tests.lib.packet_world import World
from tests.lib.packets import Address

PROGRAMS = {Sources.POD: "pod_ingress", Sources.EXTERNAL: "node_ingress"}
ALL_PROTOCOLS = pytest.mark.parametrize(
    "proto", [Protocol.TCP, Protocol.UDP, Protocol.SCTP], ids=str
)
TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)

VERIFIES = pytest.mark.verifies
POLICIES = ("cluster", "external local", "internal local")
MATRIX = {
    # from, to: both Cluster, externalTrafficPolicy Local, internalTrafficPolicy Local (1.6)
    ("POD", "internal"): ("C", "C", "L"),
    ("POD", "external"): ("C m", "C", "C m"),
    ("NODE", "internal"): ("C m", "C m", "L m"),
    ("NODE", "external"): ("C m", "C m", "C m"),
    ("EXTERNAL", "internal"): ("C m", "C m", "L m"),
    ("EXTERNAL", "external"): ("C m", "L", "C m"),
}
ROWS = [
    (source, to, policy, wanted)
    for (source, to), cells in MATRIX.items()
    for policy, wanted in zip(POLICIES, cells, strict=True)
]


@dataclass
class Site:
    """A live world, and what is asked about it."""

    world: World
    artifact: Artifact
    live: Live

    def view(self, at: Address, proto: Protocol = Protocol.TCP) -> FrontendView:
        """A frontend read back from the maps."""
        return self.views()[FrontendKey(*at, proto)]

    def view_of(self, call: Call) -> FrontendView | None:
        """That of a call; None when it calls no frontend."""
        return self.views().get(call.frontend)

    def views(self) -> dict[FrontendKey, FrontendView]:
        """All frontends."""
        maps = self.live.tables.family[self.world.family]
        return dict(readback.read_family(Codec(self.world.family, maps), maps))

    def ask(
        self,
        kind: Sources,
        client: Address,
        to: Address,
        proto: Protocol = Protocol.TCP,
        *,
        port_matters: bool = False,
        view: FrontendView | None = None,
    ) -> tuple[Prediction, Proof]:
        """Predict and prove."""
        call = Call(client, kind, FrontendKey(*to, proto))
        found = self.recall(call, port_matters=port_matters, view=view)
        return self.prove(call, found, view)

    def recall(
        self, call: Call, *, port_matters: bool = True, view: FrontendView | None = None
    ) -> Recollection:
        """What the maps remember, of a call to a frontend or to an endpoint itself."""
        view = view or self.view_of(call)
        if view is None:
            return recollection.recall_direct(self.live, call)
        name = list_for(view, call.kind)
        return recollection.recall(self.live, call, view, name, netns=0, port_matters=port_matters)

    def prove(
        self, call: Call, found: Recollection, view: FrontendView | None = None
    ) -> tuple[Prediction, Proof]:
        """Predict and prove, with what was recalled."""
        view = view or self.view_of(call)
        prediction = predict_direct(call, found.memory)
        if view is not None:
            prediction = predict(call, view, found.memory)
        place = Place(PROGRAMS[call.kind])
        with closing(Prover(self.artifact, self.live, place, mark=MASQUERADE_MARK)) as prover:
            proved = prover.prove(call, view, prediction, found.seeds)
        proved.differences += proof.compare_port(call, prediction, proved.outcome, found.port)
        return prediction, proved


@pytest.fixture
def site(world: World, compiled: dict[Family, Artifact]) -> Site:
    tables = {
        name if name in SHARED else f"{name}{int(world.family)}": table
        for name, table in world.tables.items()
    }
    return Site(world, compiled[world.family], Live(world.family, Tables(tables)))


def traffic_of(to: str, policy: str) -> Treatment:
    """How the planner has a frontend treat its clients."""
    matrix = Matrix(detector=True, masquerade_all=False)
    if to == "internal":
        return matrix._internal_local if policy == "internal local" else matrix._internal
    return matrix._external_local if policy == "external local" else matrix._external


@VERIFIES
@TCP_AND_UDP
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_row_of_the_traffic_matrix_is_told_and_proved(
    site: Site, row: tuple[str, str, str, str], proto: Protocol
) -> None:
    """List and masquerade are those of the table (P1-P8); the program does the same."""
    source, to, policy, wanted = row
    net, kind = site.world.net, Sources[source]
    vip, everyone, here = (net.vip, 80), [(net.a, 80), (net.b, 80)], [(net.a, 80)]
    treatment = traffic_of(to, policy)
    site.world.service(
        *vip, proto, backends=everyone, local=here,
        local_for=treatment.local_for, masquerade_for=treatment.masquerade_for,
    )  # fmt: skip
    view = site.view(vip, proto)
    call = Call((net.node, 40000), kind, FrontendKey(*vip, proto))
    prediction = predict(call, view, Memory())
    letter, _, masquerade = wanted.partition(" ")
    assert prediction.list_name is (ListName.LOCAL if letter == "L" else ListName.CLUSTER)
    assert prediction.candidates == tuple(here if letter == "L" else everyone)
    assert prediction.masquerade(view, call, (net.b, 80)) is bool(masquerade)
    if kind in PROGRAMS:
        client = (net.pod if kind is Sources.POD else net.outside, 40000)
        prediction, proved = site.ask(kind, client, vip, proto)
        assert proved.differences == []
        assert proved.outcome.backend in prediction.candidates
        assert proved.outcome.masquerade is bool(masquerade)
        assert proved.reply is not None
        assert (proved.reply.ends.source, proved.reply.ends.destination) == (vip, client)


@VERIFIES
@ALL_PROTOCOLS
@pytest.mark.parametrize("kind", list(PROGRAMS), ids=["pod", "external"])
def test_verdicts_that_end_a_packet_are_told_and_proved(
    site: Site, kind: Sources, proto: Protocol
) -> None:
    """Refused (P2), dropped for want of local endpoints (P3, P4) and by source ranges (P10)."""
    net = site.world.net
    client = (net.pod if kind is Sources.POD else net.outside, 40000)
    site.world.service(net.vip, 80, proto, backends=[], flags=FrontendFlag.REJECT)
    site.world.service(net.vip, 81, proto, backends=[(net.a, 81)], local_for=Sources.ALL)
    site.world.service(net.vip, 82, proto, backends=[(net.a, 82)],
                       source_ranges=[_prefix(net.router)],
                       flags=FrontendFlag.SOURCE_RANGES)  # fmt: skip
    wanted = {
        80: (Verdict.REFUSED, "no_endpoint"),
        81: (Verdict.DROPPED, "no_local_endpoint"),
        82: (Verdict.DROPPED, "source_range"),
    }
    for port, (verdict, reason) in wanted.items():
        prediction, proved = site.ask(kind, client, (net.vip, port), proto)
        assert (prediction.verdict, prediction.reason) == (verdict, reason)
        assert (proved.outcome.verdict, proved.outcome.reason) == (verdict, reason)
        assert proved.differences == []


def test_client_inside_a_source_range_is_let_in(site: Site) -> None:
    """By the narrowest range that holds it (P10)."""
    net = site.world.net
    ranges = [_prefix(net.outside), site.world.cluster_cidr]
    site.world.service(net.vip, 80, backends=[(net.a, 80)], source_ranges=ranges,
                       flags=FrontendFlag.SOURCE_RANGES)  # fmt: skip
    prediction, proved = site.ask(Sources.EXTERNAL, (net.outside, 40000), (net.vip, 80))
    assert prediction.admitting == _prefix(net.outside)
    assert (proved.outcome.verdict, proved.differences) == (Verdict.FORWARDED, [])


@pytest.mark.parametrize("masquerade", [Sources.NONE, Sources.ALL], ids=["plain", "masquerade"])
def test_pod_that_calls_itself_is_proved(site: Site, masquerade: Sources) -> None:
    """By its own device it is turned round, from elsewhere masqueraded (P9)."""
    net, vip = site.world.net, (site.world.net.vip, 80)
    site.world.service(*vip, backends=[(net.a, 8080)], masquerade_for=masquerade)
    _, proved = site.ask(Sources.POD, (net.a, 40000), vip)
    assert (proved.outcome.hairpin, proved.differences) == (True, [])
    assert proved.reply is not None
    assert proved.reply.ends.destination == (net.a, 40000)
    _, proved = site.ask(Sources.EXTERNAL, (net.a, 40000), vip)
    assert (proved.outcome.hairpin, proved.outcome.masquerade) == (False, True)
    assert proved.differences == []


@VERIFIES
@TCP_AND_UDP
@pytest.mark.parametrize("affinity_s", [0, 600], ids=["free", "sticky"])
def test_maglev_choice_is_known_beforehand(site: Site, proto: Protocol, affinity_s: int) -> None:
    """The hash is computed a second time, in Python: every client's endpoint is named (P12)."""
    net = site.world.net
    endpoints = [(net.a, 8000 + number) for number in range(5)]
    site.world.service(
        net.node, 30080, proto, backends=endpoints, maglev_size=101, affinity_s=affinity_s
    )
    chosen = set()
    for number in range(12):
        client = (net.outside if number % 2 else net.outside_too, 40000 + 77 * number)
        prediction, proved = site.ask(Sources.EXTERNAL, client, (net.node, 30080), proto)
        assert prediction.by is ChosenBy.MAGLEV
        assert proved.outcome.backend == prediction.chosen
        assert proved.differences == []
        chosen.add(prediction.chosen)
    assert len(chosen) == 2 if affinity_s else len(chosen) > 2


def test_sctp_that_would_change_its_port_is_dropped(site: Site) -> None:
    """Its checksum cannot be mended by difference: said beforehand."""
    net = site.world.net
    site.world.service(net.vip, 80, Protocol.SCTP, backends=[(net.a, 8080)])
    prediction, proved = site.ask(Sources.POD, (net.pod, 40000), (net.vip, 80), Protocol.SCTP)
    assert (prediction.verdict, prediction.reason) == (Verdict.DROPPED, "rewrite_failed")
    assert proved.differences == []


def test_affinity_of_a_client_counts_in_the_trial(site: Site) -> None:
    """What the live map remembers decides, while it lasts (P13); the entry stays as it was."""
    world, net = site.world, site.world.net
    vip, client = (net.vip, 80), (net.pod, 40000)
    # An emulated machine may take a minute for each question.
    world.service(*vip, backends=[(net.a, port) for port in range(20)], affinity_s=10_000)
    backend = world.run("pod_ingress", world.tcp(client, vip)).dst
    world.age("affinity", 6_000)
    before = world.entries("affinity")
    for _ in range(3):
        prediction, proved = site.ask(Sources.POD, (net.pod, 41000), vip)
        assert (prediction.by, prediction.chosen) == (ChosenBy.AFFINITY, backend)
        assert (proved.outcome.backend, proved.differences) == (backend, [])
    assert world.entries("affinity") == before
    world.age("affinity", 6_000)
    prediction, proved = site.ask(Sources.POD, (net.pod, 41000), vip)
    assert (prediction.by, proved.differences) == (ChosenBy.RANDOM, [])


def test_flow_of_a_port_counts_in_the_trial_when_it_is_named(site: Site) -> None:
    """It goes on with its endpoint, even one that gets no new flows; the live entry stays."""
    world, net = site.world, site.world.net
    vip, client, backend = (net.vip, 80), (net.pod, 40000), (net.a, 8080)
    service = world.service(*vip, Protocol.UDP, backends=[backend])
    world.run("pod_ingress", world.udp(client, vip))
    service.set_backends([(net.b, 8080)], draining=[backend])
    before = world.entries("flows"), world.drops(), world.traffic()
    prediction, proved = site.ask(Sources.POD, client, vip, Protocol.UDP, port_matters=True)
    assert (prediction.by, prediction.chosen) == (ChosenBy.FLOW, backend)
    assert (proved.outcome.backend, proved.differences) == (backend, [])
    prediction, proved = site.ask(Sources.POD, client, vip, Protocol.UDP)
    assert prediction.chosen == proved.outcome.backend == (net.b, 8080)
    assert (world.entries("flows"), world.drops(), world.traffic()) == before


def test_trial_leaves_the_live_maps_alone(site: Site) -> None:
    """Flows, affinity, drops and traffic of what is alive are as before."""
    world, net = site.world, site.world.net
    world.service(net.vip, 80, backends=[(net.a, 80)], affinity_s=10)
    world.service(net.vip, 81, backends=[], flags=FrontendFlag.REJECT)

    def state() -> object:
        return world.entries("flows"), world.entries("affinity"), world.drops(), world.traffic()

    before = state()
    for port in (80, 81):
        site.ask(Sources.POD, (net.pod, 40000), (net.vip, port))
    call = Call((net.pod, 0), Sources.POD, FrontendKey(net.vip, 80, Protocol.TCP))
    found = proof.spread(
        *(site.artifact, site.live, Place("pod_ingress"), call, recollection.Seeds()),
        mark=MASQUERADE_MARK,
        count=50,
    )
    assert found == {(net.a, 80): 50}
    assert state() == before


def test_address_nobody_serves_is_untouched(site: Site) -> None:
    """No frontend, no change."""
    net = site.world.net
    call = Call((net.pod, 40000), Sources.POD, FrontendKey(net.router, 80, Protocol.TCP))
    prediction = predict(call, None, Memory())
    place = Place("pod_ingress")
    with closing(Prover(site.artifact, site.live, place, mark=MASQUERADE_MARK)) as prover:
        proved = prover.prove(call, None, prediction, recollection.Seeds())
    assert (proved.outcome.verdict, proved.differences) == (Verdict.UNTOUCHED, [])


def test_program_that_does_otherwise_is_found_out(site: Site) -> None:
    """Each thing a program could do wrongly is said: the trial is a bug finder."""
    net, vip = site.world.net, (site.world.net.vip, 80)
    site.world.service(
        *vip, backends=[(net.a, 80)], masquerade_for=Sources.POD, local_for=Sources.EXTERNAL
    )
    right = site.view(vip)

    def faults(view: FrontendView, kind: Sources = Sources.POD) -> str:
        client = (net.pod if kind is Sources.POD else net.outside, 40000)
        return " ".join(site.ask(kind, client, vip, view=view)[1].differences)

    assert faults(right) == ""
    wrong = replace(right, frontend=replace(right.frontend, masquerade_for=Sources.NONE))
    assert "masquerade must be False, and is True" in faults(wrong)
    wrong = replace(right, backends=(replace(right.backends[0], port=81),))
    assert "backend must be" in faults(wrong)
    wrong = replace(right, has_endpoints=False)
    assert "must be refused" in faults(wrong)
    wrong = replace(right, frontend=replace(right.frontend, local_for=Sources.NONE))
    assert "must be forwarded" in faults(wrong, Sources.EXTERNAL)


def _prefix(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"
