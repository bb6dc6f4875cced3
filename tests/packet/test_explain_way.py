"""Which way packets go, as `explain` says: trials at real devices, with routes and neighbours.

The devices are in a network namespace of their own and lead nowhere: a trial sends nothing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.config import EbpfSettings, SocketLB
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.constants import (
    MASQUERADE_MARK,
    NAT_PORTS,
    NO_LINK,
    FrontendFlag,
    LinkKind,
)
from ebpf_svc.dataplane.ebpf.devices import DeviceRole
from ebpf_svc.dataplane.ebpf.live import Live
from ebpf_svc.dataplane.ebpf.tables import SHARED, Tables
from ebpf_svc.explain import proof, recollection
from ebpf_svc.explain import way as ways
from ebpf_svc.explain.model import Call, ListName, Verdict, predict
from ebpf_svc.explain.proof import Place, Proof, Prover
from ebpf_svc.explain.surroundings import Device
from ebpf_svc.explain.way import Ground, Way, judge
from ebpf_svc.host import bpf_prog
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.testbed.namespace import Namespace
from tests.lib.kernel import running_kernel
from tests.lib.packet_world import World, artifacts
from tests.lib.packets import Address
from tests.packet.test_explain import ROWS, Site, traffic_of

FAST, STACK, TURNED = ways.Path.FAST, ways.Path.STACK, ways.Path.TURNED
MAC = "02:00:00:00:00:99"
DEVICES = {
    # name: what the fast path knows it as, our role for it
    "pod": (LinkKind.PEER, DeviceRole.POD),
    "here": (LinkKind.PEER, DeviceRole.POD),
    "outside": (LinkKind.NIC, DeviceRole.NODE),
    "there": (LinkKind.NIC, DeviceRole.NODE),
    "tunnel": (None, DeviceRole.NODE),
}
COLD = {Family.V4: "10.244.4.24", Family.V6: "fd00:10:244:4::24"}
"""A pod behind `there`, to which no packet went yet."""


@dataclass
class Node:
    """A node's devices, the maps of its programs, and what `explain` would look at."""

    site: Site
    devices: dict[str, Device]
    behind: dict[str, str]
    """Address -> device."""
    ebpf: EbpfSettings = field(default_factory=EbpfSettings)
    drivers: set[str] = field(default_factory=set)

    def link(self, name: str, kind: LinkKind | None, address: str) -> None:
        """Tell the fast path of a device; None = it must not use it."""
        world = self.site.world
        table = world.hash("links")
        key = table.key.pack(value=self.devices[name].index if name else NO_LINK)
        table.delete([key])
        if kind is not None:
            packed = world._packed(address) if address else bytes(table.value.size - 4)
            table.update([(key, table.value.pack(kind=int(kind), addr=packed))])

    def drive(self, name: str) -> None:
        """Let a NIC's driver run the program."""
        self.drivers.add(name)
        self.link(name, LinkKind.DRIVER, self.site.world.net.node)

    def way_out(self, address: str) -> Device | None:
        """The device a route leads to."""
        return self.devices.get(self.behind.get(address, ""))

    def back(self, address: str) -> Place:
        """Where answers come in."""
        device = self.way_out(address)
        if device is None:
            return Place("")
        return Place(
            "pod_ingress" if device.role is DeviceRole.POD else "node_ingress", device.index
        )

    def ask(
        self,
        client: Address,
        to: Address,
        by: str,
        proto: Protocol = Protocol.TCP,
        *,
        kind: Sources = Sources.EXTERNAL,
        program: str = "",
        port_matters: bool = False,
    ) -> tuple[Proof, Way | None]:
        """Prove a call whose packet comes in by a device, and judge its way."""
        site, device = self.site, self.devices[by]
        call = Call(client, kind, FrontendKey(*to, proto))
        view = site.view(to, proto)
        name = ListName.CLUSTER
        found = recollection.recall(site.live, call, view, name, netns=0, port_matters=port_matters)
        prediction = predict(call, view, found.memory)
        default = "pod_ingress" if device.role is DeviceRole.POD else "node_ingress"
        place = Place(program or default, device.index)
        prover = Prover(
            *(site.artifact, site.live, place),
            mark=MASQUERADE_MARK,
            back=self.back,
            drivers=frozenset(self.devices[name].index for name in self.drivers),
        )
        with closing(prover):
            proved = prover.prove(call, view, prediction, found.seeds)
        assert proved.differences == []
        assert list(proof.compare_port(call, prediction, proved.outcome, found.port)) == []
        ground = Ground(self.ebpf, device, self.way_out, site.live.link)
        return proved, judge(call, proved, place, prediction.by, ground)


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    made = Namespace(f"explain-{os.getpid()}")
    made.sysctl({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
    with made.netlink() as ip:
        for name in DEVICES:
            ip.link("add", ifname=name, kind="veth", peer={"ifname": f"{name}-far"})
            for each in (name, f"{name}-far"):
                ip.link("set", index=ip.link_lookup(ifname=each)[0], state="up")
    yield made
    made.close()


def _built(family: Family, artifact: Artifact, namespace: Namespace) -> Iterator[Node]:
    world = World(family, artifact)
    tables = {
        name if name in SHARED else f"{name}{int(family)}": table
        for name, table in world.tables.items()
    }
    net = world.net
    behind = {net.pod: "pod", net.a: "here", net.outside: "outside", net.outside_too: "outside",
              net.b: "there", COLD[family]: "there", net.c: "tunnel"}  # fmt: skip
    with namespace.netlink() as ip:
        index_of = {name: ip.link_lookup(ifname=name)[0] for name in DEVICES}
        for address, name in behind.items():
            length = 32 if family is Family.V4 else 128
            ip.route("replace", dst=f"{address}/{length}", oif=index_of[name])
            if address != COLD[family]:
                ip.neigh("replace", dst=address, lladdr=MAC, ifindex=index_of[name], state=128)
    devices = {name: Device(name, index_of[name], role) for name, (_, role) in DEVICES.items()}
    devices["lo"] = Device("lo", 1, DeviceRole.LOOPBACK)
    yield Node(Site(world, artifact, Live(family, Tables(tables))), devices, behind)
    world.close()


def _as_new(node: Node, **settings: Any) -> Node:
    """The same with empty maps, as a test expects it."""
    world = node.site.world
    world.reset()
    world.hash("reverse").clear()
    for name, (kind, _) in DEVICES.items():
        node.link(name, kind, world.net.node)
    return replace(node, behind=dict(node.behind), ebpf=EbpfSettings(**settings), drivers=set())


every_family = pytest.fixture(scope="module", params=list(Family), ids=lambda each: each.label)


@every_family
def built(
    request: pytest.FixtureRequest, artifact_cache: Path, namespace: Namespace
) -> Iterator[Node]:
    found = artifacts(artifact_cache, translate_pods=False, fast_path=True, xdp=True)
    yield from _built(request.param, found[request.param], namespace)


@every_family
def built_without_hooks(
    request: pytest.FixtureRequest, artifact_cache: Path, namespace: Namespace
) -> Iterator[Node]:
    found = artifacts(artifact_cache, translate_pods=False, host_packets=True)
    yield from _built(request.param, found[request.param], namespace)


@pytest.fixture
def node(built: Node, namespace: Namespace) -> Iterator[Node]:
    """A node whose programs are compiled for the fast path and XDP."""
    with namespace.entered():
        yield _as_new(built, fast_path=True, xdp=True)


@pytest.fixture
def without_hooks(built_without_hooks: Node, namespace: Namespace) -> Iterator[Node]:
    """A node whose own processes are translated by packet."""
    with namespace.entered():
        node = _as_new(built_without_hooks, socket_lb=SocketLB.OFF, fast_path=True)
        node.link("", LinkKind.NIC, node.site.world.net.node)
        yield node


TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


@TCP_AND_UDP
def test_flow_between_fast_devices_goes_past_the_stack(node: Node, proto: Protocol) -> None:
    """To a pod here into the pod, elsewhere by its route; and the answer does the same."""
    net = node.site.world.net
    node.site.world.service(net.vip, 80, proto, backends=[(net.a, 8080)])
    node.site.world.service(net.vip, 81, proto, backends=[(net.b, 8080)])
    for by, client in (("pod", net.pod), ("outside", net.outside)):
        kind = Sources.POD if by == "pod" else Sources.EXTERNAL
        proved, way = node.ask((client, 40000), (net.vip, 80), by, proto, kind=kind)
        assert way is not None
        assert (way.path, way.verdict, way.answer) == (FAST, "TC_ACT_REDIRECT", FAST)
        assert (way.to_pod, way.is_cold, way.why) == (True, False, "")
        assert proved.outcome.seen_as == (client, 40000)
        assert proved.reply is not None
        assert proved.reply.ends.destination == (client, 40000)
        _, way = node.ask((client, 40000), (net.vip, 81), by, proto, kind=kind)
        assert way is not None
        assert (way.path, way.to_pod, way.device, way.answer) == (FAST, False, "there", FAST)
        told = " ".join(ways.sentences(way))
        assert told.startswith("past the stack: the program redirected the packet to there")


@TCP_AND_UDP
def test_masquerade_is_a_port_of_the_node(node: Node, proto: Protocol) -> None:
    """P6: the endpoint sees it, and its answer comes back to the client by it, also later."""
    world, net = node.site.world, node.site.world.net
    to, client = (net.node, 30080), (net.outside, 40000)
    world.service(*to, proto, backends=[(net.b, 8080)], masquerade_for=Sources.ALL)
    for port_matters in (False, True):
        proved, way = node.ask(client, to, "outside", proto, port_matters=port_matters)
        assert way is not None
        assert (way.path, way.answer) == (FAST, FAST)
        assert proved.outcome.masquerade
        assert proved.outcome.seen_as is not None
        assert proved.outcome.seen_as[0] == net.node
        assert proved.outcome.seen_as[1] in NAT_PORTS
        assert proved.reply is not None
        assert (proved.reply.ends.source, proved.reply.ends.destination) == (to, client)
        # Now it has a flow that is alive.
        context = bytearray(192)
        struct.pack_into("=I", context, 40, node.devices["outside"].index)
        packet = (world.tcp if proto is Protocol.TCP else world.udp)(client, to)
        ran = bpf_prog.test_run(
            world.programs["node_ingress"], bytes(packet), context=bytes(context)
        )
        assert ran.retval == proof.REDIRECT


def test_reason_to_go_through_the_stack_is_told(node: Node) -> None:
    """Each by its own words, and never with the fast path's flag."""
    world, net = node.site.world, node.site.world.net
    client, sctp = (net.outside, 40000), Protocol.SCTP
    world.service(net.vip, 80, backends=[(net.c, 8080)])
    world.service(net.vip, 81, backends=[(net.b, 8080)])
    world.service(net.vip, 82, backends=[(net.b, 8080)], masquerade_for=Sources.ALL)
    world.service(net.vip, 83, backends=[(net.router, 8080)])
    world.service(net.vip, 84, sctp, backends=[(net.b, 84)], masquerade_for=Sources.ALL)
    world.service(net.vip, 85, sctp, backends=[(net.b, 85)])

    def why(port: int, by: str = "outside", proto: Protocol = Protocol.TCP) -> str:
        _, way = node.ask(client, (net.vip, port), by, proto)
        assert way is not None
        assert (way.path, way.verdict, way.answer) == (STACK, "TC_ACT_UNSPEC", STACK)
        return way.why

    assert "leaves by tunnel, which is none of pods' interfaces" in why(80)
    assert "it comes by tunnel, which is none of" in why(81, by="tunnel")
    assert why(83) == f"no route leads to {net.router}"
    assert "for SCTP no port of the node's" in why(84, proto=sctp)
    _, way = node.ask(client, (net.vip, 85), "outside", sctp)
    assert way is not None
    assert way.path is FAST
    node.link("there", LinkKind.NIC, "")
    assert why(82) == "a masquerade is due, and there has no address for it"


def test_reason_that_no_table_tells_is_not_made_up(node: Node) -> None:
    """Where routes by source differ from the one that is looked at: no reason is said."""
    world, net = node.site.world, node.site.world.net
    world.service(net.vip, 80, backends=[(net.c, 8080)])
    node.behind[net.c] = "there"
    _, way = node.ask((net.outside, 40000), (net.vip, 80), "outside")
    assert way is not None
    assert (way.path, way.why) == (STACK, "")
    assert "why, the tables do not tell" in ways.sentences(way)[0]


def test_pod_that_calls_itself_is_turned_round(node: Node) -> None:
    """P9: by its own device, which is not the fast path."""
    world, net = node.site.world, node.site.world.net
    world.service(net.vip, 80, backends=[(net.a, 8080)])
    _, way = node.ask((net.a, 40000), (net.vip, 80), "here", kind=Sources.POD)
    assert way is not None
    assert (way.path, way.verdict, way.device) == (TURNED, "TC_ACT_REDIRECT", "here")


def test_flow_keeps_the_way_it_began(node: Node) -> None:
    """With its port named, what the live flow says counts, not what a new one would get."""
    world, net = node.site.world, node.site.world.net
    vip, client = (net.vip, 80), (net.outside, 40000)
    world.service(*vip, Protocol.UDP, backends=[(net.b, 8080)])
    world.run("node_ingress", world.udp(client, vip))  # by no device it knows
    _, way = node.ask(client, vip, "outside", Protocol.UDP, port_matters=True)
    assert way is not None
    assert (way.path, way.why) == (STACK, "the flow began that way, and keeps to it")
    _, way = node.ask((net.outside, 40001), vip, "outside", Protocol.UDP, port_matters=True)
    assert way is not None
    assert way.path is FAST


def test_client_port_that_is_taken_at_the_endpoint_goes_through_the_stack(node: Node) -> None:
    """The endpoint sees another port of the client's (FLOW_PORT), and that is said."""
    world, net = node.site.world, node.site.world.net
    client = (net.outside, 40000)
    world.service(net.vip, 80, backends=[(net.b, 8080)])
    world.service(net.vip, 81, backends=[(net.b, 8080)])
    world.run("node_ingress", world.tcp(client, (net.vip, 80)))
    proved, way = node.ask(client, (net.vip, 81), "outside", port_matters=True)
    assert way is not None
    assert way.path is STACK
    assert "a connection from this port" in way.why
    assert proved.outcome.seen_as is not None
    assert proved.outcome.seen_as[1] in NAT_PORTS
    assert proved.reply is not None
    assert proved.reply.ends.source == (net.vip, 81)


def test_neighbour_that_is_not_known_is_told(node: Node) -> None:
    """The packet is past the stack all the same; the kernel asks for the neighbour."""
    world, net = node.site.world, node.site.world.net
    world.service(net.vip, 80, backends=[(COLD[world.family], 8080)])
    _, way = node.ask((net.outside, 40000), (net.vip, 80), "outside")
    assert way is not None
    assert (way.path, way.is_cold) == (FAST, True)
    assert "asks for the neighbour" in ways.sentences(way)[0]


def test_fast_path_that_is_off_is_said_to_be(node: Node) -> None:
    """Asked for or not: the reason is the settings', not a table's."""
    world, net = node.site.world, node.site.world.net
    world.service(net.vip, 80, backends=[(net.c, 8080)])
    node.ebpf = EbpfSettings()
    _, way = node.ask((net.outside, 40000), (net.vip, 80), "outside")
    assert way is not None
    assert (way.path, way.why, way.driver) == (STACK, "ebpf.fastPath is off", None)
    node.ebpf = EbpfSettings(fast_path=True, socket_lb=SocketLB.OFF)
    _, way = node.ask((net.outside, 40000), (net.vip, 80), "outside")
    assert way is not None
    assert way.why == "ebpf.fastPath is on, but without socket hooks no program has room for it"


@TCP_AND_UDP
def test_driver_forwards_what_is_open_between_machines(node: Node, proto: Protocol) -> None:
    """XDP passes the first packet up, and sends later ones of both ends; not those to a pod here,
    and none of a device that does not run it.
    """
    world, net = node.site.world, node.site.world.net
    client = (net.outside, 40000)
    for port, backend in ((80, net.b), (81, net.a), (82, COLD[world.family]), (83, net.c)):
        world.service(net.vip, port, proto, backends=[(backend, 8080)])

    def driver(port: int, *, port_matters: bool = False) -> ways.DriverWay:
        _, way = node.ask(client, (net.vip, port), "outside", proto, port_matters=port_matters)
        assert way is not None
        assert way.driver is not None
        return way.driver

    assert not driver(80).is_ours
    node.drive("outside")
    if running_kernel() >= (5, 15):
        found = driver(80)
        assert (found.later, found.answers) == ("XDP_PASS", "")
        assert found.why == "they leave by there, whose driver runs no program"
    node.drive("there")
    found = driver(80)
    if running_kernel() < (5, 15):
        assert found == ways.DriverWay("outside", is_ours=True)
        assert "cannot try that" in ways.driver_sentences(found)[0]
        return
    assert (found.first, found.later) == ("XDP_PASS", "XDP_REDIRECT")
    assert (found.answers, found.why) == ("XDP_REDIRECT", "")
    assert "opens flows" in ways.driver_sentences(found)[0]
    found = driver(81)
    assert (found.later, found.answers) == ("XDP_PASS", "")
    assert "a pod of this node" in found.why
    assert driver(82).why == "the neighbour's address is not known yet"
    assert driver(83).why == "the flow does not take the fast path"


@TCP_AND_UDP
def test_process_of_the_node_is_tried_where_its_packet_leaves(
    without_hooks: Node, proto: Protocol
) -> None:
    """P1, P5, P8 without socket hooks: endpoint, source and answer, here and elsewhere; refused
    and dropped too.
    """
    node = without_hooks
    world, net = node.site.world, node.site.world.net
    loopback = "127.0.0.1" if world.family is Family.V4 else "::1"
    node.behind[net.node] = "lo"
    for port, backend in ((80, net.a), (81, net.b)):
        for address in (net.vip, net.node, loopback):
            world.service(address, port, proto, backends=[(backend, 8080)])
    for port in (80, 81):
        for by, own, to in (
            ("there", net.node, net.vip),
            ("lo", net.node, net.node),
            ("lo", loopback, loopback),
        ):
            proved, way = node.ask(
                *((own, 40000), (to, port), by, proto), kind=Sources.NODE, program="egress"
            )
            assert way is None
            assert proved.outcome.verdict is Verdict.FORWARDED
            assert proved.outcome.seen_as is not None
            assert proved.outcome.seen_as[0] == net.node
            assert proved.outcome.seen_as[1] in NAT_PORTS
            assert proved.reply is not None
            assert proved.reply.ends.source == (to, port)
            assert proved.reply.ends.destination == (own, 40000)


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] == "NODE"], ids="-".join)
def test_row_of_the_traffic_matrix_is_proved_for_the_node(
    without_hooks: Node, row: tuple[str, str, str, str]
) -> None:
    """The node's list is that of the table (P1, P5), for as many calls as meet every endpoint."""
    node = without_hooks
    world, net, (_, to, policy, wanted) = node.site.world, node.site.world.net, row
    everyone, here = [(net.a, 80), (net.b, 80)], [(net.a, 80)]
    treatment = traffic_of(to, policy)
    world.service(
        *(net.vip, 80), backends=everyone, local=here,
        local_for=treatment.local_for, masquerade_for=treatment.masquerade_for,
    )  # fmt: skip
    node.ask(*((net.node, 40000), (net.vip, 80), "there"), kind=Sources.NODE, program="egress")
    call = Call((net.node, 0), Sources.NODE, FrontendKey(net.vip, 80, Protocol.TCP))
    reached = proof.spread(
        *(node.site.artifact, node.site.live, Place("egress", node.devices["there"].index)),
        *(call, recollection.Seeds()),
        mark=MASQUERADE_MARK,
        count=24,
    )
    assert set(reached) == set(here if wanted.startswith("L") else everyone)


def test_process_of_the_node_is_turned_away_by_its_packet(without_hooks: Node) -> None:
    """P2, P4, P10 without socket hooks: refused, or dropped and taken for sent."""
    node = without_hooks
    world, net = node.site.world, node.site.world.net
    world.service(net.vip, 80, backends=[], flags=FrontendFlag.REJECT)
    bits = 32 if world.family is Family.V4 else 128
    world.service(net.vip, 82, backends=[(net.a, 82)], source_ranges=[f"{net.router}/{bits}"],
                  flags=FrontendFlag.SOURCE_RANGES)  # fmt: skip
    for port, verdict in ((80, Verdict.REFUSED), (82, Verdict.DROPPED)):
        proved, _ = node.ask(
            *((net.node, 40000), (net.vip, port), "there"), kind=Sources.NODE, program="egress"
        )
        assert proved.outcome.verdict is verdict
