"""What one service port wants of the kernel: virtual servers, addresses, elements of sets. Pure.

A virtual server has one list of real servers for whoever calls. It is the Local list where the
policy of the frontend says so for anybody, else, and when that list is empty, the Cluster list (V8:
in the other modes outside clients are dropped then).

A frontend without endpoints has no virtual server, and rules refuse what is sent there. IPVS would
refuse too (V9), but drops what the node itself sends, and answers TCP in a way that a socket which
is still connecting may miss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from ebpf_svc.config import Settings
from ebpf_svc.config.detect import detector_families
from ebpf_svc.dataplane.ipvs import sets
from ebpf_svc.dataplane.ipvs.sets import SetEntry, name_of
from ebpf_svc.host.ipset import Entry
from ebpf_svc.host.ipvs import HASH_PORT, PERSISTENT, Dest, ServerKey, Shape
from ebpf_svc.model.desired import (
    Backend,
    Frontend,
    FrontendKey,
    FrontendKind,
    FrontendView,
    HealthCheck,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol, Sources

LOOPBACK = ("127.0.0.1", "::1")
"""A packet from there cannot leave the node, so node ports do not answer there (V7)."""
_EXTERNAL = {
    FrontendKind.EXTERNAL_IP: (sets.EXTERNAL_IP, sets.EXTERNAL_IP_LOCAL),
    FrontendKind.LOAD_BALANCER: (sets.LOAD_BALANCER, sets.LOAD_BALANCER_LOCAL),
}
_HOST = {Family.V4: "/32", Family.V6: "/128"}

Dests = Mapping[Dest, int]
"""Real servers with their weights: 1, or 0 for those that get no new connections."""


@dataclass(frozen=True, slots=True)
class Server:
    """A virtual server with its real ones; one without any is not to be there (P2)."""

    shape: Shape
    dests: Dests


@dataclass(frozen=True, slots=True)
class Share:
    """All that a service port has in the kernel."""

    servers: Mapping[ServerKey, Server]
    addresses: Collection[str]
    """To be bound to kube-ipvs0."""
    entries: Collection[SetEntry]


NOTHING = Share({}, (), ())


@dataclass(frozen=True, slots=True)
class Options:
    """What of the settings changes shares."""

    scheduler: str = "rr"
    masquerade_all: bool = False
    detectors: frozenset[Family] = frozenset(Family)
    """Families in which pods can be told from others (D2)."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Options:
        return cls(settings.ipvs.scheduler, settings.masquerade_all, detector_families(settings))

    def shape(self, affinity_s: int) -> Shape:
        """How a virtual server chooses (V5, V6)."""
        flags = HASH_PORT if self.scheduler == "mh" else 0
        if affinity_s:
            flags |= PERSISTENT
        return Shape(self.scheduler, flags, affinity_s)

    def cluster_masquerade(self, family: Family) -> Sources:
        """Whose traffic to cluster IPs is masqueraded (V15, P8, D3)."""
        if self.masquerade_all:
            return Sources.ALL
        return Sources.NODE | Sources.EXTERNAL if family in self.detectors else Sources.NONE


def served(plan: ServicePlan) -> list[Frontend]:
    """The frontends of a plan that ipvs can serve."""
    return [each for each in plan.frontends if each.key.address not in LOOPBACK]


def chosen(plan: ServicePlan, frontend: Frontend) -> tuple[Backend, ...]:
    """The one list of a frontend (V8)."""
    if frontend.local_for:
        local = tuple(each for each in plan.backends if each.in_local)
        if local:
            return local
    return tuple(each for each in plan.backends if each.in_cluster)


def render(plan: ServicePlan, options: Options, elsewhere: Collection[str] = ()) -> Share:
    """Work a plan out.

    Args:
        plan: a service port.
        options: this node's.
        elsewhere: addresses other interfaces have; only cluster IPs are bound all the same (V4).
    """
    shape = options.shape(plan.affinity_s)
    by_list: dict[bool, Dests] = {}
    servers: dict[ServerKey, Server] = {}
    addresses: list[str] = []
    entries: list[SetEntry] = []
    for frontend in served(plan):
        key, kind = frontend.key, frontend.kind
        is_local = bool(frontend.local_for)
        if is_local not in by_list:
            by_list[is_local] = _dests(plan, frontend)
        servers[ServerKey(*key)] = Server(shape, by_list[is_local])
        entries += _membership(frontend, plan.key.family)
        if not any(by_list[is_local].values()):
            here = Entry(key.address, key.protocol.number, key.port)
            entries.append((name_of(sets.NO_ENDPOINTS, plan.key.family), here))
        if kind is FrontendKind.NODE_PORT:
            continue
        if kind is FrontendKind.CLUSTER_IP or key.address not in elsewhere:
            addresses.append(key.address)
            address = Entry(key.address)
            entries.append((name_of(sets.IPVS_IPS, plan.key.family), address))
    if servers:
        entries += _hairpins(plan)
    return Share(servers, addresses, entries)


def _dests(plan: ServicePlan, frontend: Frontend) -> Dests:
    """Endpoints of the list; beside them, resting, those whose UDP flows are to stay (C5).

    TCP's that leave rest as long as they have connections, and without any not at all.
    """
    found = {Dest(each.address, each.port): 1 for each in chosen(plan, frontend)}
    if plan.key.port_name.protocol is Protocol.TCP:
        return found
    for each in plan.backends:
        if not each.in_cluster and not each.in_local:
            found.setdefault(Dest(each.address, each.port), 0)
    return found


def _hairpins(plan: ServicePlan) -> Iterator[SetEntry]:
    """Endpoints that may reach themselves (V10)."""
    name = name_of(sets.LOOP_BACK, plan.key.family)
    protocol = plan.key.port_name.protocol.number
    for each in plan.backends:
        yield name, Entry(each.address, protocol, each.port, each.address)


def _membership(frontend: Frontend, family: Family) -> Iterator[SetEntry]:
    """The sets a frontend is in (V13)."""
    address, port, protocol = frontend.key
    here = Entry(address, protocol.number, port)
    is_local = frontend.masquerade_for is not Sources.ALL
    if frontend.kind is FrontendKind.CLUSTER_IP:
        yield name_of(sets.CLUSTER_IP, family), here
    elif frontend.kind is FrontendKind.NODE_PORT:
        element = here if protocol is Protocol.SCTP else Entry(port=port)
        yield name_of(sets.NODE_PORT[protocol], family), element
        if is_local:
            yield name_of(sets.NODE_PORT_LOCAL[protocol], family), element
    elif frontend.kind is FrontendKind.EXTERNAL_IP:
        yield name_of(_EXTERNAL[frontend.kind][is_local], family), here
    else:
        yield name_of(sets.LOAD_BALANCER, family), here
        if is_local:
            yield name_of(sets.LOAD_BALANCER_LOCAL, family), here
        if frontend.source_ranges is not None:
            yield name_of(sets.LOAD_BALANCER_FW, family), here
            for prefix in frontend.source_ranges:
                if prefix == address + _HOST[family]:
                    other = Entry(address, protocol.number, port, address)
                    yield name_of(sets.SOURCE_IP, family), other
                else:
                    other = Entry(address, protocol.number, port, prefix)
                    yield name_of(sets.SOURCE_CIDR, family), other


def health_entries(checks: Collection[HealthCheck]) -> set[SetEntry]:
    """Ports of health checks, which the firewall of VIPs lets through (H2)."""
    return {(name_of(sets.HEALTH_CHECK, check.family), Entry(port=check.port)) for check in checks}


def view(plan: ServicePlan, options: Options) -> Iterator[tuple[FrontendKey, FrontendView]]:
    """A plan less what IPVS has no place for: one list for all sources, and no names of lists."""
    for frontend in served(plan):
        if frontend.kind is FrontendKind.CLUSTER_IP:
            masquerade = options.cluster_masquerade(plan.key.family)
        else:
            is_all = frontend.masquerade_for is Sources.ALL
            masquerade = Sources.ALL if is_all else Sources.NODE
        backends = [(each.address, each.port) for each in chosen(plan, frontend)]
        shown = replace(frontend, local_for=Sources.NONE, masquerade_for=masquerade)
        yield frontend.key, seen(shown, backends, plan.affinity_s)


def seen(
    frontend: Frontend, backends: Collection[tuple[str, int]], affinity_s: int
) -> FrontendView:
    """A frontend as this kernel can tell of it; one that refuses remembers nobody."""
    listed = tuple(Backend(address, port) for address, port in sorted(backends))
    return FrontendView(frontend, listed, bool(listed), affinity_s if listed else 0)
