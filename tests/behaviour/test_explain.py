"""`ebpf-svc explain` on a node: it says beforehand what real connections then meet (§ 1.6)."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from ebpf_svc.cli.explain import record
from ebpf_svc.dataplane.ebpf.constants import FlowFlag
from ebpf_svc.dataplane.ebpf.dataplane import EbpfDataplane
from ebpf_svc.dataplane.ebpf.options import hooks_see_pods
from ebpf_svc.errors import CommandError
from ebpf_svc.explain import client as clients
from ebpf_svc.explain import scene as scenes
from ebpf_svc.explain.explain import explain, folded
from ebpf_svc.explain.scene import Scene
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol, family_of
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.podnet import PodNetwork
from ebpf_svc.testbed.traffic import Answer, Outcome, Probe, Target, ask_all, connection
from tests.behaviour.conftest import Publish
from tests.lib.kernel import running_kernel
from tests.lib.manifests import Endpoint, Web
from tests.lib.probing import (
    BALANCER,
    CLUSTER_IP,
    EXTERNAL_IP,
    KINDS,
    LOCALHOST,
    NODE_PORT_1,
    Row,
    every_pod_network,
    sent_by_driver,
    table,
    targets,
)
from tests.lib.world import World

FIRST_PORT = 21_000
"""Of ports the tests choose for their clients: none a system gives away by itself."""

HERE = (CLUSTER_IP, NODE_PORT_1, EXTERNAL_IP, BALANCER)
"""Frontends that node1 translates for whoever sends packets there."""
DROP_S = 0.4
Address = tuple[str, int]
VERDICTS = {
    Outcome.OK: "forwarded",
    Outcome.REFUSED: "refused",
    Outcome.TIMEOUT: "dropped",
}

NOWHERE = ("refused", "dropped")


@dataclass
class Told:
    """Explanations of node1, from one look at it."""

    world: World
    scene: Scene

    def of(self, asker: Host, target: Target, family: Family, **how: Any) -> dict[str, Any]:
        """What is said of a host that asks a target."""
        is_itself = asker is self.world.cluster.nodes[0]
        word = "node" if is_itself else asker.address(family)
        client = clients.resolve(
            word, family, self.scene.settings, known=self.scene.known, around=self.scene.around
        )
        frontend = FrontendKey(target.address, target.port, target.protocol)
        by_packet = asker is self.world.sandbox1
        return record(explain(self.scene, client, frontend, by_packet=by_packet, **how))

    def flags(self, client: Address, target: Target) -> FlowFlag | None:
        """Of the flow that node1's programs keep for a client's port; None = they keep none."""
        assert isinstance(self.scene.dataplane, EbpfDataplane)
        with self.scene.dataplane.looking_at(family_of(client[0])) as found:
            assert found is not None
            frontend = folded(FrontendKey(target.address, target.port, target.protocol))
            noted = found[0].noted(frontend, client)
        return noted.flags if noted else None


@contextmanager
def looking(world: World) -> Iterator[Told]:
    """Look at node1 as the command does, in its network namespace."""
    agent = world.agents[0]
    with agent.node.namespace.entered():
        yield Told(world, scenes.look(agent.settings))


def _wrong(row: Row, told: Mapping[str, Any], world: World, own: set[str]) -> str:
    """What the explanation of a row says wrongly; empty when it is right."""
    outcomes = {VERDICTS.get(answer.outcome, answer.detail) for answer in row.answers}
    # Netfilter also tells a process of the node that its datagram went nowhere.
    told_at_once = outcomes == {"EPERM"} and isinstance(row.asker, Node)
    if outcomes != {told["verdict"]} and not (told_at_once and told["verdict"] in NOWHERE):
        return f"said {told['verdict']}, was {outcomes}"
    if (program := told["program"]) is not None and not program["agrees"]:
        return f"program: {program['differences']}"
    if told["verdict"] != "forwarded":
        return ""
    addresses = {pod.name: pod.address(row.family) for pod in world.webs}
    port = told["candidates"][0].rpartition(":")[2]
    candidates = {each.removesuffix(f":{port}").strip("[]") for each in told["candidates"]}
    reached = {addresses[name] for name in row.servers}
    if not reached <= candidates:
        return f"said {candidates}, reached {reached}"
    expects_own = told["masquerade"] or isinstance(row.asker, Node)
    if told["hairpin"] or row.asker.address(row.family) in reached:
        return ""  # which source an endpoint sees of itself has tests of its own
    wanted = own if expects_own else {row.asker.address(row.family)}
    return "" if row.clients <= wanted else f"said {wanted}, seen {row.clients}"


def _assert_told(rows: Sequence[Row], world: World) -> None:
    own = world.own_addresses(world.cluster.nodes[0])
    wrong = []
    with looking(world) as told:
        for row in rows:
            said = told.of(row.asker, row.target, row.family)
            if fault := _wrong(row, said, world, own):
                wrong.append(f"{row!r}\n    {fault}")
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(rows)}:\n" + "\n".join(wrong), pytrace=False)


@dataclass(frozen=True)
class Call:
    """A call from a port of ours, and what was said of it before it was made."""

    asker: Host
    family: Family
    target: Target
    said: Mapping[str, Any]

    @property
    def client(self) -> Address:
        """As node1's programs see it."""
        assert self.said["program"] is not None
        return self.said["program"]["client"], self.target.source_port

    def __repr__(self) -> str:
        """As a line of a table."""
        return f"{self.asker.name}:{self.target.source_port} -> {self.target.address} {self.said}"


def _foretold(
    world: World, web: Web, *, askers: Sequence[Host], kinds: Sequence[str], first_port: int
) -> list[Call]:
    """What is said of calls by packet, each from a port of its own, that nobody has made yet."""
    ports = itertools.count(first_port)
    with looking(world) as told:
        calls = [
            Call(asker, family, target, told.of(asker, target, family, port=target.source_port))
            for kind in kinds
            for asker in askers
            if kind != LOCALHOST or isinstance(asker, Node)
            for family, plain in targets(world, web, kind)
            for target in [replace(plain, source_port=next(ports))]
        ]
    return [call for call in calls if call.said["at"] == "packet"]


def _made(world: World, calls: Sequence[Call]) -> list[tuple[Call, Answer, FlowFlag | None]]:
    """Make the calls: their answers, and the flows that node1 keeps of them."""
    answers = ask_all([Probe(call.asker, call.target) for call in calls])
    with looking(world) as told:
        return [
            (call, answer, told.flags(call.client, call.target))
            for call, (answer,) in zip(calls, answers, strict=True)
        ]


def _askers(world: World) -> list[Host]:
    """Who meets node1: its pods, a sandbox, itself, and the world outside."""
    node1 = world.cluster.nodes[0]
    return [world.shell1, world.sandbox1, node1, world.cluster.client]


@pytest.mark.parametrize("policy", ["cluster", "external_local", "internal_local"])
def test_explained_is_what_happens(world: World, publish: Publish, policy: str) -> None:
    """Every row of the traffic matrix: verdict, endpoints and the source they see (P1-P8)."""
    web = publish(
        internal_local=policy == "internal_local", external_local=policy == "external_local"
    )
    rows = table(world, web, askers=_askers(world), kinds=(*HERE, LOCALHOST), count=2)
    _assert_told(rows, world)


def test_call_is_the_one_that_was_tried(world: World, publish: Publish, dataplane: str) -> None:
    """From the same port: the endpoint, the source it sees and the way of the packet are those of
    the trial, also of what processes of the node send where no socket hook translates (P1, P6, P8).
    """
    if dataplane != "ebpf":
        pytest.skip("nothing is tried")
    web, agent = publish(), world.agents[0]
    kinds = (CLUSTER_IP, NODE_PORT_1, LOCALHOST)
    calls = _foretold(world, web, askers=_askers(world), kinds=kinds, first_port=FIRST_PORT)
    names = {pod.address(family): pod.name for pod in world.webs for family in Family}
    wrong = []
    for call, answer, flags in _made(world, calls):
        tried, way = call.said["program"], call.said["way"]
        backend, seen_as = (_split(tried[key]) for key in ("backend", "seen_as"))
        is_fast = bool(flags is not None and flags & FlowFlag.FAST)
        # What a rule of netfilter masquerades leaves the program as it came.
        is_seen = (answer.client, answer.client_port) == seen_as or (
            call.said["masquerade"] and seen_as == call.client
        )
        if not (
            tried["agrees"]
            and answer.server == names[backend[0]]
            and is_seen
            and (way is not None and way["path"] == "fast") is is_fast
        ):
            wrong.append(f"{call!r}\n    was {answer}, {flags!r}")
    assert not wrong, "\n".join(wrong)
    by_node = [call for call in calls if isinstance(call.asker, Node)]
    assert bool(by_node) is world.translates_host_packets
    assert any("egress of lo" in call.said["steps"]["hook"][0] for call in by_node) is bool(by_node)
    ways = {call.said["way"]["path"] for call in calls if call.said["way"]}
    assert ways == {"fast" if agent.settings.ebpf.fast_path else "stack"}


@every_pod_network
def test_way_of_a_packet_is_told_on_every_pod_network(world: World, publish: Publish) -> None:
    """To an endpoint here and one elsewhere: past the stack or through it, and why."""
    agent = world.agents[0]
    if world.mode != "ebpf" or not agent.settings.ebpf.fast_path:
        pytest.skip("every packet goes through the stack")
    askers, network = [world.sandbox1, world.cluster.client], world.cluster.pod_network
    for number, pod in enumerate((world.web1, world.web3), 1):
        calls = _foretold(
            *(world, publish([pod])),
            askers=askers,
            kinds=(CLUSTER_IP, NODE_PORT_1),
            first_port=FIRST_PORT + 100 * number,
        )
        for call, answer, flags in _made(world, calls):
            way = call.said["way"]
            assert answer.server == pod.name, call
            assert flags is not None
            assert (way["path"] == "fast") is bool(flags & FlowFlag.FAST), call
            assert way["answer"] == way["path"], call
            if pod is world.web3 and network is PodNetwork.OVERLAY:
                assert "flannel.1, which is none of" in way["why"]
            else:
                assert (way["path"], way["verdict"]) == ("fast", "TC_ACT_REDIRECT"), call
                assert way["to_pod"] is (pod is world.web1 and network is PodNetwork.ROUTED)
            assert call.said["steps"]["way"]


def test_call_that_no_packet_can_be_sent_for_is_told(
    world: World, publish: Publish, dataplane: str
) -> None:
    """From the loopback address nothing leaves the node: not forwarded."""
    if dataplane != "ebpf" or not world.translates_host_packets:
        pytest.skip("calls of the node are translated before they have a source")
    web, agent = publish(), world.agents[0]
    with looking(world) as told:
        scene, family = told.scene, Family.V4
        client = clients.resolve(
            "localhost", family, scene.settings, known=scene.known, around=scene.around
        )
        frontend = FrontendKey(str(web.cluster.v4), 80, Protocol.TCP)
        said = record(explain(scene, client, frontend))
    assert (said["verdict"], said["reason"], said["program"]) == ("untouched", "no_route", None)
    assert "no route leads from 127.0.0.1" in said["steps"]["hook"][0]
    with agent.node.namespace.entered(), socket.socket() as caller:
        caller.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="Invalid argument"):
            caller.connect((str(web.cluster.v4), 80))


def test_datagram_that_meets_the_program_all_the_same_is_told(
    world: World, publish: Publish
) -> None:
    """B9: of a pod's sockets the hooks translate those that are connected to a node port."""
    agent, asker, family = world.agents[0], world.shell1, Family.V4
    if world.mode != "ebpf" or not hooks_see_pods(agent.settings.ebpf):
        pytest.skip("no hook sees pods' sockets")
    web = publish(external_local=True)
    node_port = web.at_node(agent.node, family, Protocol.UDP)
    for plain, by_program in ((node_port, True), (web.at_cluster_ip(family, Protocol.UDP), False)):
        free = replace(plain, source_port=FIRST_PORT + 500, connected=False)
        with looking(world) as told:
            said = told.of(asker, plain, family)
        assert ask_all([Probe(asker, free)])[0][0].ok
        with looking(world) as told:
            flags = told.flags((asker.address(family), free.source_port), free)
        assert said["at"] == "socket"
        assert any("not connected" in each for each in said["steps"]["hook"]) is by_program
        assert (flags is not None) is by_program


def test_what_the_driver_does_is_told(world: World, publish: Publish) -> None:
    """XDP forwards what is open between other machines, and leaves the rest to tc."""
    agent, family = world.agents[0], Family.V4
    if world.mode != "ebpf" or not agent.settings.ebpf.xdp:
        pytest.skip("no driver runs a program of ours")
    for pod, later in ((world.web3, "XDP_TX"), (world.web1, "XDP_PASS")):
        target = publish([pod]).at_node(agent.node, family, Protocol.TCP)
        with looking(world) as told:
            driver = told.of(world.cluster.client, target, family)["way"]["driver"]
        with connection(world.cluster.client, target) as held:
            assert held.ping().server == pod.name
            before = sent_by_driver(agent.node)
            assert all(held.ping().ok for _ in range(20))
        sent = sent_by_driver(agent.node) - before
        wanted = ("XDP_PASS", later, "XDP_TX" if pod is world.web3 else "")
        if running_kernel() < (5, 15):
            wanted = ("", "", "")  # it tries no driver's program, and that is said
        assert (driver["first"], driver["later"], driver["answers"]) == wanted
        assert (sent >= 40) is (later == "XDP_TX")


@every_pod_network
def test_explained_is_what_happens_on_every_pod_network(world: World, publish: Publish) -> None:
    """The policy with most cases, however pods are attached (P5, P7)."""
    web = publish(external_local=True)
    rows = table(world, web, askers=_askers(world), kinds=HERE)
    _assert_told(rows, world)


def test_explained_is_what_happens_without_local_endpoints(world: World, publish: Publish) -> None:
    """Both policies Local and all endpoints elsewhere: dropped, or spared it (P3, P4, P5)."""
    web = publish([world.web3], internal_local=True, external_local=True)
    rows = table(world, web, askers=_askers(world), kinds=(*HERE, LOCALHOST), timeout_s=DROP_S)
    _assert_told(rows, world)


def test_explained_is_what_happens_without_endpoints(world: World, publish: Publish) -> None:
    """Refused everywhere, by whichever way (P2)."""
    web = publish([Endpoint(world.web1, ready=False)])
    rows = table(world, web, askers=_askers(world), kinds=(*HERE, LOCALHOST))
    _assert_told(rows, world)


def test_explained_is_what_happens_to_source_ranges(world: World, publish: Publish) -> None:
    """Let in or dropped, at the load balancer's address alone (P10)."""
    for ranges in (("203.0.113.0/24", "2001:db8:203::/64"), ("192.0.2.0/24", "2001:db8:1::/64")):
        web = publish(source_ranges=ranges)
        askers = [world.sandbox1, world.cluster.client]
        rows = table(world, web, askers=askers, kinds=HERE, timeout_s=DROP_S)
        _assert_told(rows, world)


def test_explained_is_what_happens_to_a_pod_that_calls_itself(
    world: World, publish: Publish
) -> None:
    """A service whose one endpoint is the caller (P9)."""
    web = publish([world.web1])
    _assert_told(table(world, web, askers=[world.web1], kinds=KINDS[:2]), world)


def test_affinity_is_told_before_it_is_met(world: World, publish: Publish, dataplane: str) -> None:
    """The endpoint a client will get is named, and the seconds it will (P13)."""
    if dataplane != "ebpf":
        pytest.skip(f"mode {dataplane} does not tell what it remembers")
    web = publish(affinity_s=600)
    asker, family = world.sandbox1, Family.V4
    target = web.at_cluster_ip(family, Protocol.TCP)
    (row,) = (
        each
        for each in table(world, web, askers=[asker], kinds=[CLUSTER_IP])
        if each.family is family and each.target.protocol is Protocol.TCP
    )
    with looking(world) as told:
        said = told.of(asker, target, family)
    addresses = {pod.name: pod.address(family) for pod in world.webs}
    assert said["chosen_by"] == "affinity"
    assert said["backend"] == f"{addresses[next(iter(row.servers))]}:{web.target_port}"
    assert "for 5" in said["steps"]["affinity"][0] or "for 600 s" in said["steps"]["affinity"][0]


def test_flow_that_is_open_is_told(world: World, publish: Publish, dataplane: str) -> None:
    """With the client's port named, the live flow decides, whatever became of its endpoint."""
    if dataplane != "ebpf":
        pytest.skip(f"the flows of mode {dataplane} are connection tracking's")
    web = publish([world.web1])
    asker, family = world.sandbox1, Family.V4
    target = web.at_cluster_ip(family, Protocol.TCP)
    with connection(asker, target) as held:
        port = int(held.ping().port) if hasattr(held.ping(), "port") else 0
        if not port:
            flows = json.loads(world.agents[0].command("show", "flows", "--json"))["flows"]
            (flow,) = (each for each in flows if each["service"] == f"tests/{web.name}:tcp")
            port = int(flow["client"].rpartition(":")[2])
        world.publish(web, [world.web3, Endpoint(world.web1, False, True, True)])
        with looking(world) as told:
            said = told.of(asker, target, family, port=port)
            fresh = told.of(asker, target, family)
        assert held.ping().server == "web1"
    assert said["chosen_by"] == "flow"
    assert said["backend"].startswith(world.web1.address(family))
    assert fresh["backend"].startswith(world.web3.address(family))
    assert said["program"]["agrees"]


def test_trial_leaves_live_flows_and_counters_alone(
    world: World, publish: Publish, dataplane: str
) -> None:
    """However many packets are tried, nothing alive sees one."""
    if dataplane != "ebpf":
        pytest.skip("nothing is tried")
    web = publish(affinity_s=600)
    agent = world.agents[0]
    before = agent.command("show", "flows", "--json")
    target = web.at_node(agent.node, Family.V4, Protocol.UDP)
    with looking(world) as told:
        said = told.of(world.cluster.client, target, Family.V4, spread=500)
    assert sum(said["spread"].values()) == 500
    flows = json.loads(agent.command("show", "flows", "--json"))["flows"]
    assert [each for each in flows if each["service"].startswith(f"tests/{web.name}:")] == []
    assert len(flows) <= len(json.loads(before)["flows"])


def test_spread_shows_an_even_choice(world: World, publish: Publish, dataplane: str) -> None:
    """Many ports, every endpoint, none far from its share."""
    if dataplane != "ebpf":
        pytest.skip("nothing is tried")
    web = publish()
    for kind in (web.at_cluster_ip, web.at_external_ip):
        with looking(world) as told:
            target = kind(Family.V6, Protocol.TCP)
            said = told.of(world.sandbox1, target, Family.V6, spread=900)
        assert len(said["spread"]) == 3
        assert all(220 < count < 390 for count in said["spread"].values())


def test_reasons_of_endpoints_that_get_nothing(world: World, publish: Publish) -> None:
    """Not ready, terminating, elsewhere: each is said."""
    web = publish(
        [
            world.web1,
            Endpoint(world.web2, ready=False, serving=False),
            Endpoint(world.web3, False, True, True),
        ],
        external_local=True,
    )
    agent = world.agents[0]
    with looking(world) as told:
        target = web.at_node(agent.node, Family.V4, Protocol.TCP)
        local = told.of(world.cluster.client, target, Family.V4)
        target = web.at_cluster_ip(Family.V4, Protocol.TCP)
        cluster = told.of(world.sandbox1, target, Family.V4)
    port = web.target_port
    addresses = [f"{pod.address(Family.V4)}:{port}" for pod in world.webs]

    def why(said: Mapping[str, Any]) -> list[tuple[bool, str]]:
        rows = {each["address"]: (each["eligible"], each["why"]) for each in said["endpoints"]}
        return [rows[address] for address in addresses]

    assert why(cluster)[0] == (True, "ready")
    assert why(cluster)[1] == (False, "not ready")
    assert why(cluster)[2][1].startswith("terminating, and others are ready")
    assert why(local)[0] == (True, "ready on this node")
    assert why(local)[2][1].startswith("on node node2, and the policy is Local")


def test_what_nobody_serves_is_left_alone(world: World, publish: Publish) -> None:
    """Unknown ports, foreign addresses, endpoints themselves: why, and what is near (P15, P16)."""
    web = publish()
    family, protocol = Family.V4, Protocol.TCP
    foreign, unallocated = "172.18.77.7", "10.96.250.250"
    endpoint = world.web1.address(family)
    cases = {
        Target(web.cluster.v4, 81, protocol, timeout_s=DROP_S): "has no such port",
        Target(foreign, web.node_port, protocol, timeout_s=DROP_S): "no address of this node",
        Target(unallocated, 80, protocol, timeout_s=DROP_S): "in the range of cluster IPs",
        Target(endpoint, web.target_port, protocol): "is an endpoint of",
        Target(world.cluster.nodes[0].address(family), 12, protocol): "no Service has node port 12",
    }
    with looking(world) as told:
        for target, words in cases.items():
            said = told.of(world.cluster.client, target, family)
            answers = ask_all([Probe(world.cluster.client, target, 1)])[0]
            assert (answers[0].outcome is Outcome.REFUSED) == (
                said["verdict"] == "refused" or target.port == 12
            )
            assert words in " ".join(said["steps"]["frontend"])


def test_command_speaks_in_lines_and_json(world: World, publish: Publish, dataplane: str) -> None:
    """By name, without colour into a pipe; a question that makes no sense is said to be one."""
    web = publish([world.web1])
    agent: Agent = world.agents[0]
    text = agent.command("explain", "outside", "svc", f"tests/{web.name}:tcp")
    assert "\x1b" not in text
    assert f"{web.cluster.v4}:80/TCP is the cluster IP of tests/{web.name}:tcp." in text
    said = json.loads(agent.command("explain", "node", _at(web), "--json"))
    assert (said["verdict"], said["mode"]) == ("forwarded", dataplane)
    assert said["backend"] == f"{world.web1.address(Family.V4)}:{web.target_port}"
    for words in (("nobody", _at(web)), ("outside", "10.96.0.1"), ("outside", "svc", "a/b")):
        with pytest.raises(CommandError, match="expected"):
            agent.command("explain", *words)


def test_explains_when_no_agent_runs(world: World, publish: Publish, dataplane: str) -> None:
    """What a killed agent left goes on (Z2), and so does the explanation."""
    web = publish([world.web1])
    agent = world.agents[0]
    agent.kill()
    said = json.loads(agent.command("explain", "outside", _at(web), "--json", "--kernel-only"))
    if dataplane == "userspace":
        pytest.skip("mode userspace ends with its agent")
    assert said["backend"] == f"{world.web1.address(Family.V4)}:{web.target_port}"
    assert said["endpoints"][0]["why"] == "in the Cluster list"


def _split(end: str) -> Address:
    address, _, port = end.rpartition(":")
    return address.strip("[]"), int(port)


def _at(web: Web) -> str:
    return f"{web.cluster.v4}:80"
