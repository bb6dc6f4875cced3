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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebpf_svc.bench.generator import Server, cpu_ns_of
from ebpf_svc.bench.population import Population
from ebpf_svc.bench.serving import KubeProxy, OurAgent, Serving
from ebpf_svc.config import Settings
from ebpf_svc.model.net import Family
from ebpf_svc.testbed import drivers
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node, Pod
from ebpf_svc.testbed.podnet import PodNetwork

ECHO, SINK = 8080, 8081
"""Ports backends answer on, TCP and UDP."""
SERVICE_ECHO, SERVICE_SINK = 80, 81
NODE_PORT_NEAR, NODE_PORT_FAR = 30080, 30081
BACKENDS = (1, 10, 1_000)
_NAMESPACE = "zz-bench"
"""Sorts after every other service: the longest way through lists of rules."""
_OWN_PORTS = (len(BACKENDS) + 2) * 4
"""Service ports of ours: two numbers, two protocols each."""
_SLICE_ENDPOINTS = 100
_TRACKING = """
table inet bench {
    chain postrouting { type nat hook postrouting priority srcnat; meta mark 0xfeed masquerade; }
}
"""
"""A rule nothing matches: that there is one makes the kernel track every connection."""
_SERVICE_CIDRS = ("10.96.0.0/12", "fd00:10:96::/108")


@dataclass(frozen=True, slots=True)
class Ground:
    """Addresses of one family."""

    near: str
    """Prefix of the backends on the node that is asked."""
    far: str
    """Of those on the other node."""
    vips: str
    """Cluster IPs of ours: beyond those of the population."""

    def vip(self, number: int) -> str:
        return _nth(self.vips, number)


GROUNDS = {
    Family.V4: Ground("10.244.128.0/20", "10.244.144.0/20", "10.111.248.0/21"),
    Family.V6: Ground("fd00:10:244:80::/64", "fd00:10:244:90::/64", "fd00:10:96::f:0/112"),
}
_NEAR_VIP, _FAR_VIP = 2_001, 2_002
"""Which cluster IPs the services of node ports have; the others' is their number of backends."""


class Site:
    """A cluster with its agent, if any; `close` removes both."""

    def __init__(
        self,
        mode: str | None,
        *,
        binary: Path,
        cache_dir: Path,
        cpu: int,
        family: Family = Family.V4,
        update: Mapping[str, Any] | None = None,
        tracked: bool = False,
        xdp_wires: bool = False,
        kube_proxy: Path | None = None,
    ) -> None:
        """Build it; nothing is served before `grow`.

        Args:
            mode: of the agent; None = no agent.
            family: what services and backends have addresses of.
            xdp_wires: make the wires fit for programs in drivers.
            kube_proxy: the binary that serves in that mode instead of our agent.
            update: settings that differ, by section or name.
            tracked: the nodes track connections whether a mode needs it or not.
        """
        self._undo = ExitStack()
        self._family = family
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
                    self._serving = KubeProxy(near, kube_proxy, mode, _own_objects(family))
                else:
                    manifests = self.cluster.folder / "manifests"
                    manifests.mkdir()
                    settings = _updated(self.cluster.settings(near, manifests), update or {})
                    self._serving = OurAgent(near, settings, mode, _own_objects(family))
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
        family, ground = self._family, GROUNDS[self._family]
        add = ["ip", f"-{int(family)}", "route", "add"]
        for pod, prefix in zip(self._webs, (ground.near, ground.far), strict=True):
            pod.run([*add, "local", prefix, "dev", "lo"])
            way = ["via", pod.address(family), "dev", pod.device, "onlink"]
            pod.node.run([*add, prefix, *way])
        router, home = self.cluster.router, near.address(family)
        near.run([*add, ground.far, "via", far.address(family)])
        far.run([*add, ground.near, "via", home])
        far.run([*add, self.cluster.client.address(family), "via", home])
        for prefix in (ground.near, ground.far):
            router.run([*add, prefix, "via", home])
        for host in (router, near, far):
            for scope in ("all", "default", *_devices(host)):
                host.namespace.sysctl({f"net/ipv4/conf/{scope}/send_redirects": 0})
        for scope in ("all", *_devices(self.cluster.client)):
            self.cluster.client.namespace.sysctl({f"net/ipv6/conf/{scope}/accept_redirects": 0})


def address_of(backends: int, family: Family) -> tuple[str, str]:
    """Cluster IP of the service with so many backends, and the first of them."""
    return GROUNDS[family].vip(backends), _nth(GROUNDS[family].near, 1)


def node_port_backend(family: Family, *, far: bool) -> str:
    """The one backend behind a node port."""
    return _nth(GROUNDS[family].far if far else GROUNDS[family].near, 1)


def _devices(host: Host) -> list[str]:
    return [link["ifname"] for link in json.loads(host.run(["ip", "-j", "link"]))]


def _updated(settings: Settings, update: Mapping[str, Any]) -> Settings:
    """These settings with some replaced; a mapping replaces fields of a section."""
    values: dict[str, Any] = {"service_cidrs": _SERVICE_CIDRS}
    for name, value in update.items():
        is_section = isinstance(value, Mapping)
        values[name] = getattr(settings, name).model_copy(update=value) if is_section else value
    return settings.model_copy(update=values)


def _nth(prefix: str, number: int) -> str:
    return str(ipaddress.ip_network(prefix)[number])


def _own_objects(family: Family) -> Iterator[dict[str, Any]]:
    ground = GROUNDS[family]
    for count in BACKENDS:
        addresses = [_nth(ground.near, 1 + i) for i in range(count)]
        yield from _objects(f"of-{count}", family, count, addresses, "node1")
    for name, vip, port, prefix, node in (
        ("near", _NEAR_VIP, NODE_PORT_NEAR, ground.near, "node1"),
        ("far", _FAR_VIP, NODE_PORT_FAR, ground.far, "node2"),
    ):
        yield from _objects(name, family, vip, [_nth(prefix, 1)], node, node_port=port)


def _objects(
    name: str, family: Family, vip: int, addresses: list[str], node: str, *, node_port: int = 0
) -> Iterator[dict[str, Any]]:
    """A Service of both ports and protocols, and its slices."""
    ports = [
        {"name": f"{kind}-{protocol.lower()}", "protocol": protocol, "port": port, "targetPort": to}
        for kind, port, to in (("echo", SERVICE_ECHO, ECHO), ("sink", SERVICE_SINK, SINK))
        for protocol in ("TCP", "UDP")
    ]
    spec: dict[str, Any] = {"clusterIP": GROUNDS[family].vip(vip), "ports": ports}
    spec["ipFamilies"] = [family.label]
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
            "addressType": family.label,
            "ports": [
                {"name": port["name"], "protocol": port["protocol"], "port": port["targetPort"]}
                for port in ports
            ],
            "endpoints": [
                {"addresses": [address], "nodeName": node, "conditions": {"ready": True}}
                for address in addresses[start : start + _SLICE_ENDPOINTS]
            ],
        }
