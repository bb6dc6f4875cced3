"""One variant's cluster, with backends that answer and services that lead to them.

    client ── router ──┬── node1 ── shell, sandbox (ask), web (answers on 10.244.128.0/20)
                       └── node2 ── web-far (answers on 10.244.144.0/20)

One pod answers for a thousand backends: it takes every address of a range for its own. The nodes
route pods by links, as Calico does, so that a direct request is forwarded like any other. A request
from outside enters at node1 in every variant, and answers of node2 leave through it: what is
compared is how packets are translated, not how many hops they take.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ebpf_svc.bench.generator import Server, cpu_ns_of
from ebpf_svc.bench.population import Population
from ebpf_svc.bench.serving import KubeProxy, OurAgent, Serving
from ebpf_svc.config import Settings
from ebpf_svc.testbed import drivers
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node, Pod
from ebpf_svc.testbed.podnet import PodNetwork

ECHO, SINK = 8080, 8081
"""Ports backends answer on, TCP and UDP."""
SERVICE_ECHO, SERVICE_SINK = 80, 81
NODE_PORT_NEAR, NODE_PORT_FAR = 30080, 30081
NEAR, FAR = "10.244.128.0/20", "10.244.144.0/20"
BACKENDS = (1, 10, 1_000)
_VIPS = {1: "10.111.255.1", 10: "10.111.255.10", 1_000: "10.111.255.100"}
_NEAR_VIP, _FAR_VIP = "10.111.255.201", "10.111.255.202"
_NAMESPACE = "zz-bench"
"""Sorts after every other service: the longest way through lists of rules."""
_OWN_PORTS = (len(_VIPS) + 2) * 4
"""Service ports of ours: two numbers, two protocols each."""
_SLICE_ENDPOINTS = 100
_TRACKING = """
table ip bench {
    chain postrouting { type nat hook postrouting priority srcnat; meta mark 0xfeed masquerade; }
}
"""
"""A rule nothing matches: that there is one makes the kernel track every connection."""
_SERVICE_CIDRS = ("10.96.0.0/12", "fd00:10:96::/112")


class Site:
    """A cluster with its agent, if any; `close` removes both."""

    def __init__(
        self,
        mode: str | None,
        *,
        binary: Path,
        cache_dir: Path,
        cpu: int,
        update: Mapping[str, Any] | None = None,
        tracked: bool = False,
        xdp_wires: bool = False,
        kube_proxy: Path | None = None,
    ) -> None:
        """Build it; nothing is served before `grow`.

        Args:
            mode: of the agent; None = no agent.
            xdp_wires: make the wires fit for programs in drivers.
            kube_proxy: the binary that serves in that mode instead of our agent.
            update: settings that differ, by section or name.
            tracked: the nodes track connections whether a mode needs it or not.
        """
        self._undo = ExitStack()
        self._serving: Serving | None = None
        try:
            self.cluster = self._undo.enter_context(
                Cluster.create(
                    pod_network=PodNetwork.ROUTED, cni_masquerade=False, cache_dir=cache_dir
                )
            )
            near, far = self.cluster.nodes
            self.shell, self.sandbox = near.add_pod("shell"), near.add_sandbox_pod("sandbox")
            self._webs = (near.add_pod("web"), far.add_pod("web-far"))
            self._wire(near, far)
            if tracked:
                for node in (near, far):
                    node.run(["nft", "-f", "-"], stdin=_TRACKING)
            if xdp_wires:
                hosts = (self.cluster.client, near, far, self.shell, self.sandbox, *self._webs)
                drivers.prepare(self.cluster.router, hosts)
            self.servers = tuple(self._serve(pod, binary, cpu) for pod in self._webs)
            if mode is not None:
                if kube_proxy is not None:
                    self._serving = KubeProxy(near, kube_proxy, mode, _own_objects())
                else:
                    manifests = self.cluster.folder / "manifests"
                    manifests.mkdir()
                    settings = _updated(self.cluster.settings(near, manifests), update or {})
                    self._serving = OurAgent(near, settings, mode, _own_objects())
                self._undo.callback(self._serving.close)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End everything."""
        self._undo.close()

    def asker(self, kind: str) -> Host:
        """Who asks: `pod`, `sandbox` (a pod no socket hook sees) or `outside`."""
        hosts = {"pod": self.shell, "sandbox": self.sandbox, "outside": self.cluster.client}
        return hosts[kind]

    def cpu_ns(self, *, with_agent: bool) -> int:
        """CPU time of the servers so far; of the agent too, where it relays."""
        total = sum(server.cpu_ns() for server in self.servers)
        return total + (cpu_ns_of(self._serving.pid) if with_agent and self._serving else 0)

    @property
    def is_programmed(self) -> bool:
        return self._serving is not None

    def grow(self, population: Population) -> float:
        """Have so many services served besides those measured; seconds until they are.

        Raises:
            EbpfSvcError: it did not get there, or says that something failed.
        """
        begun = time.monotonic()
        if self._serving is not None:
            self._serving.grow(population, population.services + _OWN_PORTS)
        return time.monotonic() - begun

    def _serve(self, pod: Pod, binary: Path, cpu: int) -> Server:
        server = Server(pod, binary, echo=ECHO, sink=SINK, cpu=cpu)
        self._undo.callback(server.close)
        return server

    def _wire(self, near: Node, far: Node) -> None:
        for pod, prefix in zip(self._webs, (NEAR, FAR), strict=True):
            pod.run(["ip", "route", "add", "local", prefix, "dev", "lo"])
            way = ["via", pod.addresses.v4, "dev", pod.device, "onlink"]
            pod.node.run(["ip", "route", "add", prefix, *way])
        router, home = self.cluster.router, near.addresses.v4
        near.run(["ip", "route", "add", FAR, "via", far.addresses.v4])
        far.run(["ip", "route", "add", NEAR, "via", home])
        far.run(["ip", "route", "add", f"{self.cluster.client.addresses.v4}/32", "via", home])
        for prefix in (NEAR, FAR):
            router.run(["ip", "route", "add", prefix, "via", home])
        for host in (router, near, far):
            for scope in ("all", "default", *_devices(host)):
                host.namespace.sysctl({f"net/ipv4/conf/{scope}/send_redirects": 0})


def address_of(backends: int) -> tuple[str, str]:
    """Cluster IP of the service with so many backends, and the first of them."""
    return _VIPS[backends], _backend(NEAR, 0)


def node_port_backend(*, far: bool) -> str:
    """The one backend behind a node port."""
    return _backend(FAR if far else NEAR, 0)


def _devices(host: Host) -> list[str]:
    return [link["ifname"] for link in json.loads(host.run(["ip", "-j", "link"]))]


def _updated(settings: Settings, update: Mapping[str, Any]) -> Settings:
    """These settings with some replaced; a mapping replaces fields of a section."""
    values: dict[str, Any] = {"service_cidrs": _SERVICE_CIDRS}
    for name, value in update.items():
        is_section = isinstance(value, Mapping)
        values[name] = getattr(settings, name).model_copy(update=value) if is_section else value
    return settings.model_copy(update=values)


def _backend(prefix: str, number: int) -> str:
    return str(ipaddress.ip_network(prefix)[number + 1])


def _own_objects() -> Iterator[dict[str, Any]]:
    for count, vip in _VIPS.items():
        yield from _objects(f"of-{count}", vip, [_backend(NEAR, i) for i in range(count)], "node1")
    for name, vip, port, prefix, node in (
        ("near", _NEAR_VIP, NODE_PORT_NEAR, NEAR, "node1"),
        ("far", _FAR_VIP, NODE_PORT_FAR, FAR, "node2"),
    ):
        yield from _objects(name, vip, [_backend(prefix, 0)], node, node_port=port)


def _objects(
    name: str, vip: str, addresses: list[str], node: str, node_port: int = 0
) -> Iterator[dict[str, Any]]:
    """A Service of both ports and protocols, and its slices."""
    ports = [
        {"name": f"{kind}-{protocol.lower()}", "protocol": protocol, "port": port, "targetPort": to}
        for kind, port, to in (("echo", SERVICE_ECHO, ECHO), ("sink", SERVICE_SINK, SINK))
        for protocol in ("TCP", "UDP")
    ]
    spec: dict[str, Any] = {"clusterIP": vip, "ports": ports}
    if node_port:
        spec["type"] = "NodePort"
        # The second port needs one of its own.
        for index, port in enumerate(ports):
            port["nodePort"] = node_port + (10 if index >= 2 else 0)
    metadata = {"namespace": _NAMESPACE, "name": name}
    yield {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}
    for start in range(0, len(addresses), _SLICE_ENDPOINTS):
        yield {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": _NAMESPACE,
                "name": f"{name}-{start}",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv4",
            "ports": [
                {"name": port["name"], "protocol": port["protocol"], "port": port["targetPort"]}
                for port in ports
            ],
            "endpoints": [
                {"addresses": [address], "nodeName": node, "conditions": {"ready": True}}
                for address in addresses[start : start + _SLICE_ENDPOINTS]
            ],
        }
