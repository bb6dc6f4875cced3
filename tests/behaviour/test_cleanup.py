"""`ebpf-svc cleanup` leaves no trace, whether the agent ended well or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.traces import traces
from ebpf_svc.testbed.traffic import ask, serve
from tests.lib.manifests import Web, node_manifests
from tests.lib.world import write_manifests


@pytest.fixture
def agent(dataplane: str, artifact_cache: Path, no_leftovers: None) -> Iterator[Agent]:
    """An agent alone in a cluster of one node, with one service that works."""
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        (node,) = cluster.nodes
        pod = node.add_pod("web1")
        serve(pod, tcp=[Web(1).target_port])
        manifests = cluster.folder / "manifests"
        manifests.mkdir()
        agent = Agent(node, cluster.settings(node, manifests), mode=dataplane)
        write_manifests(manifests / "all.yaml", [*node_manifests([node]), *Web(1).manifests([pod])])
        yield agent
        agent.stop()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_cleanup_leaves_nothing(agent: Agent, dataplane: str, end: str) -> None:
    """After `cleanup` the kernel is as before, also when the agent crashed (Z4)."""
    before = traces(agent.node)
    agent.start()
    assert ask(agent.node, Web(1).cluster.v4, 80)[0].server == "web1"
    getattr(agent, end)()
    assert traces(agent.node) != before
    # Where the agent itself relays, clients are refused from now on.
    left = "" if dataplane == "userspace" else "web1"
    assert ask(agent.node, Web(1).cluster.v4, 80)[0].server == left
    agent.cleanup()
    assert traces(agent.node) == before


def test_cleanup_twice_is_fine(agent: Agent) -> None:
    """Nothing to remove is no error."""
    agent.cleanup()
    agent.cleanup()
