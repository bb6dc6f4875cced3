"""What manifests declare, after their own rules passed and before the control plane acted on it.

Frozen and small: tens of thousands are kept so that one edited file costs one file's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import ServiceName, ServiceType, TrafficPolicy
from ebpf_svc.watch.raw import Kind

PROTOCOLS = tuple(Protocol)
SERVICE_TYPES = tuple(ServiceType)
POLICIES = tuple(TrafficPolicy)


class ObjectRef(NamedTuple):
    """Identity of an object; the namespace is empty for nodes."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.namespace}/{self.name}"
            if self.namespace
            else f"{self.kind} {self.name}"
        )


class FamilyPolicy(StrEnum):
    """`spec.ipFamilyPolicy`."""

    SINGLE_STACK = "SingleStack"
    PREFER_DUAL_STACK = "PreferDualStack"
    REQUIRE_DUAL_STACK = "RequireDualStack"


FAMILY_POLICIES = tuple(FamilyPolicy)


class Distribution(StrEnum):
    """`spec.trafficDistribution`; PreferClose is read as PreferSameZone, its newer name (E12)."""

    NONE = ""
    SAME_ZONE = "PreferSameZone"
    SAME_NODE = "PreferSameNode"


class DeclaredPort(NamedTuple):
    """An entry of `spec.ports`, defaulted."""

    name: str
    protocol: Protocol
    port: int
    target: int | str
    node_port: int


@dataclass(frozen=True, slots=True)
class DeclaredService:
    """A Service as its manifest asks for it: addresses and ports may still have to be allocated."""

    ref: ObjectRef
    name: ServiceName
    type: ServiceType
    ports: tuple[DeclaredPort, ...]
    headless: bool = False
    foreign: bool = False
    """Another proxy serves it (F16, W1); its addresses are allocated all the same."""
    selector: tuple[tuple[str, str], ...] = ()
    """Sorted labels, all of which a pod must have; empty = no selector."""
    cluster_ips: tuple[str, ...] = ()
    """Asked for by address, primary first."""
    families: tuple[Family, ...] = ()
    """Asked for by family, primary first; complete with those of `cluster_ips`."""
    family_policy: FamilyPolicy = FamilyPolicy.SINGLE_STACK
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()
    source_ranges: tuple[str, ...] = ()
    affinity_s: int = 0
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    node_ports: bool = False
    """Every port gets a node port."""
    health_check: bool = False
    """Needs a health-check node port: LoadBalancer with external policy Local (F15)."""
    health_check_node_port: int = 0
    publish_not_ready: bool = False
    distribution: Distribution = Distribution.NONE

    @property
    def has_cluster_ips(self) -> bool:
        return not self.headless and self.type is not ServiceType.EXTERNAL_NAME


@dataclass(frozen=True, slots=True)
class DeclaredSlice:
    """An EndpointSlice written by hand; `slice` is None where nobody would look (E1, W2)."""

    ref: ObjectRef
    slice: EndpointSlice | None


@dataclass(frozen=True, slots=True)
class DeclaredEndpoints:
    """Endpoints written by hand, already in the form of the slices that would mirror them."""

    ref: ObjectRef
    service_name: ServiceName
    slices: tuple[EndpointSlice, ...]


class PodPort(NamedTuple):
    """A named port of a pod's containers."""

    name: str
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True)
class DeclaredPod:
    """A Pod, with its status if it has one."""

    ref: ObjectRef
    labels: frozenset[tuple[str, str]]
    addresses: tuple[str, ...]
    """Empty = not an endpoint: no address yet, or finished."""
    node_name: str = ""
    ready: bool = False
    terminating: bool = False
    ports: tuple[PodPort, ...] = ()


@dataclass(frozen=True, slots=True)
class DeclaredNode:
    """A Node."""

    ref: ObjectRef
    addresses: tuple[str, ...] = ()
    """InternalIPs, then ExternalIPs (N1)."""
    zone: str = ""
    pod_cidrs: tuple[str, ...] = ()
    eligible: bool = True
    """Load balancers may send traffic there (N6)."""


Declared = DeclaredService | DeclaredSlice | DeclaredEndpoints | DeclaredPod | DeclaredNode
