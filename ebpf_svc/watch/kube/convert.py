"""Objects of the API server as values of the model (rules F1-F18, E1-E8, N1, N5, N6, W4).

The API server has validated them, so nothing is refused as a whole for one wrong field: what cannot
be used is left out, as kube-proxy does, and `faults` says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache

from ebpf_svc.model.endpoint import NO_HINTS, Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol, canonical_prefix, family_of
from ebpf_svc.model.service import (
    Service,
    ServiceName,
    ServicePort,
    ServiceType,
    TrafficPolicy,
)
from ebpf_svc.model.snapshot import NodeFacts
from ebpf_svc.watch import raw
from ebpf_svc.watch.faults import Faults, parse_address
from ebpf_svc.watch.kube import wire
from ebpf_svc.watch.service import DEFAULT_AFFINITY_S, MAX_AFFINITY_S

TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"

_FAMILIES = {"IPv4": Family.V4, "IPv6": Family.V6}
_PROTOCOLS = {str(protocol): protocol for protocol in Protocol}
_TYPES = {str(type_): type_ for type_ in ServiceType}


def service_of(item: wire.Service, faults: Faults) -> Service:
    """A Service; headless ones and ExternalNames have no cluster IP (F1, F2)."""
    meta = item.get("metadata") or {}
    spec = item.get("spec") or {}
    kind = spec.get("type") or ServiceType.CLUSTER_IP
    if kind not in _TYPES:
        faults.supported("spec.type", kind, _TYPES)
    type_ = _TYPES.get(kind, ServiceType.CLUSTER_IP)
    return Service(
        name=ServiceName(meta.get("namespace") or "", meta.get("name") or ""),
        type=type_,
        ports=tuple(_service_ports(spec.get("ports") or (), faults)),
        cluster_ips=_cluster_ips(spec, type_, faults),
        external_ips=_addresses("spec.externalIPs", spec.get("externalIPs") or (), faults),
        load_balancer_ips=_load_balancer_ips(item, faults),
        source_ranges=_source_ranges(spec.get("loadBalancerSourceRanges") or (), faults),
        affinity_s=_affinity_s(spec, faults),
        internal_policy=_policy(spec.get("internalTrafficPolicy")),
        external_policy=_policy(spec.get("externalTrafficPolicy")),
        health_check_node_port=_port(
            "spec.healthCheckNodePort", spec.get("healthCheckNodePort"), faults
        ),
    )


def _service_ports(entries: Iterable[wire.ServicePort], faults: Faults) -> Iterator[ServicePort]:
    for i, entry in enumerate(entries):
        protocol = _PROTOCOLS.get(entry.get("protocol") or "TCP")
        port = entry.get("port") or 0
        if protocol is None:
            faults.supported(f"spec.ports[{i}].protocol", entry.get("protocol") or "", _PROTOCOLS)
        elif not 0 < port < 65536:
            faults.port(f"spec.ports[{i}].port", port)
        else:
            name = sys.intern(entry.get("name") or "")
            node_port = _port(f"spec.ports[{i}].nodePort", entry.get("nodePort"), faults)
            yield ServicePort(name, protocol, port, node_port)


def _port(field: str, number: int | None, faults: Faults) -> int:
    """A port number that may be left out; 0 = none."""
    if number and not 0 < number < 65536:
        faults.port(field, number)
        return 0
    return number or 0


def _cluster_ips(spec: wire.ServiceSpec, type_: ServiceType, faults: Faults) -> tuple[str, ...]:
    """The cluster IP of each family the Service has (F3), in the Service's order."""
    first = spec.get("clusterIP") or ""
    if type_ is ServiceType.EXTERNAL_NAME or first in ("", "None"):
        return ()
    families = spec.get("ipFamilies") or ()
    if not families:
        # Written before there were two families (F4).
        return _addresses("spec.clusterIP", (first,), faults)
    found: dict[Family, str] = {}
    for i, (label, text) in enumerate(zip(families, spec.get("clusterIPs") or (), strict=False)):
        for address in _addresses(f"spec.clusterIPs[{i}]", (text,), faults):
            family = family_of(address)
            if family is _FAMILIES.get(label):
                found.setdefault(family, address)
            else:
                said = f"expected an {label} value as indicated by `ipFamilies[{i}]`"
                faults.invalid(f"spec.clusterIPs[{i}]", text, said)
    return tuple(found.values())


def _addresses(field: str, texts: Iterable[str], faults: Faults) -> tuple[str, ...]:
    """Canonical addresses without repetition; blank ones vanish silently (F8, F17)."""
    stripped = (text.strip() for text in texts)
    parsed = [faults.address(field, text) for text in stripped if text]
    return tuple(dict.fromkeys(address for address in parsed if address))


def _load_balancer_ips(item: wire.Service, faults: Faults) -> tuple[str, ...]:
    """Addresses a load balancer delivers unchanged (F9): ipMode VIP or unset."""
    status = (item.get("status") or {}).get("loadBalancer") or {}
    vips = (
        entry.get("ip") or ""
        for entry in status.get("ingress") or ()
        if (entry.get("ipMode") or "VIP") == "VIP"
    )
    return _addresses("status.loadBalancer.ingress", vips, faults)


def _source_ranges(texts: Iterable[str], faults: Faults) -> tuple[str, ...]:
    """Canonical prefixes (F10, F17)."""
    prefixes = [
        faults.prefix("spec.loadBalancerSourceRanges", text.strip()) for text in texts if text
    ]
    return tuple(dict.fromkeys(prefix for prefix in prefixes if prefix))


def _affinity_s(spec: wire.ServiceSpec, faults: Faults) -> int:
    if spec.get("sessionAffinity") != "ClientIP":
        return 0
    config = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
    timeout_s = config.get("timeoutSeconds") or DEFAULT_AFFINITY_S
    if 0 < timeout_s <= MAX_AFFINITY_S:
        return timeout_s
    field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
    faults.invalid(field, timeout_s, f"must be greater than 0 and less than {MAX_AFFINITY_S}")
    return DEFAULT_AFFINITY_S


def _policy(word: str | None) -> TrafficPolicy:
    # Anything but Local spreads over the cluster (F13, F14).
    return TrafficPolicy.LOCAL if word == "Local" else TrafficPolicy.CLUSTER


def slice_of(item: wire.EndpointSlice, faults: Faults) -> EndpointSlice | None:
    """A slice; None when it belongs to no Service or to no IP family (E1, E2, M2)."""
    meta = item.get("metadata") or {}
    service = (meta.get("labels") or {}).get("kubernetes.io/service-name")
    if not service:
        return None
    family = _FAMILIES.get(item.get("addressType") or "")
    if family is None:
        faults.supported("addressType", item.get("addressType") or "", _FAMILIES)
        return None
    namespace = sys.intern(meta.get("namespace") or "")
    return EndpointSlice(
        namespace=namespace,
        name=meta.get("name") or "",
        service_name=ServiceName(namespace, service),
        family=family,
        ports=_slice_ports(item.get("ports") or (), faults),
        endpoints=tuple(_endpoints(item.get("endpoints") or (), family, faults)),
        trigger_time_s=_trigger_time_s(meta),
    )


def _slice_ports(entries: Iterable[raw.EndpointPort], faults: Faults) -> tuple[EndpointPort, ...]:
    """Ports that have a name and a number (E3)."""
    found = []
    for i, entry in enumerate(entries):
        name, protocol = entry.get("name"), entry.get("protocol") or "TCP"
        if name is None:
            faults.required(f"ports[{i}].name")
        elif protocol not in _PROTOCOLS:
            faults.supported(f"ports[{i}].protocol", protocol, _PROTOCOLS)
        elif number := _port(f"ports[{i}].port", entry.get("port"), faults):
            found.append((name, protocol, number))
    return _shared_ports(tuple(found))


@lru_cache(maxsize=4096)
def _shared_ports(ports: tuple[tuple[str, str, int], ...]) -> tuple[EndpointPort, ...]:
    """One object for the ports that ten thousand slices have in common."""
    return tuple(EndpointPort(sys.intern(n), _PROTOCOLS[proto], p) for n, proto, p in ports)


def _endpoints(
    entries: Iterable[raw.Endpoint], family: Family, faults: Faults
) -> Iterator[Endpoint]:
    for i, entry in enumerate(entries):
        texts = entry.get("addresses")
        if not texts:
            faults.required(f"endpoints[{i}].addresses", "must contain at least 1 address")
            continue
        try:
            # Only the first address is used (E4).
            address = parse_address(texts[0])
        except ValueError:
            faults.address(f"endpoints[{i}].addresses[0]", texts[0])
            continue
        if (":" in address) is not (family is Family.V6):
            said = f"must be an {family.label} address"
            faults.invalid(f"endpoints[{i}].addresses[0]", texts[0], said)
            continue
        conditions = entry.get("conditions") or {}
        hints = entry.get("hints") or {}
        yield Endpoint(
            address,
            # What is not said is true, except termination (E5).
            conditions.get("ready") is not False,
            conditions.get("serving") is not False,
            conditions.get("terminating") is True,
            sys.intern(entry.get("nodeName") or ""),
            _names(hints.get("forZones")) if hints else NO_HINTS,
            _names(hints.get("forNodes")) if hints else NO_HINTS,
        )


def _names(hints: Iterable[raw.Named] | None) -> frozenset[str]:
    return _shared_names(tuple(hint.get("name") or "" for hint in hints)) if hints else NO_HINTS


@lru_cache(maxsize=4096)
def _shared_names(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)


def _trigger_time_s(meta: wire.Meta) -> float:
    """Seconds since the epoch (E10); 0 when not given or unreadable."""
    annotations = meta.get("annotations") or {}
    text = annotations.get("endpoints.kubernetes.io/last-change-trigger-time")
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except (ValueError, OverflowError):
        return 0.0


def node_of(item: wire.Node, faults: Faults) -> NodeFacts:
    """This node: addresses (N1), zone (N5), whether load balancers may use it (N6)."""
    meta = item.get("metadata") or {}
    spec = item.get("spec") or {}
    entries = (item.get("status") or {}).get("addresses") or ()
    texts = [
        entry.get("address") or ""
        for kind in ("InternalIP", "ExternalIP")
        for entry in entries
        if entry.get("type") == kind
    ]
    cidrs = spec.get("podCIDRs") or [spec.get("podCIDR") or ""]
    doomed = any(taint.get("key") == TO_BE_DELETED_TAINT for taint in spec.get("taints") or ())
    return NodeFacts(
        name=meta.get("name") or "",
        addresses=_addresses("status.addresses", texts, faults),
        zone=(meta.get("labels") or {}).get("topology.kubernetes.io/zone") or "",
        pod_cidrs=_prefixes("spec.podCIDRs", cidrs, faults),
        eligible=not doomed and not meta.get("deletionTimestamp"),
    )


def service_cidrs_of(item: wire.ServiceCidr, faults: Faults) -> tuple[str, ...]:
    """The prefixes of a ServiceCIDR (W4)."""
    return _prefixes("spec.cidrs", (item.get("spec") or {}).get("cidrs") or (), faults)


def _prefixes(field: str, texts: Iterable[str], faults: Faults) -> tuple[str, ...]:
    found = []
    for text in texts:
        if text:
            try:
                found.append(canonical_prefix(text))
            except ValueError:
                faults.prefix(field, text)
    return tuple(found)
