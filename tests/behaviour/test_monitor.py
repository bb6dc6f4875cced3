"""`ebpf-svc monitor` beside a running agent: what clients do is told, with names and reasons."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ebpf_svc.dataplane.ebpf.options import hooks_see_pods
from ebpf_svc.errors import CommandError
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.namespace import python_argv
from ebpf_svc.testbed.traffic import Probe, Target, ask_all
from tests.behaviour.conftest import Publish
from tests.lib.manifests import PROTOCOLS, Web
from tests.lib.world import World

TELLING = ("ebpf",)
"""Modes that tell of sockets and drops too."""
SILENT = ("userspace",)
"""Modes without a word: `monitor` says what to use instead."""
BY_CONNTRACK = ("nftables", "ipvs", "iptables")


class Monitor:
    """The command as a process of a node."""

    def __init__(self, agent: Agent, *words: str) -> None:
        argv = [*python_argv("ebpf_svc.cli"), "monitor", "--json", *words]
        self._process = agent.node.popen(
            [*argv, "--config", str(agent.config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        assert "Listening" in self._process.stderr.readline()

    def end(self, number: signal.Signals = signal.SIGINT) -> list[dict[str, Any]]:
        """End it; what it told."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        out, _ = self._process.communicate(timeout=10)
        return [json.loads(line) for line in out.splitlines()]

    def wait(self) -> list[dict[str, Any]]:
        """Wait for it to end by itself; what it told."""
        out, _ = self._process.communicate(timeout=15)
        return [json.loads(line) for line in out.splitlines()]


@contextmanager
def _monitored(agent: Agent, *words: str) -> Iterator[list[dict[str, Any]]]:
    """What happens while the block runs is in the list after it."""
    monitor = Monitor(agent, *words)
    told: list[dict[str, Any]] = []
    try:
        yield told
    finally:
        told += monitor.end()


def _ask(asker: Host, *targets: Target) -> None:
    ask_all([Probe(asker, target, 1) for target in targets])


def _name(web: Web, protocol: Protocol) -> str:
    return f"tests/{web.name}:{protocol.value.lower()}"


@pytest.fixture
def agent(world: World, dataplane: str) -> Agent:
    if dataplane in SILENT:
        pytest.skip(f"mode {dataplane} tells nothing; test_mode_without_events_says_so judges it")
    return world.agents[0]


def test_client_outside_is_told_with_service_frontend_and_endpoint(
    world: World, publish: Publish, agent: Agent
) -> None:
    """TCP and UDP, both families: a line a flow, and one for the end of a connection."""
    web = publish([world.web1])
    client, node1 = world.cluster.client, world.cluster.nodes[0]
    targets = [web.at_node(node1, family, protocol) for family in Family for protocol in PROTOCOLS]
    with _monitored(agent, "--service", f"tests/{web.name}") as told:
        _ask(client, *targets)
    opened = [each for each in told if each["event"] == "opened"]
    assert sorted((each["service"], each["backend"]) for each in opened) == sorted(
        (_name(web, protocol), _at(world.web1.address(family), web.target_port))
        for family in Family
        for protocol in PROTOCOLS
    )
    addresses = {client.address(family) for family in Family}
    assert {each["client_addresses"][0] for each in opened} == addresses
    assert all(each["masquerade"] for each in opened)  # P6
    frontends = {_at(node1.address(family), web.node_port) for family in Family}
    assert {each["frontend"].rpartition("/")[0] for each in opened} == frontends


def test_end_of_a_connection_is_told(
    world: World, publish: Publish, agent: Agent, dataplane: str
) -> None:
    """Both sides close: the flow is closed, by whom is said."""
    if dataplane not in TELLING:
        pytest.skip("connection tracking tells of the end two minutes later")
    web = publish([world.web1])
    node1 = world.cluster.nodes[0]
    with _monitored(agent, "--service", f"tests/{web.name}") as told:
        _ask(world.cluster.client, web.at_node(node1, Family.V4, Protocol.TCP))
    assert told[0]["event"] == "opened"
    assert told[-1]["event"] == "closed"
    assert {each["client"] for each in told} == {told[0]["client"]}


def test_processes_are_told_where_they_connect(
    world: World, publish: Publish, agent: Agent, dataplane: str
) -> None:
    """The socket hooks have no packet: a pod is named by its address, the node as such."""
    if dataplane not in TELLING:
        pytest.skip("netfilter sees packets only")
    web = publish([world.web1])
    target = web.at_cluster_ip(Family.V4, Protocol.TCP)
    node1 = world.cluster.nodes[0]
    with _monitored(agent, "--service", f"tests/{web.name}") as told:
        _ask(world.shell1, target)
        _ask(node1, target)
    opened = [each for each in told if each["event"] == "opened"]
    at_socket = hooks_see_pods(agent.settings.ebpf)
    assert [(each["at"], each["client"].partition(":")[0]) for each in opened] == [
        ("socket" if at_socket else "packet", world.shell1.address(Family.V4)),
        ("socket", "node"),
    ]
    with _monitored(agent, "--client", world.shell1.address(Family.V4)) as told:
        _ask(world.shell1, target)
        _ask(node1, target)
    clients = {each["client"].partition(":")[0] for each in told}
    assert clients == {world.shell1.address(Family.V4)}


def test_refusals_and_drops_are_told_with_reasons(
    world: World, publish: Publish, agent: Agent, dataplane: str
) -> None:
    """P2, P4, P10: to whom, why; nothing else with --drops."""
    if dataplane not in TELLING:
        pytest.skip("what netfilter refuses or drops has no entry in connection tracking")
    empty = publish([])
    remote = publish([world.web3], external_local=True)
    closed = publish([world.web1], source_ranges=("192.0.2.0/24",))
    node1, client = world.cluster.nodes[0], world.cluster.client
    family, protocol = Family.V4, Protocol.TCP
    with _monitored(agent, "--drops") as told:
        _ask(client, empty.at_node(node1, family, protocol))
        _ask(node1, empty.at_cluster_ip(family, protocol))
        _ask(client, remote.at_node(node1, family, protocol, timeout_s=0.3))
        _ask(client, closed.at_balancer(family, protocol, timeout_s=0.3))
        _ask(client, remote.at_node(world.cluster.nodes[1], family, protocol))
    reasons = {(each["event"], each["service"], each["reason"]) for each in told}
    assert reasons == {
        ("refused", _name(empty, protocol), "no_endpoint"),
        ("dropped", _name(remote, protocol), "no_local_endpoint"),
        ("dropped", _name(closed, protocol), "source_range"),
    }
    assert {each["at"] for each in told if each["event"] == "refused"} == {"packet", "socket"}
    assert all(each["why"] and each["backend"] is None for each in told)


def test_monitor_ends_by_count_and_by_time(world: World, publish: Publish, agent: Agent) -> None:
    """--count and --for, for scripts."""
    web = publish([world.web1])
    node1 = world.cluster.nodes[0]
    target = web.at_node(node1, Family.V4, Protocol.UDP)
    monitor = Monitor(agent, "--count", "2", "--service", f"tests/{web.name}")
    _ask(world.cluster.client, target, target, target)
    assert len(monitor.wait()) == 2
    assert Monitor(agent, "--for", "200ms", "--service", "tests/nobody").wait() == []


def test_killed_monitor_leaves_nothing_and_another_takes_its_place(
    world: World, publish: Publish, agent: Agent
) -> None:
    """After kill -9 the next one listens at once and hears nothing of before."""
    web = publish([world.web1])
    target = web.at_node(world.cluster.nodes[0], Family.V4, Protocol.UDP)
    monitor = Monitor(agent)
    monitor.end(signal.SIGKILL)
    _ask(world.cluster.client, target)
    with _monitored(agent, "--service", f"tests/{web.name}") as told:
        _ask(world.cluster.client, target)
    assert len(told) == 1


def test_second_monitor_is_told_of_the_first(world: World, agent: Agent, dataplane: str) -> None:
    """There is one ring: the second says so instead of taking half of the events."""
    if dataplane not in TELLING:
        pytest.skip("connection tracking tells everybody")
    with _monitored(agent), pytest.raises(CommandError, match="monitors already"):
        agent.command("monitor", "--for", "1s")


def test_monitor_works_without_an_agent(world: World, publish: Publish, agent: Agent) -> None:
    """Programs go on telling when the agent is killed (Z2), names included."""
    web = publish([world.web1])
    target = web.at_node(world.cluster.nodes[0], Family.V4, Protocol.UDP)
    agent.kill()
    with _monitored(agent, "--service", _name(web, Protocol.UDP)) as told:
        _ask(world.cluster.client, target)
    assert len(told) == 1


def test_lines_for_people_say_the_same(world: World, publish: Publish, agent: Agent) -> None:
    """Columns, no JSON, no colour into a pipe."""
    web = publish([world.web1])
    target = web.at_node(world.cluster.nodes[0], Family.V4, Protocol.UDP)
    argv = [*python_argv("ebpf_svc.cli"), "monitor", "--service", f"tests/{web.name}"]
    process = agent.node.popen(
        [*argv, "--count", "1", "--config", str(agent.config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert "Listening" in process.stderr.readline()
    _ask(world.cluster.client, target)
    out, _ = process.communicate(timeout=10)
    (line,) = out.splitlines()
    assert "\x1b" not in line
    for word in ("opened", _name(web, Protocol.UDP), f"-> {world.web1.address(Family.V4)}:"):
        assert word in line


def test_mode_without_events_says_so(world: World, dataplane: str) -> None:
    """And names what to use instead."""
    if dataplane not in SILENT:
        pytest.skip("this mode tells")
    with pytest.raises(CommandError, match="tells nothing"):
        world.agents[0].command("monitor", "--for", "1s")


def _at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
