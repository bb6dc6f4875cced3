"""An agent that follows an API server: from an object put there to packets, and without it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import DetectLocal, DetectLocalMode, KubernetesSettings
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.addressing import pod_cidrs
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Node
from ebpf_svc.testbed.traffic import Outcome, connection, load, serve
from tests.lib import netfilter
from tests.lib.manifests import Web, node_manifests
from tests.lib.probing import asked_from_outside
from tests.lib.waiting import eventually, wait_out

SOON_S = 1.0
"""From a change at the API server to packets."""
GONE = (Outcome.REFUSED, Outcome.TIMEOUT, Outcome.UNREACHABLE)


class Site:
    """A node with two pods, and an API server on the node's loopback."""

    def __init__(self, cluster: Cluster, mode: str) -> None:
        (self.node,) = cluster.nodes
        self.cluster, self.mode = cluster, mode
        self.web1, self.web2 = self.node.add_pod("web1"), self.node.add_pod("web2")
        netfilter.suit(self.node, mode)
        self.server = MockApiServer(make_socket=partial(_socket_of, self.node)).start()
        (self.node_object,) = node_manifests([self.node])
        self.node_object["spec"] = {"podCIDRs": list(pod_cidrs(self.node.number))}

    def agent(self, **settings: Any) -> Agent:
        """An agent, not yet started, that knows the server's address and nothing else."""
        told = {
            "manifests": None,
            "kubernetes": KubernetesSettings(master=self.server.url, node_wait_s=5),
            **settings,
        }
        base = self.cluster.settings(self.node, self.cluster.folder)
        return Agent(self.node, base.model_copy(update=told), mode=self.mode)

    def put(self, web: Web, *pods: Any) -> None:
        """Create a service and its slices, or change them."""
        for pod in pods:
            serve(pod, tcp=[web.target_port])
        for item in web.manifests(pods):
            self.server.put(item["kind"], item)

    def delete(self, web: Web) -> None:
        for item in web.manifests([]):
            self.server.delete(item["kind"], "tests", item["metadata"]["name"])

    def servers(self, web: Web) -> set[str]:
        """Who answers a client outside, over both families; what failed is named by how."""
        return asked_from_outside(self.cluster.client, self.node, web)

    def reaches(self, web: Web, *names: str, within_s: float = SOON_S) -> None:
        """Wait until these, all of these and nothing else, answer."""
        eventually(
            lambda: self.servers(web), until=lambda now: now == set(names), within_s=within_s
        )

    def lines(self, agent: Agent, event: str) -> list[dict[str, Any]]:
        lines = map(json.loads, agent.log_path.read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def events(self) -> set[tuple[str, str]]:
        """Object and reason of every Event the server was given."""
        return {(each["regarding"]["name"], each["reason"]) for each in self.server.created}


def _socket_of(node: Node) -> socket.socket:
    with node.namespace.entered():
        return socket.socket()


@pytest.fixture
def site(dataplane: str, artifact_cache: Path, no_leftovers: None) -> Iterator[Site]:
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        site = Site(cluster, dataplane)
        site.server.put("Node", site.node_object)
        try:
            yield site
        finally:
            site.server.close()


@pytest.fixture
def agent(site: Site) -> Iterator[Agent]:
    with site.agent() as agent:
        yield agent


def test_service_of_the_api_server_is_reachable_within_a_second(site: Site, agent: Agent) -> None:
    """Created, changed and deleted: packets follow; the operator sees the start on the Node."""
    web = Web(1)
    site.put(web, site.web1)
    site.reaches(web, "web1")
    site.put(web, site.web2)
    site.reaches(web, "web2")
    site.delete(web)
    eventually(lambda: site.servers(web), until=lambda now: now <= set(GONE), within_s=SOON_S)
    eventually(lambda: ("node1", "Starting") in site.events())


def test_traffic_goes_on_without_the_api_server(site: Site, agent: Agent) -> None:
    """While it is away nothing changes; what changed meanwhile arrives a second after its return.

    Connections live through all of it.
    """
    web, other = Web(1), Web(2)
    site.put(web, site.web1)
    site.reaches(web, "web1")
    target = web.at_cluster_ip(Family.V4, Protocol.TCP)
    with connection(site.web2, target) as held, load(site.web2, [target], workers=2) as running:
        site.server.stop()
        eventually(lambda: site.lines(agent, "watch.lost"))
        site.put(web, site.web2)
        site.put(other, site.web2)
        wait_out(1.5)
        assert site.servers(web) == {"web1"}
        site.server.start()
        site.reaches(web, "web2")
        site.reaches(other, "web2")
        assert held.ping().server == "web1"
        eventually(lambda: "web2" in running.read().servers)
        served = running.stop()
    assert (served.failed, set(served.servers)) == (0, {"web1", "web2"})


def test_agent_that_starts_without_the_api_server_keeps_what_the_kernel_holds(
    site: Site, agent: Agent
) -> None:
    """Nothing is written before all is known (M4): a restart in an outage harms nobody."""
    web = Web(1)
    site.put(web, site.web1)
    site.reaches(web, "web1")
    site.server.stop()
    pid = agent.status()["pid"]
    agent.kill()
    agent.start(wait=False)
    eventually(lambda: agent.status()["pid"] != pid)
    wait_out(0.5)
    assert site.servers(web) == {"web1"}
    assert not agent.status()["ready"]
    site.server.start()
    eventually(lambda: agent.status()["ready"], within_s=SOON_S)
    assert site.servers(web) == {"web1"}


def test_invalid_service_is_told_on_it_and_harms_no_other(site: Site, agent: Agent) -> None:
    """The operator finds an Event with `kubectl describe`."""
    broken, web = Web(1), Web(2)
    (item, *_) = broken.manifests([])
    item["spec"]["externalIPs"] = ["10.0.0.300"]
    site.server.put("Service", item)
    site.put(web, site.web1)
    site.reaches(web, "web1")
    eventually(lambda: (broken.name, "InvalidService") in site.events())
    (event,) = (each for each in site.server.created if each["reason"] == "InvalidService")
    assert event["metadata"]["namespace"] == "tests"
    assert "10.0.0.300" in event["note"]


def test_pod_prefixes_of_the_node_are_awaited_and_end_the_agent_when_others(site: Site) -> None:
    """Mode NodeCIDR: the programs are made for the Node's prefixes (N3, N4)."""
    web = Web(1)
    site.server.put("Node", {**site.node_object, "spec": {}})
    site.put(web, site.web1)
    agent = site.agent(cluster_cidrs=(), detect_local=DetectLocal(mode=DetectLocalMode.NODE_CIDR))
    try:
        agent.start(wait=False)
        eventually(lambda: site.lines(agent, "watch.listed"), within_s=10)
        wait_out(0.5)
        assert agent.running
        assert site.lines(agent, "sync.applied") == []
        site.server.put("Node", site.node_object)
        agent.wait_ready()
        site.reaches(web, "web1")
        changed = {**site.node_object, "spec": {"podCIDRs": ["10.9.0.0/24"]}}
        site.server.put("Node", changed)
        eventually(lambda: not agent.running, within_s=SOON_S + 4)
        assert "10.9.0.0/24" in agent.log_tail()
        assert site.servers(web) == {"web1"}
    finally:
        agent.stop()
        agent.cleanup()
