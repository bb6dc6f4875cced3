"""`ebpf-svc explain` on a node: it says beforehand what real connections then meet (§ 1.6)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from ebpf_svc.cli.explain import record
from ebpf_svc.errors import CommandError
from ebpf_svc.explain import client as clients
from ebpf_svc.explain import scene as scenes
from ebpf_svc.explain.explain import explain
from ebpf_svc.explain.scene import Scene
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.traffic import Outcome, Probe, Target, ask_all, connection
from tests.behaviour.conftest import Publish
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
    table,
)
from tests.lib.world import World

HERE = (CLUSTER_IP, NODE_PORT_1, EXTERNAL_IP, BALANCER)
"""Frontends that node1 translates for whoever sends packets there."""
DROP_S = 0.4
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
        word = "node" if isinstance(asker, Node) else asker.address(family)
        client = clients.resolve(
            word, family, self.scene.settings, known=self.scene.known, around=self.scene.around
        )
        frontend = FrontendKey(target.address, target.port, target.protocol)
        by_packet = asker is self.world.sandbox1
        return record(explain(self.scene, client, frontend, by_packet=by_packet, **how))


@contextmanager
def _looking(world: World) -> Iterator[Told]:
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
    with _looking(world) as told:
        for row in rows:
            said = told.of(row.asker, row.target, row.family)
            if fault := _wrong(row, said, world, own):
                wrong.append(f"{row!r}\n    {fault}")
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(rows)}:\n" + "\n".join(wrong), pytrace=False)


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
    with _looking(world) as told:
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
        with _looking(world) as told:
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
    with _looking(world) as told:
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
        with _looking(world) as told:
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
    with _looking(world) as told:
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
    with _looking(world) as told:
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
    said = json.loads(agent.command("explain", "localhost", _at(web), "--json"))
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


def _at(web: Web) -> str:
    return f"{web.cluster.v4}:80"
