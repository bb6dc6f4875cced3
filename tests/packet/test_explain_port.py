"""A client's port that is in use already: what `explain` says of it is what the next packet meets.

The world's maps are the live ones: real packets come before and after the question.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from ebpf_svc.dataplane.ebpf import constants
from ebpf_svc.dataplane.ebpf.constants import NAT_PORTS, NAT_TRIES, UDP_IDLE_S
from ebpf_svc.explain import proof
from ebpf_svc.explain.client import Client
from ebpf_svc.explain.explain import Explanation
from ebpf_svc.explain.model import Call, ChosenBy, Prediction, Verdict
from ebpf_svc.explain.port import sentences
from ebpf_svc.explain.proof import Proof
from ebpf_svc.explain.recollection import Asked, PortFacts
from ebpf_svc.explain.scene import Scene
from ebpf_svc.host import bpf_prog
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.packets import Address
from tests.packet.test_explain import PROGRAMS, Site, site
from tests.packet.test_explain_way import Node, built, namespace, node

__all__ = ["built", "namespace", "node", "site"]  # fixtures of theirs

pytestmark = pytest.mark.root
by_protocol = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


class Caller:
    """A port of a client that calls this and that, and what is said of each call before."""

    def __init__(
        self, site: Site, proto: Protocol = Protocol.TCP, kind: Sources = Sources.POD
    ) -> None:
        net = site.world.net
        self.site, self.proto, self.kind = site, proto, kind
        self.address = net.pod if kind is Sources.POD else net.outside
        self.vip, self.other, self.endpoint = (net.vip, 80), (net.other_vip, 80), (net.a, 8080)

    def serve(self, *backends: Address, **how: int) -> None:
        """Both addresses lead there."""
        for at in (self.vip, self.other):
            self.site.world.service(*at, self.proto, backends=backends or [self.endpoint], **how)

    def call(self, to: Address, port: int = 40000) -> Call:
        """That call."""
        return Call((self.address, port), self.kind, FrontendKey(*to, self.proto))

    def packet(self, to: Address, port: int = 40000, flags: str = "S") -> Address:
        """Send it: whom the endpoint sees."""
        world, client = self.site.world, (self.address, port)
        made = world.udp(client, to)
        if self.proto is Protocol.TCP:
            made = world.tcp(client, to, flags)
        elif self.proto is Protocol.SCTP:
            made = world.sctp(client, to)
        return world.run(PROGRAMS[self.kind], made).src

    def told(self, to: Address, port: int = 40000) -> tuple[PortFacts, Prediction, Proof]:
        """What is said of it; the program does what it must."""
        call = self.call(to, port)
        found = self.site.recall(call)
        assert found.port is not None
        prediction, proved = self.site.prove(call, found)
        assert proved.differences == []
        return found.port, prediction, proved

    def said(self, to: Address, port: int = 40000) -> str:
        """The same in words."""
        call, (facts, prediction, proved) = self.call(to, port), self.told(to, port)
        scene = cast("Scene", SimpleNamespace(mode="ebpf"))
        told = Explanation(
            *(scene, Client(self.address, self.kind, ""), call, self.site.view_of(call)),
            *(prediction,),
            has_port=True,
            port=facts,
            proof=proved,
        )
        return " ".join(sentences(told))

    def foretold(self, to: Address, port: int = 40000) -> tuple[PortFacts, int]:
        """Ask, and send the packet: what was said, and the port the endpoint sees by both."""
        facts, prediction, proved = self.told(to, port)
        sent = self.packet(to, port)
        if prediction.verdict is Verdict.UNTOUCHED:
            assert sent == (self.address, port)
        else:
            assert sent == proved.outcome.seen_as
        return facts, sent[1]

    def ports_that_begin_alike(self) -> Iterator[int]:
        """Of the client, whose calls of the first address try the same ports."""
        found: dict[int, list[int]] = {}
        for port in range(20_000, 60_000):
            first = self.site.live.client_hash(self.call(self.vip, port).frontend,
                                               (self.address, port)) % len(NAT_PORTS)  # fmt: skip
            found.setdefault(first, []).append(port)
        return iter(max(found.values(), key=len))


@by_protocol
@pytest.mark.parametrize("kind", list(PROGRAMS), ids=["pod", "external"])
def test_port_of_a_direct_call_is_another_for_the_service(
    site: Site, proto: Protocol, kind: Sources
) -> None:
    """Who calls the endpoint itself, and then its service: said, tried, and so it is."""
    caller = Caller(site, proto, kind)
    caller.serve()
    facts, port = caller.foretold(caller.endpoint)
    assert (facts.taken, port) == (frozenset(), 40000)
    facts, port = caller.foretold(caller.vip)
    assert list(facts.direct) == [caller.endpoint]
    assert facts.uses == ()
    assert port in NAT_PORTS
    # The flow is there now, and goes on.
    assert (
        caller.said(caller.vip)
        == f"the flow that port 40000 has keeps port {port} at the endpoint."
    )
    # From another port it is free.
    facts, port = caller.foretold(caller.vip, 40001)
    assert (facts.taken, port) == (frozenset(), 40001)


@by_protocol
def test_port_of_a_flow_is_another_for_a_direct_call(site: Site, proto: Protocol) -> None:
    """And for another service; the direct call then goes on with the port it has."""
    caller = Caller(site, proto)
    caller.serve()
    assert caller.foretold(caller.vip)[1] == 40000
    facts, direct = caller.foretold(caller.endpoint)
    assert [(use.frontend, use.endpoint) for use in facts.uses] == [(caller.vip, caller.endpoint)]
    facts, other = caller.foretold(caller.other)
    assert caller.vip in [use.frontend for use in facts.uses]
    assert len({40000, direct, other}) == 3
    _, prediction, _ = caller.told(caller.endpoint)
    assert (prediction.verdict, prediction.by) == (Verdict.OTHER_PORT, ChosenBy.FLOW)
    assert caller.foretold(caller.endpoint)[1] == direct


def test_port_is_free_when_the_call_has_ended(site: Site) -> None:
    """A direct call's end takes its note away, a flow's is in its state."""
    caller = Caller(site)
    caller.serve()
    for first, second in ((caller.endpoint, caller.vip), (caller.other, caller.endpoint)):
        caller.packet(first)
        assert caller.told(second)[0].taken == {caller.endpoint}
        caller.packet(first, flags="FA")
        facts, port = caller.foretold(second)
        assert (facts.taken, port) == (frozenset(), 40000)
        caller.packet(second, flags="R")


def test_note_of_datagrams_is_forgotten_in_time(site: Site) -> None:
    """As a flow of UDP is; one of a connection stays."""
    for proto, taken in ((Protocol.UDP, False), (Protocol.TCP, True)):
        caller = Caller(site, proto)
        site.world.reset()
        caller.serve()
        caller.packet(caller.endpoint)
        site.world.age_notes(UDP_IDLE_S + 1)
        facts, port = caller.foretold(caller.vip)
        assert (facts.taken != frozenset(), port in NAT_PORTS) == (taken, taken)


def test_port_that_was_not_named_is_in_use_for_nothing(site: Site) -> None:
    """Then the trial has nobody's notes and flows, as before."""
    caller = Caller(site)
    caller.serve()
    caller.packet(caller.endpoint)
    call = caller.call(caller.vip)
    found = site.recall(call, port_matters=False)
    prediction, proved = site.prove(call, found)
    assert (found.port, found.seeds.direct, prediction.chosen) == (None, b"", caller.endpoint)
    assert (proved.outcome.seen_as, proved.differences) == (call.client, [])


@by_protocol
def test_ports_that_others_have_are_passed_over(site: Site, proto: Protocol) -> None:
    """The next one that is free is told; when none is, the call is dropped, and that is told."""
    caller = Caller(site, proto)
    caller.serve()
    ports = caller.ports_that_begin_alike()
    got = []
    for number in range(NAT_TRIES):
        port = next(ports)
        caller.packet(caller.other, port)
        facts, seen = caller.foretold(caller.vip, port)
        tries = facts.tries[caller.endpoint, caller.address]
        assert [each.port for each in tries[:number]] == got
        assert all(each.holder is not None for each in tries[:number])
        got.append(seen)
    assert got == [
        NAT_PORTS[(got[0] - NAT_PORTS[0] + n) % len(NAT_PORTS)] for n in range(NAT_TRIES)
    ]
    port = next(ports)
    caller.packet(caller.other, port)
    _, prediction, proved = caller.told(caller.vip, port)
    assert (prediction.verdict, prediction.reason) == (Verdict.DROPPED, "client_port_clash")
    assert proved.outcome.reason == "client_port_clash"
    said = caller.said(caller.vip, port)
    assert "and none of those it could get is free: dropped." in said
    assert [
        int(each) for each in re.findall(r"(\d+) \(", said.partition("Taken there: ")[2])
    ] == got
    caller.packet(caller.vip, port)
    assert site.world.drops() == {constants.Drop.CLIENT_PORT_CLASH: 1}


def test_port_of_another_whose_flow_has_ended_is_free(site: Site) -> None:
    """The next one gets it, and it is told so."""
    caller = Caller(site)
    caller.serve()
    ports = caller.ports_that_begin_alike()
    first, second = next(ports), next(ports)
    for port in (first, second):
        caller.packet(caller.other, port)
    held = caller.packet(caller.vip, first)[1]
    assert caller.told(caller.vip, second)[2].outcome.seen_as != (caller.address, held)
    caller.packet(caller.vip, first, flags="R")
    assert caller.foretold(caller.vip, second)[1] == held


def test_sctp_whose_port_is_in_use_is_dropped(site: Site) -> None:
    """No port can be changed: said before, as the program does; a direct call goes on."""
    caller = Caller(site, Protocol.SCTP)
    caller.vip, caller.other = (caller.vip[0], 8080), (caller.other[0], 8080)
    caller.serve()
    caller.packet(caller.vip)
    _, prediction, _ = caller.told(caller.other)
    assert (prediction.verdict, prediction.reason) == (Verdict.DROPPED, "client_port_clash")
    assert caller.said(caller.other).endswith("SCTP's ports cannot be changed: dropped.")
    _, prediction, _ = caller.told(caller.endpoint)
    assert prediction.verdict is Verdict.UNTOUCHED
    assert "it can get no other, and the endpoint cannot tell" in caller.said(caller.endpoint)
    caller.packet(caller.other)
    assert site.world.drops() == {constants.Drop.CLIENT_PORT_CLASH: 1}


@pytest.mark.parametrize("maglev_size", [0, 101], ids=["plain", "maglev"])
def test_endpoint_of_a_named_port_is_told(site: Site, maglev_size: int) -> None:
    """By the hash of client and port; two addresses of one service go to two endpoints."""
    world, caller = site.world, Caller(site)
    endpoints = [(world.net.a, 8000 + number) for number in range(5)]
    service = world.service(*caller.vip, backends=endpoints, maglev_size=maglev_size)
    service.add_frontend(*caller.other, **({"flags": constants.FrontendFlag.MAGLEV}
                                           if maglev_size else {}))  # fmt: skip
    for port in range(40000, 40006):
        reached = []
        for to in (caller.vip, caller.other):
            _, prediction, proved = caller.told(to, port)
            assert prediction.chosen == proved.outcome.backend
            reached.append(world.run("pod_ingress", world.tcp((caller.address, port), to)).dst)
            assert reached[-1] == prediction.chosen
        assert len(set(reached)) == 2


def test_question_leaves_notes_and_flows_alone(site: Site) -> None:
    """However often it is asked: the live maps are as before."""
    caller = Caller(site, Protocol.UDP)
    caller.serve()
    caller.packet(caller.endpoint)
    caller.packet(caller.other)

    def state() -> object:
        notes = site.live.maps.direct
        return (
            notes.read(0, notes.max_entries),
            site.world.entries("reverse"),
            site.world.entries("flows"),
        )

    before = state()
    for to in (caller.vip, caller.other, caller.endpoint):
        caller.told(to)
    assert state() == before


def test_program_that_gives_another_port_is_found_out(site: Site) -> None:
    """The port is worked out a second time: another one, or none where one is due, is said."""
    caller = Caller(site)
    caller.serve()
    caller.packet(caller.endpoint)
    call = caller.call(caller.vip)
    found = site.recall(call)
    assert found.port is not None
    prediction, proved = site.prove(call, found)
    blind = replace(found.port, direct={})
    (said,) = proof.compare_port(call, prediction, proved.outcome, blind)
    assert said.startswith("the endpoint must see port 40000")
    (tries,) = (found.port.tries[key] for key in found.port.tries if key[1] == caller.address)
    moved = {(caller.endpoint, caller.address): tries[1:]}
    (said,) = proof.compare_port(call, prediction, proved.outcome, replace(found.port, tries=moved))
    assert said.startswith(f"the endpoint must see port {tries[1].port}")


@by_protocol
def test_port_of_the_node_that_another_client_has_is_passed_over(
    node: Node, proto: Protocol
) -> None:
    """P6 on the fast path: two clients would have one port, and the later has the next."""
    site, net = node.site, node.site.world.net
    to, endpoint = (net.node, 30080), (net.b, 8080)
    site.world.service(*to, proto, backends=[endpoint], masquerade_for=Sources.ALL)
    key, client = FrontendKey(*to, proto), (net.outside, 40000)

    def first(end: Address) -> int:
        return site.live.client_hash(key, end) % len(NAT_PORTS)

    rival = next(
        (net.outside_too, port)
        for port in range(1024, 65536)
        if first((net.outside_too, port)) == first(client)
    )

    def send(end: Address) -> Address:
        made = (site.world.tcp if proto is Protocol.TCP else site.world.udp)(end, to)
        context = bytearray(192)
        struct.pack_into("=I", context, 40, node.devices["outside"].index)
        data = bpf_prog.test_run(
            site.world.programs["node_ingress"], bytes(made), context=bytes(context)
        ).data
        at = 26 if site.world.family is Family.V4 else 22
        kind, size = (socket.AF_INET, 4) if at == 26 else (socket.AF_INET6, 16)
        source = socket.inet_ntop(kind, data[at : at + size])
        return source, struct.unpack_from("!H", data, at + 2 * size)[0]

    held = send(rival)
    assert held == (net.node, NAT_PORTS[first(client)])
    proved, _ = node.ask(client, to, "outside", proto)
    assert proved.outcome.seen_as == held  # without its port nobody else's flows are known
    proved, _ = node.ask(client, to, "outside", proto, port_matters=True)
    assert proved.outcome.seen_as == (net.node, NAT_PORTS[(first(client) + 1) % len(NAT_PORTS)])
    assert send(client) == proved.outcome.seen_as


class Resolver:
    """A process of the node whose socket has the number of a node port (B9)."""

    def __init__(self, site: Site, sock: socket.socket) -> None:
        sock.bind(("", 0))
        net = site.world.net
        self.node, self.asked = (net.node, sock.getsockname()[1]), (net.outside, 53)
        self.caller = Caller(site, Protocol.UDP, Sources.EXTERNAL)
        site.world.service(*self.node, Protocol.UDP, backends=[self.caller.endpoint])

    def told(self) -> tuple[Asked | None, Verdict]:
        """What is said of a datagram from whom it may have asked; the real one fares the same."""
        facts, prediction, _ = self.caller.told(self.node, self.asked[1])
        world = self.caller.site.world
        sent = world.udp(self.asked, self.node)
        ran = world.run("node_ingress", sent)
        assert (ran.data == bytes(sent)) is (prediction.verdict is Verdict.UNTOUCHED)
        assert (prediction.reason == "own_answer") is (facts.asked is not None)
        world.hash("flows").clear()
        return facts.asked, prediction.verdict


@pytest.fixture
def resolver(site: Site) -> Iterator[tuple[Resolver, socket.socket]]:
    kind = socket.AF_INET if site.world.family is Family.V4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_DGRAM) as sock:
        yield Resolver(site, sock), sock


def test_answer_that_a_process_waits_for_is_told(
    site: Site, resolver: tuple[Resolver, socket.socket]
) -> None:
    """B9: from whom it asked, while its socket is open and the note is young."""
    asking, sock = resolver
    assert asking.told() == (None, Verdict.FORWARDED)
    site.world.run("egress", site.world.udp(asking.node, asking.asked))
    asked, verdict = asking.told()
    assert verdict is Verdict.UNTOUCHED
    assert asked is not None
    assert not asked.is_connected
    assert asked.idle_s is not None
    assert asked.idle_s < UDP_IDLE_S
    notes = site.world.hash("reverse")
    ((key, value),) = list(notes.items())
    fields = notes.value.unpack(value)._asdict()
    fields["service"] = (fields["service"] - UDP_IDLE_S - 2) % 2**32
    notes.update([(key, notes.value.pack(**fields))])
    assert asking.told() == (None, Verdict.FORWARDED)
    site.world.run("egress", site.world.udp(asking.node, asking.asked))
    sock.close()
    assert asking.told() == (None, Verdict.FORWARDED)


def test_answer_to_a_connected_socket_is_told(
    site: Site, resolver: tuple[Resolver, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B9: it says itself to whom it talks. Its two ends must be addresses of this machine's."""
    asking, sock = resolver
    loopback = "127.0.0.1" if site.world.family is Family.V4 else "::1"
    sock.connect((loopback, asking.asked[1]))
    asking.node, asking.asked = (loopback, asking.node[1]), (loopback, asking.asked[1])
    asking.caller.address = loopback
    site.world.service(*asking.node, Protocol.UDP, backends=[asking.caller.endpoint])
    assert asking.told() == (Asked(is_connected=True), Verdict.UNTOUCHED)
    sock.close()
    assert asking.told() == (None, Verdict.FORWARDED)
