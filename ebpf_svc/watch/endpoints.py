"""Hand-written EndpointSlices and Endpoints, as slices of the model (rules E1-E8, W2).

Endpoints become the slices the mirroring controller would write for them.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable
from datetime import datetime

from ebpf_svc.model.endpoint import NO_HINTS, Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol, family_of
from ebpf_svc.model.service import ServiceName
from ebpf_svc.watch import raw
from ebpf_svc.watch.declared import PROTOCOLS, DeclaredEndpoints, DeclaredSlice, ObjectRef
from ebpf_svc.watch.faults import Faults, family_named, usable_address

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
SKIP_MIRROR_LABEL = "endpointslice.kubernetes.io/skip-mirror"
TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
MAX_ENDPOINTS = 1000
"""As many endpoints may one slice have."""


def declare_slice(ref: ObjectRef, item: raw.EndpointSlice, faults: Faults) -> DeclaredSlice | None:
    """Validate an EndpointSlice; None when `faults` says why it cannot be used."""
    meta = item.get("metadata") or {}
    faults.subdomain("metadata.name", ref.name)
    address_type = item.get("addressType") or ""
    if not address_type:
        faults.required("addressType")
        return None
    if not faults.supported("addressType", address_type, ("FQDN", "IPv4", "IPv6")):
        return None
    labels = meta.get("labels") or {}
    service = labels.get(SERVICE_NAME_LABEL, "")
    if address_type == "FQDN" or not service or HEADLESS_LABEL in labels:
        return DeclaredSlice(ref, None)
    family = family_named(address_type)
    entries = item.get("endpoints") or ()
    if len(entries) > MAX_ENDPOINTS:
        said = f"Too many: {len(entries)}: must have at most {MAX_ENDPOINTS} items"
        faults.add("endpoints", said)
        return None
    ports = _ports(item.get("ports") or (), "ports", faults, unnamed=1)
    endpoints = tuple(_endpoint(entry, i, family, faults) for i, entry in enumerate(entries))
    if faults:
        return None
    return DeclaredSlice(
        ref,
        EndpointSlice(
            namespace=ref.namespace,
            name=ref.name,
            service_name=ServiceName(ref.namespace, service),
            family=family,
            ports=ports,
            endpoints=endpoints,
            trigger_time_s=_trigger_time(meta),
        ),
    )


def _endpoint(entry: raw.Endpoint, index: int, family: Family, faults: Faults) -> Endpoint:
    texts = entry.get("addresses") or ()
    if not texts:
        said = "must contain at least 1 endpoint address"
        faults.required(f"endpoints[{index}].addresses", said)
    # All are checked, but only the first is used (E4).
    addresses = [usable_address(text) for text in texts]
    for i, address in enumerate(addresses):
        if not address or family_of(address) is not family:
            path = f"endpoints[{index}].addresses[{i}]"
            if faults.endpoint_address(path, texts[i]):
                faults.invalid(path, texts[i], f"must be an {family.label} address")
    conditions: raw.Conditions = entry.get("conditions") or {}
    hints: raw.Hints = entry.get("hints") or {}
    return Endpoint(
        address=addresses[0] if addresses else "",
        # E5: what is not said is true, except termination.
        ready=conditions.get("ready") is not False,
        serving=conditions.get("serving") is not False,
        terminating=conditions.get("terminating") is True,
        # A few names stand in a hundred thousand endpoints.
        node_name=sys.intern(entry.get("nodeName") or ""),
        zone_hints=_names(hints.get("forZones")),
        node_hints=_names(hints.get("forNodes")),
    )


def _names(hints: Iterable[raw.Named] | None) -> frozenset[str]:
    return frozenset(hint.get("name") or "" for hint in hints) if hints else NO_HINTS


def _ports(
    entries: Iterable[raw.EndpointPort], path: str, faults: Faults, *, unnamed: int
) -> tuple[EndpointPort, ...]:
    """Ports in the order written; at most `unnamed` may lack a name. Those without number serve
    every port to others than Services and are skipped (E3)."""
    names: set[str] = set()
    ports = []
    for i, entry in enumerate(entries):
        name, protocol = entry.get("name") or "", entry.get("protocol") or "TCP"
        if name:
            faults.label(f"{path}[{i}].name", name)
        elif not unnamed:
            faults.required(f"{path}[{i}].name")
        if name in names:
            faults.duplicate(f"{path}[{i}].name", name)
        names.add(name)
        known = faults.supported(f"{path}[{i}].protocol", protocol, PROTOCOLS)
        if number := entry.get("port"):
            faults.port(f"{path}[{i}].port", number)
            if known:
                ports.append(EndpointPort(sys.intern(name), Protocol(protocol), number))
    return tuple(ports)


def _trigger_time(meta: raw.Meta) -> float:
    """Seconds since the epoch (E10), 0 when not given or unreadable."""
    text = (meta.get("annotations") or {}).get(TRIGGER_TIME_ANNOTATION, "")
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def declare_endpoints(
    ref: ObjectRef, item: raw.Endpoints, faults: Faults
) -> DeclaredEndpoints | None:
    """Validate Endpoints; None when `faults` says why they cannot be used."""
    meta = item.get("metadata") or {}
    faults.subdomain("metadata.name", ref.name)
    service = ServiceName(ref.namespace, ref.name)
    found: dict[tuple[Family, tuple[EndpointPort, ...]], dict[str, Endpoint]] = {}
    for i, subset in enumerate(item.get("subsets") or ()):
        path = f"subsets[{i}]"
        if not subset.get("addresses") and not subset.get("notReadyAddresses"):
            faults.required(path, "must specify `addresses` or `notReadyAddresses`")
        entries = subset.get("ports") or ()
        ports = _ports(entries, f"{path}.ports", faults, unnamed=int(len(entries) == 1))
        for endpoint in _subset_endpoints(subset, path, faults):
            group = found.setdefault((family_of(endpoint.address), ports), {})
            # Ready addresses come first and win over a second mention.
            group.setdefault(endpoint.address, endpoint)
    if faults:
        return None
    mirrored = (meta.get("labels") or {}).get(SKIP_MIRROR_LABEL) != "true"
    slices = tuple(
        EndpointSlice(
            namespace=ref.namespace,
            name=slice_name(ref.name, family, ports),
            service_name=service,
            family=family,
            ports=ports,
            endpoints=tuple(endpoints.values()),
            trigger_time_s=_trigger_time(meta),
        )
        for (family, ports), endpoints in sorted(found.items(), key=lambda item: item[0])
        if ports and mirrored
    )
    return DeclaredEndpoints(ref, service, slices)


def _subset_endpoints(subset: raw.Subset, path: str, faults: Faults) -> Iterable[Endpoint]:
    lists = (
        ("addresses", subset.get("addresses"), True),
        ("notReadyAddresses", subset.get("notReadyAddresses"), False),
    )
    for field, entries, ready in lists:
        for i, entry in enumerate(entries or ()):
            address = faults.endpoint_address(f"{path}.{field}[{i}].ip", entry.get("ip") or "")
            if address:
                node_name = sys.intern(entry.get("nodeName") or "")
                yield Endpoint(address=address, ready=ready, node_name=node_name)


def slice_name(service: str, family: Family, ports: tuple[EndpointPort, ...]) -> str:
    """A stable name for a slice nobody wrote: it lives as long as its ports stay the same."""
    text = ",".join(f"{port.name}/{port.protocol}/{port.port}" for port in ports)
    return f"{service}-{family.label.lower()}-{zlib.crc32(text.encode()):08x}"
