"""Which endpoints of a service port get traffic that enters at this node.

Pure. The rules are kube-proxy's T1-T10 (topology.go:CategorizeEndpoints) with E3, E8 and E9 for
joining slices, and F14 and F21 for what a service needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from ebpf_svc.model.desired import Backend
from ebpf_svc.model.endpoint import Endpoint, EndpointSlice
from ebpf_svc.model.net import Family
from ebpf_svc.model.service import Service, ServicePort, ServiceType, TrafficPolicy
from ebpf_svc.plan.place import Place

Candidates = Mapping[tuple[str, int], Endpoint]
"""The endpoints of one service port by (address, port)."""


class Choice(NamedTuple):
    """The endpoints a plan carries."""

    backends: tuple[Backend, ...]
    """Those in a list, and those draining (C5); sorted by (address, port)."""
    has_endpoints: bool
    """Some endpoint anywhere is usable (T6)."""


def is_external_local(service: Service) -> bool:
    """Whether externalTrafficPolicy Local counts for a service at all (F14)."""
    return service.external_policy is TrafficPolicy.LOCAL and (
        service.type in (ServiceType.LOAD_BALANCER, ServiceType.NODE_PORT)
        or (service.type is ServiceType.CLUSTER_IP and bool(service.external_ips))
    )


def is_externally_accessible(service: Service, port: ServicePort, family: Family) -> bool:
    """Whether a client outside may call a service port (F21).

    External IPs count even where the administrator forbids them.
    """
    if port.node_port:
        return True
    colon = family is Family.V6
    return any((":" in ip) is colon for ip in service.load_balancer_ips + service.external_ips)


def uses_cluster_endpoints(service: Service, port: ServicePort, family: Family) -> bool:
    """Whether a service port needs a Cluster list (F21); without, it has none, not an empty one."""
    return service.internal_policy is not TrafficPolicy.LOCAL or is_externally_accessible(
        service, port, family
    )


def uses_local_endpoints(service: Service, port: ServicePort, family: Family) -> bool:
    """Whether a service port needs a Local list (F21)."""
    return service.internal_policy is TrafficPolicy.LOCAL or (
        is_external_local(service) and is_externally_accessible(service, port, family)
    )


def candidates_of(
    slices: Collection[EndpointSlice], family: Family, port: ServicePort
) -> Candidates:
    """Join slices with a service port by port name and protocol (E3).

    One address and port is one endpoint (E8), whatever the order of the slices: see `_rank`.
    """
    found: dict[tuple[str, int], Endpoint] = {}
    for slice_ in slices:
        if slice_.family is not family:
            continue
        for name, protocol, number in slice_.ports:
            if name != port.name or protocol is not port.protocol or not number:
                continue
            for endpoint in slice_.endpoints:
                key = (endpoint.address, number)
                other = found.setdefault(key, endpoint)
                if other is not endpoint and _rank(endpoint) > _rank(other):
                    found[key] = endpoint
    return found


def _rank(endpoint: Endpoint) -> tuple[object, ...]:
    """Order duplicates: one that terminates never wins from one that does not (E8).

    Kube-proxy leaves the rest to chance; here every node and every restart agrees.
    """
    return (
        not endpoint.terminating,
        endpoint.ready,
        endpoint.serving,
        endpoint.node_name,
        sorted(endpoint.zone_hints),
        sorted(endpoint.node_hints),
    )


def choose(candidates: Candidates, *, cluster: bool, local: bool, place: Place) -> Choice:
    """Sort the endpoints of a service port into the lists this node needs.

    Ready endpoints win, those topology keeps away excepted (T2, T7). With none, those that still
    serve while terminating are used, so that a rolling restart loses no connection; the two lists
    fall back each for itself (T4).

    Args:
        candidates: every endpoint of the service port in the cluster.
        cluster: whether there is a Cluster list.
        local: whether there is a Local list; hints do not apply to it (T3).
        place: this node.
    """
    here = place.node_name or None  # an endpoint without a node name is not local (E6)
    ready = [endpoint for endpoint in candidates.values() if endpoint.ready]
    local_ready = local and any(endpoint.node_name == here for endpoint in ready)
    admits = _topology(ready, place) if cluster else None
    has_endpoints = bool(ready)
    backends = []
    for key in sorted(candidates):
        endpoint = candidates[key]
        in_cluster = in_local = False
        if endpoint.ready:
            in_cluster = cluster and (admits is None or admits(endpoint))
            in_local = local_ready and endpoint.node_name == here
        elif endpoint.serving and endpoint.terminating:
            has_endpoints = True
            in_cluster = cluster and not ready
            in_local = local and not local_ready and endpoint.node_name == here
        if in_cluster or in_local or endpoint.serving:
            backends.append(Backend(key[0], key[1], in_cluster, in_local))
    return Choice(tuple(backends), has_endpoints)


def _topology(ready: Collection[Endpoint], place: Place) -> Callable[[Endpoint], bool] | None:
    """Infer from the hints of the Ready endpoints which of them this node should use (T7-T9).

    Returns:
        What an endpoint of the Cluster list must satisfy; None when all will do.
    """
    node_name, zone = place.node_name, place.zone
    node_mode = zone_mode = bool(ready)
    node_seen = zone_seen = False
    for endpoint in ready:
        if not endpoint.node_hints:
            node_mode = False
        elif node_name in endpoint.node_hints:
            node_seen = True
        if not endpoint.zone_hints:
            zone_mode = False
        elif zone in endpoint.zone_hints:
            zone_seen = True
        if not (node_mode or zone_mode):
            return None
    if node_mode and node_seen and node_name:
        return lambda endpoint: node_name in endpoint.node_hints
    if zone_mode and zone_seen and zone:
        return lambda endpoint: zone in endpoint.zone_hints
    return None


def local_ready_count(slices: Collection[EndpointSlice], family: Family, place: Place) -> int:
    """Count distinct local addresses that are Ready, over all ports (H6).

    One that still serves while terminating does not count though it may get traffic: the health
    check must fail while connections still work.
    """
    here = place.node_name or None
    return len(
        {
            endpoint.address
            for slice_ in slices
            if slice_.family is family and slice_.ports
            for endpoint in slice_.endpoints
            if endpoint.ready and endpoint.node_name == here
        }
    )
