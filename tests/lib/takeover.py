"""A node that changes hands between kube-proxy and us, and the connections that must not notice."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from ebpf_svc.model.net import Family
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node, Pod
from ebpf_svc.testbed.traffic import Connection, ask, connection, serve
from tests.lib import kubeproxy
from tests.lib.manifests import PROTOCOLS, Web, node_manifests
from tests.lib.world import write_manifests

WEB = Web(1)


@dataclass
class Site:
    """A node with kube-proxy's rules for WEB and an agent that has not started."""

    cluster: Cluster
    agent: Agent
    pods: tuple[Pod, ...]
    shell: Pod
    """Out of reach of socket hooks: all its packets are translated on their way."""

    @property
    def node(self) -> Node:
        return self.agent.node

    def kube_proxy(self, mode: str) -> None:
        kubeproxy.write(self.node, mode, WEB, self.pods)

    def migrate(self, *words: str) -> str:
        return self.agent.command("migrate", "--yes", *words)


def site_of(cluster: Cluster, mode: str) -> Site:
    """The only node of a cluster, with WEB's pods and its manifests; nothing serves it yet."""
    (node,) = cluster.nodes
    pods = (node.add_pod("web1"), node.add_pod("web2"))
    shell = node.add_sandbox_pod("shell1")
    for pod in pods:
        serve(pod, tcp=[WEB.target_port], udp=[WEB.target_port])
    manifests = cluster.folder / "manifests"
    manifests.mkdir()
    write_manifests(manifests / "all.yaml", [*node_manifests([node]), *WEB.manifests(pods)])
    return Site(cluster, Agent(node, cluster.settings(node, manifests), mode=mode), pods, shell)


class Lasting:
    """Connections of every kind that are open and have each found a server."""

    def __init__(self, site: Site, stack: ExitStack) -> None:
        self._open: list[tuple[str, Connection]] = []
        self._servers: dict[str, str] = {}
        for family in Family:
            for protocol in PROTOCOLS:
                targets = {
                    "pod": (site.shell, WEB.at_cluster_ip(family, protocol)),
                    "node": (site.node, WEB.at_cluster_ip(family, protocol)),
                    "outside": (site.cluster.client, WEB.at_node(site.node, family, protocol)),
                }
                for name, (host, target) in targets.items():
                    conn = stack.enter_context(connection(host, target))
                    self._open.append((f"{name} {protocol.value} {family.label}", conn))
        self.check()

    def check(self) -> None:
        """Each answers; TCP from the server it had."""
        failed = {}
        for name, conn in self._open:
            answer = conn.ping()
            server = self._servers.setdefault(name, answer.server)
            if not answer.ok or ("TCP" in name and answer.server != server):
                failed[name] = (answer.outcome, answer.detail, answer.server, server)
        assert failed == {}


def asked(host: Host, site: Site) -> set[str]:
    """Who answers new connections of a host to every frontend used here; failures by outcome."""
    found = set()
    for family in Family:
        for protocol in PROTOCOLS:
            for target in (
                WEB.at_cluster_ip(family, protocol),
                WEB.at_node(site.node, family, protocol),
            ):
                for answer in ask(host, target.address, target.port, protocol, count=4):
                    found.add(answer.server or f"{answer.outcome} {target}")
    return found
