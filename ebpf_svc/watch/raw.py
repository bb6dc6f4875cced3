"""The shapes of manifests, as far as this program reads them; checked once, where they come in.

Fields nobody here reads are dropped by the check, so they may hold anything. Everything is
optional and may be null, as in the API; what must be there is for the rules to say.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Strict, TypeAdapter
from typing_extensions import TypedDict

Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]


class Kind(StrEnum):
    """The kinds of objects that are read; every other kind passes unseen."""

    SERVICE = "Service"
    ENDPOINT_SLICE = "EndpointSlice"
    ENDPOINTS = "Endpoints"
    POD = "Pod"
    NODE = "Node"

    # Tens of thousands of references are hashed for each edit; Enum's own hash is Python code.
    __hash__ = str.__hash__

    @property
    def api_version(self) -> str:
        return "discovery.k8s.io/v1" if self is Kind.ENDPOINT_SLICE else "v1"

    @property
    def group(self) -> str:
        """What stands before the version; empty for the core group."""
        return self.api_version.rpartition("/")[0]


class Meta(TypedDict, total=False):
    """`metadata` of any object."""

    name: str | None
    namespace: str | None
    labels: dict[str, str] | None
    annotations: dict[str, str] | None
    deletionTimestamp: str | None


class ServicePort(TypedDict, total=False):
    """An entry of a Service's `spec.ports`."""

    name: str | None
    protocol: str | None
    port: Int | None
    targetPort: Int | str | None
    nodePort: Int | None


class ClientIPConfig(TypedDict, total=False):
    """`spec.sessionAffinityConfig.clientIP`."""

    timeoutSeconds: Int | None


class AffinityConfig(TypedDict, total=False):
    """`spec.sessionAffinityConfig`."""

    clientIP: ClientIPConfig | None


class ServiceSpec(TypedDict, total=False):
    """`spec` of a Service."""

    type: str | None
    ports: list[ServicePort] | None
    selector: dict[str, str] | None
    clusterIP: str | None
    clusterIPs: list[str] | None
    ipFamilies: list[str] | None
    ipFamilyPolicy: str | None
    externalIPs: list[str] | None
    externalName: str | None
    loadBalancerSourceRanges: list[str] | None
    loadBalancerClass: str | None
    allocateLoadBalancerNodePorts: Bool | None
    sessionAffinity: str | None
    sessionAffinityConfig: AffinityConfig | None
    internalTrafficPolicy: str | None
    externalTrafficPolicy: str | None
    healthCheckNodePort: Int | None
    publishNotReadyAddresses: Bool | None
    trafficDistribution: str | None


class Ingress(TypedDict, total=False):
    """An entry of `status.loadBalancer.ingress`."""

    ip: str | None
    ipMode: str | None


class LoadBalancerStatus(TypedDict, total=False):
    """`status.loadBalancer`."""

    ingress: list[Ingress] | None


class ServiceStatus(TypedDict, total=False):
    """`status` of a Service."""

    loadBalancer: LoadBalancerStatus | None


class Service(TypedDict, total=False):
    """A Service."""

    metadata: Meta | None
    spec: ServiceSpec | None
    status: ServiceStatus | None


class EndpointPort(TypedDict, total=False):
    """A port of an EndpointSlice, of a subset of Endpoints."""

    name: str | None
    protocol: str | None
    port: Int | None


class Conditions(TypedDict, total=False):
    """`conditions` of an endpoint."""

    ready: Bool | None
    serving: Bool | None
    terminating: Bool | None


class Named(TypedDict, total=False):
    """A thing with a name: a zone or node of a hint."""

    name: str | None


class Hints(TypedDict, total=False):
    """`hints` of an endpoint."""

    forZones: list[Named] | None
    forNodes: list[Named] | None


class Endpoint(TypedDict, total=False):
    """An entry of `endpoints` of a slice."""

    addresses: list[str] | None
    conditions: Conditions | None
    nodeName: str | None
    hints: Hints | None


class EndpointSlice(TypedDict, total=False):
    """An EndpointSlice."""

    metadata: Meta | None
    addressType: str | None
    ports: list[EndpointPort] | None
    endpoints: list[Endpoint] | None


class SubsetAddress(TypedDict, total=False):
    """An address of a subset of Endpoints."""

    ip: str | None
    nodeName: str | None


class Subset(TypedDict, total=False):
    """An entry of `subsets` of Endpoints."""

    addresses: list[SubsetAddress] | None
    notReadyAddresses: list[SubsetAddress] | None
    ports: list[EndpointPort] | None


class Endpoints(TypedDict, total=False):
    """An Endpoints object."""

    metadata: Meta | None
    subsets: list[Subset] | None


class ContainerPort(TypedDict, total=False):
    """An entry of a container's `ports`."""

    name: str | None
    containerPort: Int | None
    protocol: str | None


class Container(TypedDict, total=False):
    """A container of a Pod."""

    ports: list[ContainerPort] | None
    restartPolicy: str | None


class PodSpec(TypedDict, total=False):
    """`spec` of a Pod."""

    nodeName: str | None
    hostNetwork: Bool | None
    containers: list[Container] | None
    initContainers: list[Container] | None


class Condition(TypedDict, total=False):
    """An entry of `status.conditions` of a Pod."""

    type: str | None
    status: str | None


class Address(TypedDict, total=False):
    """An entry of `status.podIPs` or `status.hostIPs`."""

    ip: str | None


class PodStatus(TypedDict, total=False):
    """`status` of a Pod."""

    phase: str | None
    podIP: str | None
    podIPs: list[Address] | None
    hostIP: str | None
    hostIPs: list[Address] | None
    conditions: list[Condition] | None


class Pod(TypedDict, total=False):
    """A Pod."""

    metadata: Meta | None
    spec: PodSpec | None
    status: PodStatus | None


class Taint(TypedDict, total=False):
    """An entry of `spec.taints` of a Node."""

    key: str | None


class NodeSpec(TypedDict, total=False):
    """`spec` of a Node."""

    podCIDR: str | None
    podCIDRs: list[str] | None
    taints: list[Taint] | None


class NodeAddress(TypedDict, total=False):
    """An entry of `status.addresses` of a Node."""

    type: str | None
    address: str | None


class NodeStatus(TypedDict, total=False):
    """`status` of a Node."""

    addresses: list[NodeAddress] | None


class Node(TypedDict, total=False):
    """A Node."""

    metadata: Meta | None
    spec: NodeSpec | None
    status: NodeStatus | None


SERVICE: TypeAdapter[Service] = TypeAdapter(Service)
ENDPOINT_SLICE: TypeAdapter[EndpointSlice] = TypeAdapter(EndpointSlice)
ENDPOINTS: TypeAdapter[Endpoints] = TypeAdapter(Endpoints)
POD: TypeAdapter[Pod] = TypeAdapter(Pod)
NODE: TypeAdapter[Node] = TypeAdapter(Node)
