"""What one service port needs in its family's table (X8-X11). Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import NamedTuple

from ebpf_svc.dataplane.netfilter.names import nft_name
from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.dataplane.nftables import layout as names
from ebpf_svc.dataplane.nftables.content import Chained, Content
from ebpf_svc.dataplane.nftables.frame import POD_TRAFFIC, match_pods
from ebpf_svc.dataplane.nftables.layout import (
    INDEX,
    Layout,
    end_key,
    goto,
    jump,
    node_port_key,
)
from ebpf_svc.dataplane.nftables.slots import End, Range
from ebpf_svc.host import nf_expr as nf
from ebpf_svc.host.nf_expr import (
    Cmp,
    Dynset,
    Expression,
    Fib,
    Immediate,
    Lookup,
    Meta,
    Nat,
    Numgen,
    Verdict,
)
from ebpf_svc.host.nf_tables import (
    DYNAMIC,
    INLINE,
    INTEGER,
    INTERVAL,
    INTERVAL_END,
    TIMEOUT,
    VERDICT,
    Chain,
    Element,
    Inline,
    Rule,
    Set,
)
from ebpf_svc.model.desired import Backend, Frontend, FrontendKind, ServicePlan
from ebpf_svc.model.net import Sources

KIND_WORDS = {
    FrontendKind.CLUSTER_IP: "cluster IP",
    FrontendKind.NODE_PORT: "node port",
    FrontendKind.EXTERNAL_IP: "external IP",
    FrontendKind.LOAD_BALANCER: "loadbalancer IP",
}
"""How comments end, after the service port (I18)."""
IS_LOCAL = (Fib(nf.FIB_TYPE, nf.FIB_SADDR), Cmp(nf.LOCAL.to_bytes(4, sys.byteorder)))


class Ranges(NamedTuple):
    """The numbers of a service port's two lists; None = an empty one, or affinity."""

    cluster: Range | None = None
    local: Range | None = None


def maps_of(ranges: Iterable[Ranges]) -> set[str]:
    """The maps of endpoints they need."""
    shards = {one.shard for both in ranges for one in both if one is not None}
    return set(map(names.endpoints_map_name, shards))


def cluster_ends(plan: ServicePlan) -> tuple[End, ...]:
    """The Cluster list (T2)."""
    return _ends(backend for backend in plan.backends if backend.in_cluster)


def local_ends(plan: ServicePlan) -> tuple[End, ...]:
    """The Local list (T3)."""
    return _ends(backend for backend in plan.backends if backend.in_local)


def is_served(plan: ServicePlan, frontend: Frontend) -> bool:
    """Whether some client of a frontend gets an endpoint."""
    to_cluster = frontend.local_for is not Sources.ALL
    to_local = frontend.local_for is not Sources.NONE
    return plan.has_endpoints and any(
        (to_cluster and backend.in_cluster) or (to_local and backend.in_local)
        for backend in plan.backends
    )


def is_unserved(frontend: Frontend) -> bool:
    """Whether it is a node port on ::1: no packet with that source leaves the loopback device."""
    return frontend.kind is FrontendKind.NODE_PORT and frontend.key.address == "::1"


def is_on_loopback(frontend: Frontend) -> bool:
    """Whether it is a node port on 127.0.0.1, which needs route_localnet (S7)."""
    return frontend.kind is FrontendKind.NODE_PORT and frontend.key.address.startswith("127.")


def render(plan: ServicePlan, layout: Layout, *, ranges: Ranges, pods: PodMatch | None) -> Content:
    """Chains, sets and elements of one service port.

    Args:
        plan: of the layout's family.
        layout: of the family.
        ranges: the numbers of its endpoints.
        pods: how a pod is told; None = it cannot be.
    """
    return _Rendering(plan, layout, ranges, pods).content


class _Rendering:
    """The chains of one service port, while they are made."""

    def __init__(
        self, plan: ServicePlan, layout: Layout, ranges: Ranges, pods: PodMatch | None
    ) -> None:
        self.content = Content()
        self._plan, self._layout, self._pods = plan, layout, pods
        port = plan.key.port_name
        self._text, self._protocol = str(port), port.protocol.number
        name = nft_name(port)
        self._service, self._local = f"service-{name}", f"local-{name}"
        self._external, self._firewall = f"external-{name}", f"firewall-{name}"
        self._cluster_ends, self._local_ends = cluster_ends(plan), local_ends(plan)
        self._lists(ranges)
        self._frontends()
        self._hairpins()

    # -- where traffic goes ------------------------------------------------------------------------

    def _lists(self, ranges: Ranges) -> None:
        lists = (
            (self._service, self._cluster_ends, ranges.cluster),
            (self._local, self._local_ends, ranges.local),
        )
        for chain, ends, numbers in lists:
            if not ends:
                continue
            if self._plan.affinity_s:
                self._chain(chain, self._affinity_rules(ends))
            elif numbers is not None:
                self._chain(chain, (self._balance(numbers),))
                for number, end in enumerate(numbers.ends, start=numbers.start):
                    self.content.put(
                        names.endpoints_map_name(numbers.shard),
                        Element(INDEX.pack(number), self._layout.end(*end)),
                    )
        if self._plan.affinity_s:
            for end in {*self._cluster_ends, *self._local_ends}:
                self._endpoint(end)

    def _balance(self, numbers: Range) -> Rule:
        layout = self._layout
        return Rule(
            (
                *self._is_protocol(),
                Numgen(len(numbers.ends), offset=numbers.start),
                Lookup(names.endpoints_map_name(numbers.shard), register=1),
                _translate(layout, layout.port_register),
            )
        )

    def _affinity_rules(self, ends: Sequence[End]) -> tuple[Rule, ...]:
        """A client that was here goes where it went, any other anywhere (X10, P13)."""
        chains = [self._end_name(end) for end in ends]
        verdicts = tuple(
            Element(INDEX.pack(number), goto(f"endpoint-{chain}"))
            for number, chain in enumerate(chains)
        )
        return (
            *(
                Rule(
                    (
                        self._layout.source(),
                        Lookup(f"affinity-{chain}"),
                        Immediate(goto(f"endpoint-{chain}")),
                    )
                )
                for chain in chains
            ),
            Rule(
                (Numgen(len(ends)), Lookup(INLINE, register=nf.VERDICT_REGISTER)),
                inline=Inline((INTEGER,), verdicts, (VERDICT,)),
            ),
        )

    def _endpoint(self, end: End) -> None:
        layout, name = self._layout, self._end_name(end)
        affinity = f"affinity-{name}"
        self.content.sets[affinity] = Set(
            affinity, (layout.address,), flags=DYNAMIC | TIMEOUT, timeout_s=self._plan.affinity_s
        )
        packed = layout.end(*end)
        at = layout.address.length
        port_register = nf.register(16)
        self._chain(
            f"endpoint-{name}",
            (
                Rule((layout.source(), Dynset(affinity))),
                Rule(
                    (
                        *self._is_protocol(),
                        Immediate(packed[:at], 1),
                        Immediate(packed[at : at + 2], port_register),
                        _translate(layout, port_register),
                    )
                ),
            ),
        )

    def _hairpins(self) -> None:
        """An endpoint that reaches itself is masqueraded (P9).

        Those of other nodes are in the set as well: the plan does not tell them apart, and no
        packet of theirs with both addresses alike comes by here.
        """
        for address, port in {*self._cluster_ends, *self._local_ends}:
            packed = self._layout.pack(address)
            self.content.share(names.HAIRPIN, packed + end_key(packed, self._protocol, port))

    # -- where it comes from -----------------------------------------------------------------------

    def _frontends(self) -> None:
        external: set[tuple[Sources, Sources]] = set()
        for frontend in self._plan.frontends:
            if is_unserved(frontend):
                continue
            if frontend.kind is FrontendKind.CLUSTER_IP:
                self.content.share(names.CLUSTER_IPS, self._layout.pack(frontend.key.address))
            elif frontend.kind is FrontendKind.NODE_PORT:
                self.content.share(names.NODEPORT_IPS, self._layout.pack(frontend.key.address))
            if frontend.source_ranges is not None:
                self._guard(frontend)
            if is_served(self._plan, frontend):
                if frontend.kind is FrontendKind.CLUSTER_IP:
                    to = self._local if frontend.local_for is Sources.ALL else self._service
                else:
                    to = self._external
                    external.add((frontend.local_for, frontend.masquerade_for))
                self._element(frontend, names.SERVICE_IPS, names.SERVICE_NODEPORTS, goto(to))
            if self._refuses_some(frontend):
                verdict = names.DROP if self._plan.has_endpoints else goto(names.REJECT)
                self._element(
                    frontend, names.NO_ENDPOINT_SERVICES, names.NO_ENDPOINT_NODEPORTS, verdict
                )
        for local_for, masquerade_for in sorted(external)[:1]:
            self._chain(self._external, self._external_rules(local_for, masquerade_for))

    def _refuses_some(self, frontend: Frontend) -> bool:
        """Whether some class of clients finds an empty list (P2-P4)."""
        to_cluster = frontend.local_for is not Sources.ALL
        to_local = frontend.local_for is not Sources.NONE
        return (
            not self._plan.has_endpoints
            or (to_cluster and not self._cluster_ends)
            or (to_local and not self._local_ends)
        )

    def _external_rules(self, local_for: Sources, masquerade_for: Sources) -> Iterator[Rule]:
        """X9: pods and the node itself are spared the Local list (P5)."""
        masquerade = Immediate(jump(names.MARK))
        to_cluster = Immediate(goto(self._service) if self._cluster_ends else names.RETURN)
        if local_for is Sources.NONE:
            if masquerade_for is not Sources.NONE:
                yield Rule((masquerade,), "masquerade")
            yield Rule((to_cluster,))
            return
        if not local_for & Sources.POD and self._pods is not None:
            yield Rule((*match_pods(self._layout, self._pods), to_cluster), POD_TRAFFIC)
        if masquerade_for & Sources.NODE:
            yield Rule((*IS_LOCAL, masquerade), "masquerade local traffic")
        yield Rule((*IS_LOCAL, to_cluster), "short-circuit local traffic")
        if self._local_ends:
            yield Rule((Immediate(goto(self._local)),))

    def _guard(self, frontend: Frontend) -> None:
        """Drop sources outside the ranges before they are translated (X11, P10)."""
        self._element(frontend, names.FIREWALL_IPS, "", goto(self._firewall))
        segments = _segments(frontend.source_ranges or ())
        match: tuple[Expression, ...] = ()
        inline = None
        if segments:
            match = (self._layout.source(), Lookup(INLINE, flags=nf.INVERT))
            inline = Inline((self._layout.address,), segments, flags=INTERVAL)
        self._chain(self._firewall, (Rule((*match, Immediate(names.DROP)), inline=inline),))

    def _element(self, frontend: Frontend, ips: str, node_ports: str, verdict: Verdict) -> None:
        port = frontend.key.port
        if frontend.kind is FrontendKind.NODE_PORT and node_ports:
            name, key = node_ports, node_port_key(self._protocol, port)
        else:
            address = self._layout.pack(frontend.key.address)
            name, key = ips, end_key(address, self._protocol, port)
        comment = f"{self._text} {KIND_WORDS[frontend.kind]}"
        self.content.put(name, Element(key, verdict, comment))

    # -- pieces ------------------------------------------------------------------------------------

    def _chain(self, name: str, rules: Iterable[Rule]) -> None:
        self.content.chains[name] = Chained(Chain(name), tuple(rules))

    def _end_name(self, end: End) -> str:
        return nft_name(self._plan.key.port_name, Backend(*end))

    def _is_protocol(self) -> tuple[Expression, ...]:
        return (Meta(nf.META_L4PROTO), Cmp(bytes((self._protocol,))))


def _ends(backends: Iterable[Backend]) -> tuple[End, ...]:
    return tuple((backend.address, backend.port) for backend in backends)


def _translate(layout: Layout, port_register: int) -> Nat:
    """To the address in register 1 and the port in that one."""
    return Nat(layout.table.family, 1, port_register, address_max=1, port_max=port_register)


def _segments(ranges: Iterable[str]) -> tuple[Element, ...]:
    """Prefixes as an interval set has them: each first address, and each behind a last one."""
    bounds: list[tuple[int, int]] = []
    size = 0
    for network in collapsed(ranges):
        size = network.max_prefixlen // 8
        first, behind = int(network[0]), int(network[-1]) + 1
        if bounds and bounds[-1][1] == first:
            first = bounds.pop()[0]
        bounds.append((first, behind))
    if not bounds:
        return ()
    elements = [Element(bytes(size), flags=INTERVAL_END)] if bounds[0][0] else []
    for first, behind in bounds:
        elements.append(Element(first.to_bytes(size, "big")))
        if behind >> (8 * size) == 0:
            elements.append(Element(behind.to_bytes(size, "big"), flags=INTERVAL_END))
    return tuple(sorted(elements, key=lambda element: (element.key, element.flags)))


def collapsed(ranges: Iterable[str]) -> list[IPv4Network | IPv6Network]:
    """The fewest prefixes of one family that cover the same addresses, sorted."""
    return list(collapse_addresses([ip_network(text) for text in ranges]))  # type: ignore[type-var]
