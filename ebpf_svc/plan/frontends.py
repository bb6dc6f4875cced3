"""Where a service port can be called, and how each class of clients is treated there.

Pure. Rules F1-F11 (fields), P1-P10 (traffic), D1-D3 (what a pod is).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from ebpf_svc.model.desired import Frontend, FrontendKey, FrontendKind
from ebpf_svc.model.net import Family, Sources, family_of, is_inside, parse_prefix
from ebpf_svc.model.service import Service, ServicePort, TrafficPolicy
from ebpf_svc.plan.endpoints import is_external_local
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.place import Addresses

_NOBODY = Sources.NONE
_NOT_PODS = Sources.NODE | Sources.EXTERNAL
_NOT_NODE = Sources.POD | Sources.EXTERNAL


class Treatment(NamedTuple):
    """The traffic matrix of one frontend: a column of kube-proxy's, solved for each class."""

    local_for: Sources
    masquerade_for: Sources


class Matrix:
    """The traffic matrix of one family on this node."""

    def __init__(self, *, detector: bool, masquerade_all: bool) -> None:
        masquerade = _NOBODY
        if masquerade_all:
            masquerade = Sources.ALL  # D3
        elif detector:
            masquerade = _NOT_PODS  # P8
        self._internal = Treatment(_NOBODY, masquerade)
        self._internal_local = Treatment(Sources.ALL, masquerade)
        self._external = Treatment(_NOBODY, Sources.ALL)  # P6
        # Pods and the node are spared the Local list (P5), but without a detector a pod looks like
        # anyone else (D2).
        self._external_local = Treatment(Sources.EXTERNAL if detector else _NOT_NODE, Sources.NODE)

    def internal(self, service: Service) -> Treatment:
        """How the ClusterIP treats its clients: internalTrafficPolicy alone decides (P1)."""
        if service.internal_policy is TrafficPolicy.LOCAL:
            return self._internal_local
        return self._internal

    def external(self, service: Service) -> Treatment:
        """How NodePorts, external IPs and VIPs do: externalTrafficPolicy alone decides (P1)."""
        return self._external_local if is_external_local(service) else self._external


def frontends_of(
    service: Service,
    port: ServicePort,
    family: Family,
    *,
    addresses: Addresses,
    matrix: Matrix,
    options: PlanOptions,
) -> tuple[Frontend, ...]:
    """List the frontends of a service port in one family, sorted by key.

    An address that two fields of the Service name is one frontend, of the kind that is listed
    first here: a VIP keeps its source ranges although it is an external IP as well.
    """
    cluster_ip = service.cluster_ip(family)
    if cluster_ip is None:
        return ()  # F3: without a cluster IP the family ignores the service wholly
    number, protocol = port.port, port.protocol
    treatment = matrix.internal(service)
    key = FrontendKey(cluster_ip, number, protocol)
    first = Frontend(key, FrontendKind.CLUSTER_IP, *treatment)
    if not (port.node_port or service.load_balancer_ips or service.external_ips):
        return (first,)
    found = {key: first}
    treatment = matrix.external(service)
    vips = [ip for ip in service.load_balancer_ips if family_of(ip) is family]
    if vips:
        ranges = source_ranges(service, family, vips=vips, node_ip=addresses.node_ip)
        for address in vips:
            key = FrontendKey(address, number, protocol)
            found.setdefault(key, Frontend(key, FrontendKind.LOAD_BALANCER, *treatment, ranges))
    for address in service.external_ips:
        if family_of(address) is family and is_inside(address, options.external_ip_ranges):
            key = FrontendKey(address, number, protocol)
            found.setdefault(key, Frontend(key, FrontendKind.EXTERNAL_IP, *treatment))
    if port.node_port:
        for address in addresses.node_ports:
            key = FrontendKey(address, port.node_port, protocol)
            found.setdefault(key, Frontend(key, FrontendKind.NODE_PORT, *treatment))
    return tuple(found[key] for key in sorted(found))


def source_ranges(
    service: Service, family: Family, *, vips: Iterable[str], node_ip: str | None
) -> tuple[str, ...] | None:
    """Say which sources may connect to a service's VIPs of one family; None = all (F10, F11).

    If the node may, so may the VIPs themselves (P10): an address of the node's own may be what a
    process on it uses as source.
    """
    ranges = {text for text in service.source_ranges if family_of(text) is family}
    prefixes = [parse_prefix(text) for text in ranges]
    if not ranges or any(prefix.prefixlen == 0 for prefix in prefixes):
        return None
    if node_ip is not None:
        address = ipaddress.ip_address(node_ip)
        if any(address in prefix for prefix in prefixes):
            ranges.update(f"{vip}/{address.max_prefixlen}" for vip in vips)
    return tuple(sorted(ranges))
