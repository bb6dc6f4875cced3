"""Snapshots as text a person compares."""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_svc.model.endpoint import Endpoint, EndpointSlice
from ebpf_svc.model.service import Service, ServiceName, TrafficPolicy
from ebpf_svc.model.snapshot import NodeFacts, Snapshot


def snapshot_text(snapshot: Snapshot) -> str:
    """Print a whole Snapshot, sorted, without its revision."""
    lines = [*_node(snapshot.node), ""]
    for name in sorted({*snapshot.services, *snapshot.slices}):
        lines += [*_service(name, snapshot), ""]
    lines += [f"problem {problem}" for problem in snapshot.problems]
    return "\n".join(lines).rstrip() + "\n"


def _node(node: NodeFacts) -> Iterable[str]:
    yield f"node {node.name}" + (f" in zone {node.zone}" if node.zone else "")
    yield from _line("addresses", node.addresses)
    yield from _line("local addresses", node.local_addresses)
    yield from _line("pod CIDRs", node.pod_cidrs)


def _service(name: ServiceName, snapshot: Snapshot) -> Iterable[str]:
    service = snapshot.services.get(name)
    if service is None:
        yield f"service {name}: none of ours"
    else:
        yield f"service {name} {service.type}"
        yield from _service_fields(service)
    for each in snapshot.slices.get(name, ()):
        yield from _slice(each)


def _service_fields(service: Service) -> Iterable[str]:
    yield from _line("cluster IPs", service.cluster_ips)
    for port in service.ports:
        node_port = f" at node port {port.node_port}" if port.node_port else ""
        yield f"  port {port.name or '(unnamed)'} {port.port}/{port.protocol}{node_port}"
    yield from _line("external IPs", service.external_ips)
    yield from _line("load balancer IPs", service.load_balancer_ips)
    yield from _line("source ranges", service.source_ranges)
    if service.affinity_s:
        yield f"  affinity {service.affinity_s} s"
    if service.internal_policy is not TrafficPolicy.CLUSTER:
        yield f"  internal policy {service.internal_policy}"
    if service.external_policy is not TrafficPolicy.CLUSTER:
        yield f"  external policy {service.external_policy}"
    if service.health_check_node_port:
        yield f"  health check node port {service.health_check_node_port}"


def _slice(item: EndpointSlice) -> Iterable[str]:
    ports = ", ".join(f"{p.name or '(unnamed)'} {p.port}/{p.protocol}" for p in item.ports)
    yield f"  slice {item.name} {item.family.label}: {ports or 'no ports'}"
    yield from (f"    {_endpoint(each)}" for each in item.endpoints)


def _endpoint(endpoint: Endpoint) -> str:
    words = [endpoint.address]
    words += [f"on {endpoint.node_name}"] if endpoint.node_name else []
    words += ["ready" if endpoint.ready else "not ready"]
    words += [] if endpoint.serving else ["not serving"]
    words += ["terminating"] if endpoint.terminating else []
    words += [f"for zones {', '.join(sorted(endpoint.zone_hints))}"] if endpoint.zone_hints else []
    words += [f"for nodes {', '.join(sorted(endpoint.node_hints))}"] if endpoint.node_hints else []
    return " ".join(words)


def _line(title: str, words: Iterable[str]) -> Iterable[str]:
    text = " ".join(words)
    return [f"  {title} {text}"] if text else []
