"""Virtual servers and sets, told in the words of the model. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ebpf_svc.dataplane.inspect import FlowCounts
from ebpf_svc.dataplane.ipvs import sets
from ebpf_svc.dataplane.ipvs.render import Options, seen
from ebpf_svc.dataplane.ipvs.sets import name_of
from ebpf_svc.dataplane.ipvs.state import Found
from ebpf_svc.host.ipset import Entry
from ebpf_svc.host.ipvs import RealServer, ServerKey
from ebpf_svc.model.desired import Frontend, FrontendKey, FrontendKind, FrontendView, ServicePlan
from ebpf_svc.model.net import Family, Protocol, Sources, family_of


def views(found: Found, options: Options) -> dict[FrontendKey, FrontendView]:
    """Every frontend that is in one of our sets; virtual servers of others are not ours to tell."""
    ranges = _source_ranges(found)
    refusing = {
        _key(entry)
        for family in Family
        for entry in found.sets.get(name_of(sets.NO_ENDPOINTS, family), ())
    }
    result = {}
    for key in found.shapes.keys() | refusing:
        kind = _kind(found, key)
        if kind is None:
            continue
        backends = [real.dest for real in found.reals.get(key, ()) if real.weight]
        shape = found.shapes.get(key)
        masquerade = _masquerade(found, key, kind, options)
        frontend = Frontend(
            FrontendKey(*key), kind, masquerade_for=masquerade, source_ranges=ranges.get(key)
        )
        result[frontend.key] = seen(frontend, backends, shape.persistence_s if shape else 0)
    return result


def flow_counts(
    plans: Iterable[ServicePlan], reals: Mapping[ServerKey, list[RealServer]]
) -> FlowCounts:
    """Connections of every state through the virtual servers of each service port.

    Those of service ports that are gone went with their virtual servers.
    """
    by_port = {}
    for plan in plans:
        count = sum(
            real.connection_count
            for frontend in plan.frontends
            for real in reals.get(ServerKey(*frontend.key), ())
        )
        if count:
            by_port[plan.key] = count
    return FlowCounts(by_port, {})


def _has(found: Found, short: str, family: Family, entry: Entry) -> bool:
    return entry in found.sets.get(name_of(short, family), ())


def _node_port_entry(key: ServerKey) -> Entry:
    if key.protocol is Protocol.SCTP:
        return Entry(key.address, key.protocol.number, key.port)
    return Entry(port=key.port)


def _kind(found: Found, key: ServerKey) -> FrontendKind | None:
    family = family_of(key.address)
    here = Entry(key.address, key.protocol.number, key.port)
    for short, kind in (
        (sets.CLUSTER_IP, FrontendKind.CLUSTER_IP),
        (sets.LOAD_BALANCER, FrontendKind.LOAD_BALANCER),
        (sets.EXTERNAL_IP, FrontendKind.EXTERNAL_IP),
        (sets.EXTERNAL_IP_LOCAL, FrontendKind.EXTERNAL_IP),
    ):
        if _has(found, short, family, here):
            return kind
    if _has(found, sets.NODE_PORT[key.protocol], family, _node_port_entry(key)):
        return FrontendKind.NODE_PORT
    return None


def _masquerade(found: Found, key: ServerKey, kind: FrontendKind, options: Options) -> Sources:
    family = family_of(key.address)
    if kind is FrontendKind.CLUSTER_IP:
        return options.cluster_masquerade(family)
    here = Entry(key.address, key.protocol.number, key.port)
    short = {
        FrontendKind.NODE_PORT: sets.NODE_PORT_LOCAL[key.protocol],
        FrontendKind.EXTERNAL_IP: sets.EXTERNAL_IP_LOCAL,
        FrontendKind.LOAD_BALANCER: sets.LOAD_BALANCER_LOCAL,
    }[kind]
    entry = _node_port_entry(key) if kind is FrontendKind.NODE_PORT else here
    return Sources.NODE if _has(found, short, family, entry) else Sources.ALL


def _source_ranges(found: Found) -> Mapping[ServerKey, tuple[str, ...]]:
    """VIPs that are filtered, with the prefixes that may connect."""
    ranges: dict[ServerKey, set[str]] = {}
    for family, bits in ((Family.V4, 32), (Family.V6, 128)):
        for entry in found.sets.get(name_of(sets.LOAD_BALANCER_FW, family), ()):
            ranges[_key(entry)] = set()
        for short in (sets.SOURCE_CIDR, sets.SOURCE_IP):
            for entry in found.sets.get(name_of(short, family), ()):
                other = entry.other if "/" in entry.other else f"{entry.other}/{bits}"
                ranges.setdefault(_key(entry), set()).add(other)
    return {key: tuple(sorted(prefixes)) for key, prefixes in ranges.items()}


def _key(entry: Entry) -> ServerKey:
    return ServerKey(entry.address, entry.port, Protocol.from_number(entry.protocol))
