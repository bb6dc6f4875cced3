"""The cluster of the tour: pods where the manifests say, an agent on every node."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ebpf_svc.demo.report import Asker
from ebpf_svc.errors import ConfigError
from ebpf_svc.model.desired import FrontendKey, FrontendKind
from ebpf_svc.model.net import Family, Protocol, family_of
from ebpf_svc.status import NamedFrontend, read_names
from ebpf_svc.testbed.addressing import Addresses
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Pod
from ebpf_svc.testbed.traces import traces
from ebpf_svc.testbed.traffic import Target, serve

REQUEST_TIMEOUT_S = 2.0
SHELL = "shell-1"
"""The pod that asks."""


def examples_dir() -> Path:
    """The manifests of the repository; raises ConfigError where it was installed without."""
    path = Path(__file__).resolve().parents[2] / "examples"
    if not path.is_dir():
        raise ConfigError("examples", got=str(path), expected="a clone of the repository")
    return path


class Stage:
    """Cluster, pods, agents and a copy of the examples that may be changed."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.manifests = cluster.folder / "manifests"
        shutil.copytree(examples_dir(), self.manifests)
        for pod in self._read_pods():
            self.add_pod(pod)
        # Cluster IPs are for inside; the outside asks them too, as a router that knows them could.
        cluster.route_services(cluster.nodes[0])
        self.agents = tuple(
            Agent(node, cluster.settings(node, self.manifests)) for node in cluster.nodes
        )
        self._names: Mapping[FrontendKey, NamedFrontend] = {}
        self._untouched = [traces(node) for node in cluster.nodes]

    @property
    def askers(self) -> dict[Asker, Host]:
        node1 = self.cluster.nodes[0]
        return {
            Asker.POD: node1.pods[SHELL],
            Asker.HOST: node1,
            Asker.OUTSIDE: self.cluster.client,
        }

    def start_agents(self) -> None:
        """Start an agent on every node and wait until each has told its kernel everything."""
        for agent in self.agents:
            agent.start(wait=False)
        for agent in self.agents:
            agent.wait_ready()
        self._names = read_names(self.agents[0].settings.run_dir)

    def targets(self, service: str, kind: FrontendKind, on: str = "") -> Iterator[Target]:
        """The frontends of a service's ports named http and http3: TCP and UDP, each family.

        Args:
            on: for node ports, the address meant: a node's name or `localhost`.
        """
        wanted = {self._address(on, family) for family in Family} if on else None
        for key, name in sorted(self._names.items()):
            if (name.name, name.kind) != (service, kind) or name.port not in ("http", "http3"):
                continue
            if wanted is None or key.address in wanted:
                yield Target(key.address, key.port, key.protocol, timeout_s=REQUEST_TIMEOUT_S)

    def _address(self, on: str, family: Family) -> str:
        if on == "localhost":
            return "127.0.0.1" if family is Family.V4 else "::1"
        return self.cluster.node(on).address(family)

    def node_port_targets(self, service: str, node: str) -> Iterator[Target]:
        """Node ports at a node that is not this agent's: the numbers are the same everywhere."""
        for target in self.targets(service, FrontendKind.NODE_PORT, self.cluster.nodes[0].name):
            address = self._address(node, family_of(target.address))
            yield Target(address, target.port, target.protocol, timeout_s=REQUEST_TIMEOUT_S)

    def add_pod(self, manifest: Mapping[str, Any]) -> Pod:
        """Run a pod as its manifest says, serving every port of its containers."""
        node = self.cluster.node(manifest["spec"]["nodeName"])
        addresses = Addresses(*(entry["ip"] for entry in manifest["status"]["podIPs"]))
        pod = node.add_pod(manifest["metadata"]["name"], addresses)
        ports = [
            (port.get("protocol", "TCP"), port["containerPort"])
            for container in manifest["spec"]["containers"]
            for port in container.get("ports", ())
        ]
        serve(
            pod,
            tcp=[number for protocol, number in ports if protocol == Protocol.TCP],
            udp=[number for protocol, number in ports if protocol == Protocol.UDP],
        )
        return pod

    def pod_manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a pod of the examples, to be changed and added as another; KeyError."""
        for pod in self._read_pods():
            if pod["metadata"]["name"] == name:
                return pod
        raise KeyError(name)

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Put one more manifest into the folder, as a file of its own."""
        path = self.manifests / f"{manifest['metadata']['name']}.yaml"
        scratch = self.cluster.folder / path.name
        scratch.write_text(yaml.safe_dump(manifest))
        scratch.replace(path)

    def withdraw(self, name: str) -> None:
        """Take such a file away again."""
        (self.manifests / f"{name}.yaml").unlink()

    def leftovers(self) -> tuple[str, ...]:
        """What the nodes' kernels hold that they did not hold before the agents came."""
        return tuple(
            f"{node.name} {kind} {one}"
            for node, before in zip(self.cluster.nodes, self._untouched, strict=True)
            for kind, found in traces(node).items()
            for one in found
            if one not in before[kind]
        )

    def _read_pods(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.manifests.glob("*.yaml")):
            for document in yaml.safe_load_all(path.read_text()):
                if document and document["kind"] == "Pod":
                    yield document
