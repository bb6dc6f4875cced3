"""Someone else changes the kernel: what is ours comes back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ebpf_svc.host import bpf
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.traces import filters
from ebpf_svc.testbed.traffic import Answer, ask
from tests.behaviour.conftest import Publish
from tests.lib.manifests import Web
from tests.lib.waiting import eventually
from tests.lib.world import World

AT_ONCE_S = 2.0


def _ask_cluster_ip(world: World, web: Web) -> Answer:
    """Ask from the sandboxed pod: the packet path, which has more to lose."""
    return ask(world.sandbox1, web.cluster.v4, 80, timeout_s=0.2)[0]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("side", ["ingress", "egress"])
def test_deleted_filter_comes_back_at_once(world: World, publish: Publish, side: str) -> None:
    """A CNI or an admin deletes a filter: netlink tells, and it is there again."""
    web = publish()
    node, device = world.cluster.nodes[0], world.sandbox1.device
    before = filters(node, device)
    assert before
    node.run(["tc", "filter", "del", "dev", device, side])
    eventually(lambda: filters(node, device), until=before.__eq__, within_s=AT_ONCE_S)
    assert _ask_cluster_ip(world, web).ok


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("where", ["pod", "nic"])
def test_deleted_clsact_comes_back_at_once(world: World, publish: Publish, where: str) -> None:
    """Deleting the whole qdisc takes every filter along; all return."""
    web = publish()
    node = world.cluster.nodes[0]
    device = world.sandbox1.device if where == "pod" else "eth0"
    before = filters(node, device)
    assert before
    node.run(["tc", "qdisc", "del", "dev", device, "clsact"])
    eventually(lambda: filters(node, device), until=before.__eq__, within_s=AT_ONCE_S)
    assert _ask_cluster_ip(world, web).ok
    target = web.at_node(node, Family.V4, Protocol.TCP)
    assert ask(world.cluster.client, target.address, target.port)[0].ok


def _read_back(agent: Agent) -> None:
    """Have the agent compare the kernel with its plan now, not when the period is over."""
    agent.send_signal(signal.SIGHUP)


@pytest.mark.usefixtures("programs")
def test_deleted_map_entries_come_back(world: World, publish: Publish) -> None:
    """Whoever empties a map: the next read-back fills it again."""
    web = publish()
    node, agent = world.cluster.nodes[0], world.agents[0]
    _empty(next(node.folders.bpffs.rglob("frontends4")))
    assert not _ask_cluster_ip(world, web).ok
    _read_back(agent)
    eventually(lambda: _ask_cluster_ip(world, web).ok, within_s=AT_ONCE_S)


@pytest.mark.usefixtures("programs")
def test_deleted_rules_come_back(world: World, publish: Publish) -> None:
    """Flushing the firewall takes the masquerade rule along; it returns."""
    web = publish([world.web3])
    node, agent = world.cluster.nodes[0], world.agents[0]
    ours = [line for line in node.run(["nft", "list", "tables"]).splitlines() if "ebpf-svc" in line]
    assert ours
    for line in ours:
        node.run(["nft", "delete", *line.split()])
    _read_back(agent)
    eventually(lambda: "ebpf-svc" in node.run(["nft", "list", "tables"]), within_s=AT_ONCE_S)
    target = web.at_node(node, Family.V4, Protocol.TCP)
    assert ask(world.cluster.client, target.address, target.port)[0].ok


def test_new_pod_is_served_before_its_first_packet_matters(world: World, publish: Publish) -> None:
    """A pod that appears uses services at once: its first connection needs no second try."""
    web = publish()
    node = world.cluster.nodes[0]
    pod = node.add_sandbox_pod("newcomer")
    try:
        (answer,) = ask(pod, web.cluster.v4, 80)
        assert answer.ok
        # A lost SYN would be sent again after a second.
        assert answer.latency_ms < 500
    finally:
        node.remove_pod(pod)


def _empty(pin: Path) -> None:
    fd = bpf.get_pinned(pin)
    try:
        size = bpf.map_facts(fd).key_size
        while key := bpf.next_key(fd, None, size):
            bpf.delete(fd, key)
    finally:
        os.close(fd)
