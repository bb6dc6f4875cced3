"""Manifests the behaviour tests publish: one service with every kind of frontend, its endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.addressing import Addresses
from ebpf_svc.testbed.host import Node, Pod
from ebpf_svc.testbed.traffic import Target

PORT = 80
PROTOCOLS = (Protocol.TCP, Protocol.UDP)


@dataclass(frozen=True)
class Endpoint:
    """A pod behind a service, in a state of its life."""

    pod: Pod
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    zones: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    """Hints: zones and nodes this endpoint is meant for (E7)."""


@dataclass(frozen=True)
class Web:
    """A service on port 80, TCP and UDP, both families, reachable in every way there is.

    The number makes all its addresses; two services of one world never share it. Each has a target
    port of its own too, so that what one test leaves behind is nothing to the next.
    """

    number: int
    shared_port: int = 0
    """Target port, when it is to be the same as another service's."""
    affinity_s: int = 0
    internal_local: bool = False
    external_local: bool = False
    source_ranges: tuple[str, ...] = ()
    ip_mode: str = "VIP"
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the Service's spec."""

    @property
    def name(self) -> str:
        return f"web{self.number}"

    @property
    def cluster(self) -> Addresses:
        high, low = divmod(self.number, 256)
        return Addresses(f"10.96.{high}.{low}", f"fd00:10:96::{self.number:x}")

    @property
    def external(self) -> Addresses:
        high, low = divmod(self.number, 256)
        return Addresses(f"198.18.{high}.{low}", f"2001:db8:51::1:{self.number:x}")

    @property
    def balancer(self) -> Addresses:
        high, low = divmod(self.number, 256)
        return Addresses(f"198.18.{128 + high}.{low}", f"2001:db8:51::2:{self.number:x}")

    @property
    def target_port(self) -> int:
        return self.shared_port or 8_000 + self.number

    @property
    def node_port(self) -> int:
        return 30_000 + self.number

    def manifests(self, endpoints: Sequence[Endpoint | Pod]) -> list[dict[str, Any]]:
        """The Service and its slices with these endpoints."""
        full = [one if isinstance(one, Endpoint) else Endpoint(one) for one in endpoints]
        return [self._service(), *(self._slice(family, full) for family in Family)]

    def _service(self) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "type": "LoadBalancer",
            "clusterIP": self.cluster.v4,
            "clusterIPs": list(self.cluster),
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack",
            "externalIPs": list(self.external),
            "ports": [
                {
                    "name": protocol.value.lower(),
                    "protocol": protocol.value,
                    "port": PORT,
                    "targetPort": self.target_port,
                    "nodePort": self.node_port,
                }
                for protocol in PROTOCOLS
            ],
            "internalTrafficPolicy": "Local" if self.internal_local else "Cluster",
            "externalTrafficPolicy": "Local" if self.external_local else "Cluster",
            **self.extra,
        }
        if self.affinity_s:
            spec["sessionAffinity"] = "ClientIP"
            spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": self.affinity_s}}
        if self.source_ranges:
            spec["loadBalancerSourceRanges"] = list(self.source_ranges)
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": "tests"},
            "spec": spec,
            "status": {
                "loadBalancer": {
                    "ingress": [{"ip": ip, "ipMode": self.ip_mode} for ip in self.balancer]
                }
            },
        }

    def _slice(self, family: Family, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{self.name}-{family.label.lower()}",
                "namespace": "tests",
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": family.label,
            "ports": [
                {
                    "name": protocol.value.lower(),
                    "protocol": protocol.value,
                    "port": self.target_port,
                }
                for protocol in PROTOCOLS
            ],
            "endpoints": [
                {
                    "addresses": [one.pod.address(family)],
                    "nodeName": one.pod.node.name,
                    "conditions": {
                        "ready": one.ready,
                        "serving": one.serving,
                        "terminating": one.terminating,
                    },
                    "hints": {
                        "forZones": [{"name": zone} for zone in one.zones],
                        "forNodes": [{"name": node} for node in one.nodes],
                    },
                }
                for one in endpoints
            ],
        }

    def at_cluster_ip(self, family: Family, protocol: Protocol, **options: Any) -> Target:
        return Target(self.cluster.of(family), PORT, protocol, **options)

    def at_external_ip(self, family: Family, protocol: Protocol, **options: Any) -> Target:
        return Target(self.external.of(family), PORT, protocol, **options)

    def at_balancer(self, family: Family, protocol: Protocol, **options: Any) -> Target:
        return Target(self.balancer.of(family), PORT, protocol, **options)

    def at_node(self, node: Node, family: Family, protocol: Protocol, **options: Any) -> Target:
        return Target(node.address(family), self.node_port, protocol, **options)

    def at_localhost(self, family: Family, protocol: Protocol, **options: Any) -> Target:
        address = "127.0.0.1" if family is Family.V4 else "::1"
        return Target(address, self.node_port, protocol, **options)


def zone_of(node: Node) -> str:
    """Every node has a zone of its own (N5)."""
    return f"zone-{node.name}"


def node_manifests(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """The Node objects of a cluster."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": node.name,
                "labels": {"topology.kubernetes.io/zone": zone_of(node)},
            },
            "status": {
                "addresses": [{"type": "InternalIP", "address": one} for one in node.addresses]
            },
        }
        for node in nodes
    ]
