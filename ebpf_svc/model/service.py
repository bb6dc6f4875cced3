"""What the API says about a Service, after validation and defaulting."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ebpf_svc.model.net import Family, Protocol, family_of


class ServiceName(NamedTuple):
    """Namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ServicePortName(NamedTuple):
    """Identity of a service port (rule M1)."""

    namespace: str
    name: str
    port: str
    protocol: Protocol

    def __str__(self) -> str:
        """Kube-proxy's printable form: `ns/name:port`, or `ns/name` for an unnamed port."""
        return f"{self.namespace}/{self.name}" + (f":{self.port}" if self.port else "")

    @property
    def service(self) -> ServiceName:
        return ServiceName(self.namespace, self.name)


class ServiceType(StrEnum):
    """`spec.type`."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_NAME = "ExternalName"


class TrafficPolicy(StrEnum):
    """`spec.internalTrafficPolicy`, `spec.externalTrafficPolicy`."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One entry of `spec.ports`; the target port is not here: it acts only through EndpointSlices
    (F6).
    """

    name: str
    protocol: Protocol
    port: int
    node_port: int = 0
    """0 = none."""


@dataclass(frozen=True, slots=True)
class Service:
    """A Service as the dataplane needs it. Addresses canonical, unparsable ones already dropped
    (F8-F10, F17).
    """

    name: ServiceName
    type: ServiceType
    ports: tuple[ServicePort, ...]
    cluster_ips: tuple[str, ...] = ()
    """At most one a family (F3, F4); empty for headless and ExternalName services (F1, F2)."""
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()
    """Ingress addresses whose ipMode is VIP or unset (F9)."""
    source_ranges: tuple[str, ...] = ()
    """`spec.loadBalancerSourceRanges` (F10), both families."""
    affinity_s: int = 0
    """Seconds of ClientIP affinity (F12); 0 = none."""
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    health_check_node_port: int = 0
    """`spec.healthCheckNodePort` as written; whether it counts is a question for the plan (F15)."""

    def cluster_ip(self, family: Family) -> str | None:
        """The cluster IP of a family, or None when the Service has none there."""
        for address in self.cluster_ips:
            if family_of(address) is family:
                return address
        return None
