"""The four kinds that are watched (W1-W5)."""

from __future__ import annotations

from pydantic import TypeAdapter

from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.service import Service
from ebpf_svc.model.snapshot import NodeFacts
from ebpf_svc.watch.endpoints import HEADLESS_LABEL
from ebpf_svc.watch.kube import wire
from ebpf_svc.watch.kube.convert import node_of, service_cidrs_of, service_of, slice_of
from ebpf_svc.watch.kube.decode import Resource
from ebpf_svc.watch.service import FOREIGN_PROXY_LABEL


def services(service_proxy_name: str) -> Resource[wire.Service, Service]:
    """Services with a cluster IP that are ours to serve (W1)."""
    label = FOREIGN_PROXY_LABEL
    return Resource(
        kind="Service",
        path="/api/v1/services",
        page=TypeAdapter(wire.Page[wire.Service]),
        event=TypeAdapter(wire.Event[wire.Service]),
        item=TypeAdapter(wire.Service),
        convert=service_of,
        selectors={
            "labelSelector": f"{label}={service_proxy_name}" if service_proxy_name else f"!{label}",
            "fieldSelector": "spec.clusterIP!=None",
        },
    )


def slices() -> Resource[wire.EndpointSlice, EndpointSlice]:
    """EndpointSlices, but for those of headless Services (W2)."""
    return Resource(
        kind="EndpointSlice",
        path="/apis/discovery.k8s.io/v1/endpointslices",
        page=TypeAdapter(wire.Page[wire.EndpointSlice]),
        event=TypeAdapter(wire.Event[wire.EndpointSlice]),
        item=TypeAdapter(wire.EndpointSlice),
        convert=slice_of,
        selectors={"labelSelector": f"!{HEADLESS_LABEL}"},
    )


def node(name: str) -> Resource[wire.Node, NodeFacts]:
    """Our own Node (W3)."""
    return Resource(
        kind="Node",
        path="/api/v1/nodes",
        page=TypeAdapter(wire.Page[wire.Node]),
        event=TypeAdapter(wire.Event[wire.Node]),
        item=TypeAdapter(wire.Node),
        convert=node_of,
        selectors={"fieldSelector": f"metadata.name={name}"},
        is_small=True,
    )


def service_cidrs() -> Resource[wire.ServiceCidr, tuple[str, ...]]:
    """ServiceCIDRs (W4); servers before 1.33 have none."""
    return Resource(
        kind="ServiceCIDR",
        path="/apis/networking.k8s.io/v1/servicecidrs",
        page=TypeAdapter(wire.Page[wire.ServiceCidr]),
        event=TypeAdapter(wire.Event[wire.ServiceCidr]),
        item=TypeAdapter(wire.ServiceCidr),
        convert=service_cidrs_of,
        is_small=True,
        is_optional=True,
    )
