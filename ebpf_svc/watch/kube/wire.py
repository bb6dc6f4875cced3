"""The shapes of the API server's JSON, as far as this program reads them.

Fields nobody here reads are skipped while parsing, so they may hold anything and cost next to
nothing. Everything is optional and may be null. What is shared with manifests is in `watch.raw`.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ebpf_svc.watch import raw

Labels = TypedDict(
    "Labels",
    {
        "kubernetes.io/service-name": str | None,
        "topology.kubernetes.io/zone": str | None,
    },
    total=False,
)
"""The labels that mean something here."""

Annotations = TypedDict(
    "Annotations",
    {
        "endpoints.kubernetes.io/last-change-trigger-time": str | None,
        "k8s.io/initial-events-end": str | None,
    },
    total=False,
)
"""The annotations that mean something here."""


class Meta(TypedDict, total=False):
    """`metadata` of an object."""

    name: str | None
    namespace: str | None
    resourceVersion: str | None
    deletionTimestamp: str | None
    labels: Labels | None
    annotations: Annotations | None


class Object(TypedDict, total=False):
    """What all objects have."""

    metadata: Meta | None


class ServicePort(TypedDict, total=False):
    """An entry of a Service's `spec.ports`; target ports act through slices alone (F6)."""

    name: str | None
    protocol: str | None
    port: raw.Int | None
    nodePort: raw.Int | None


class ServiceSpec(TypedDict, total=False):
    """`spec` of a Service (F1-F15)."""

    type: str | None
    ports: list[ServicePort] | None
    clusterIP: str | None
    clusterIPs: list[str] | None
    ipFamilies: list[str] | None
    externalIPs: list[str] | None
    loadBalancerSourceRanges: list[str] | None
    sessionAffinity: str | None
    sessionAffinityConfig: raw.AffinityConfig | None
    internalTrafficPolicy: str | None
    externalTrafficPolicy: str | None
    healthCheckNodePort: raw.Int | None


class Service(Object, total=False):
    """A Service."""

    spec: ServiceSpec | None
    status: raw.ServiceStatus | None


class EndpointSlice(Object, total=False):
    """An EndpointSlice."""

    addressType: str | None
    ports: list[raw.EndpointPort] | None
    endpoints: list[raw.Endpoint] | None


class Taint(TypedDict, total=False):
    """An entry of `spec.taints` of a Node."""

    key: str | None


class NodeSpec(raw.NodeSpec, total=False):
    """`spec` of a Node."""

    taints: list[Taint] | None


class Node(Object, total=False):
    """A Node."""

    spec: NodeSpec | None
    status: raw.NodeStatus | None


class ServiceCidrSpec(TypedDict, total=False):
    """`spec` of a ServiceCIDR."""

    cidrs: list[str] | None


class ServiceCidr(Object, total=False):
    """A ServiceCIDR."""

    spec: ServiceCidrSpec | None


ItemT = TypeVar("ItemT", bound=Object)

ListMeta = TypedDict(
    "ListMeta", {"resourceVersion": str | None, "continue": str | None}, total=False
)
"""`metadata` of a list."""


class Page(TypedDict, Generic[ItemT], total=False):
    """A list, or a part of one."""

    metadata: ListMeta | None
    items: list[ItemT] | None


class Event(TypedDict, Generic[ItemT], total=False):
    """A line of a watch."""

    type: str | None
    object: ItemT | None


class Status(TypedDict, total=False):
    """What the API server sends instead of what was asked for."""

    code: int | None
    reason: str | None
    message: str | None


class AnyPage(TypedDict, total=False):
    """A list whose items are looked at one by one."""

    metadata: ListMeta | None
    items: list[object] | None


class ErrorEvent(TypedDict, total=False):
    """A line of a watch that says why it ends."""

    type: str | None
    object: Status | None


ANY_PAGE: TypeAdapter[AnyPage] = TypeAdapter(AnyPage)
ERROR_EVENT: TypeAdapter[ErrorEvent] = TypeAdapter(ErrorEvent)
STATUS: TypeAdapter[Status] = TypeAdapter(Status)
