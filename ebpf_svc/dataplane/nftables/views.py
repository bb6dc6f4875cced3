"""What a table says in the words of the model, and what of a plan it can say. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address, summarize_address_range
from typing import NamedTuple

from ebpf_svc.dataplane.netfilter.names import nft_name
from ebpf_svc.dataplane.nftables import layout as names
from ebpf_svc.dataplane.nftables.adopt import balanced
from ebpf_svc.dataplane.nftables.frame import POD_TRAFFIC
from ebpf_svc.dataplane.nftables.layout import INDEX, Layout, unpack_port
from ebpf_svc.dataplane.nftables.render import (
    KIND_WORDS,
    collapsed,
    is_served,
    is_unserved,
)
from ebpf_svc.dataplane.nftables.slots import End
from ebpf_svc.host import nf_expr as nf
from ebpf_svc.host.nf_dump import Held
from ebpf_svc.host.nf_expr import Immediate, Lookup, Verdict
from ebpf_svc.host.nf_tables import INTERVAL_END, Element, Rule
from ebpf_svc.model.desired import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKey,
    FrontendKind,
    FrontendView,
)
from ebpf_svc.model.net import Protocol, Sources
from ebpf_svc.model.service import ServicePortName

Views = dict[FrontendKey, FrontendView]
_KINDS = {words: kind for kind, words in KIND_WORDS.items()}


def view(desired: DesiredState) -> Views:
    """What `read` finds once a state is written.

    Left out are node ports on ::1, draining backends, and of frontends that refuse or drop all how
    they would treat whom.
    """
    views: Views = {}
    for plan in desired.plans.values():
        backends = tuple(each for each in plan.backends if each.in_cluster or each.in_local)
        affinity_s = plan.affinity_s if backends else 0
        for frontend in plan.frontends:
            if is_unserved(frontend):
                continue
            kept = replace(frontend, source_ranges=_canonical(frontend.source_ranges))
            if not is_served(plan, frontend):
                kept = replace(kept, local_for=Sources.NONE, masquerade_for=Sources.NONE)
            views[frontend.key] = FrontendView(kept, backends, plan.has_endpoints, affinity_s)
    return views


def read(held: Held, layout: Layout) -> Views:
    """Every frontend of a table."""
    return _Reading(held, layout).views()


def _canonical(ranges: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if ranges is None else tuple(sorted(str(each) for each in collapsed(ranges)))


class _Found(NamedTuple):
    """One frontend among the maps."""

    key: FrontendKey
    kind: FrontendKind
    port_name: ServicePortName


class _Reading:
    """One table, while it is read."""

    def __init__(self, held: Held, layout: Layout) -> None:
        self._held, self._layout = held, layout
        self._node_ips = [layout.unpack(key) for key in held.elements.get(names.NODEPORT_IPS, {})]
        self._lists: dict[str, tuple[tuple[Backend, ...], int]] = {}
        self._cluster_ip_masquerade = self._masquerade_of_cluster_ips()

    def views(self) -> Views:
        to = dict(self._frontends(names.SERVICE_IPS, names.SERVICE_NODEPORTS))
        refused = dict(self._frontends(names.NO_ENDPOINT_SERVICES, names.NO_ENDPOINT_NODEPORTS))
        return {
            found.key: self._view(found, to.get(found), refused.get(found))
            for found in to.keys() | refused.keys()
        }

    def _frontends(self, ips: str, node_ports: str) -> Iterator[tuple[_Found, Verdict]]:
        elements = self._held.elements
        at = self._layout.address.length
        by_ip = elements.get(ips, {})
        for key, element in by_ip.items():
            address, protocol, port = self._layout.unpack(key), key[at], unpack_port(key[at + 4 :])
            yield from self._found(
                FrontendKey(address, port, Protocol.from_number(protocol)), element
            )
        taken = by_ip.keys() | elements.get(names.NO_ENDPOINT_SERVICES, {}).keys()
        taken |= elements.get(names.SERVICE_IPS, {}).keys()
        for key, element in elements.get(node_ports, {}).items():
            for address in self._node_ips:
                if self._layout.pack(address) + key not in taken:
                    end = FrontendKey(address, unpack_port(key[4:]), Protocol.from_number(key[0]))
                    yield from self._found(end, element)

    def _found(self, key: FrontendKey, element: Element) -> Iterator[tuple[_Found, Verdict]]:
        """Nothing for an element that is not ours."""
        text, _, words = element.comment.rpartition(" ")
        text, _, first = text.rpartition(" ")
        kind = _KINDS.get(f"{first} {words}")
        namespace, slash, name = text.partition("/")
        if kind is None or not slash or not isinstance(element.value, Verdict):
            return
        name, _, port = name.partition(":")
        yield _Found(key, kind, ServicePortName(namespace, name, port, key.protocol)), element.value

    def _view(self, found: _Found, to: Verdict | None, refused: Verdict | None) -> FrontendView:
        name = nft_name(found.port_name)
        local_for = masquerade_for = Sources.NONE
        if to is not None:
            local_for, masquerade_for = self._treatment(found, to)
        at = self._layout.pack(found.key.address)
        end = at + names.node_port_key(found.key.protocol.number, found.key.port)
        guarded = end in self._held.elements.get(names.FIREWALL_IPS, {})
        frontend = Frontend(
            found.key,
            found.kind,
            local_for,
            masquerade_for,
            self._ranges(f"firewall-{name}") if guarded else None,
        )
        backends, affinity_s = self._backends(name)
        has_endpoints = refused is None or refused == names.DROP
        return FrontendView(frontend, backends, has_endpoints, affinity_s)

    def _treatment(self, found: _Found, to: Verdict) -> tuple[Sources, Sources]:
        if not to.chain.startswith("external-"):
            is_local = to.chain.startswith("local-")
            local_for = Sources.ALL if is_local else Sources.NONE
            return local_for, self._cluster_ip_masquerade
        rules = self._held.rules.get(to.chain, ())
        first = rules[0].expressions if rules else ()
        spares_pods = any(rule.comment == POD_TRAFFIC for rule in rules)
        masquerades = [rule for rule in rules if _leads_to(rule, names.MARK)]
        if len(first) == 1:  # for everybody
            return Sources.NONE, Sources.ALL if masquerades else Sources.NONE
        local_for = Sources.EXTERNAL if spares_pods else Sources.POD | Sources.EXTERNAL
        return local_for, Sources.NODE if masquerades else Sources.NONE

    def _masquerade_of_cluster_ips(self) -> Sources:
        for rule in self._held.rules.get(names.SERVICES, ()):
            if _leads_to(rule, names.MARK):
                # Destination, set, jump; a pod match comes between.
                is_all = len(rule.expressions) == 3
                return Sources.ALL if is_all else Sources.NODE | Sources.EXTERNAL
        return Sources.NONE

    def _backends(self, name: str) -> tuple[tuple[Backend, ...], int]:
        if name not in self._lists:
            cluster, cluster_s = self._ends(f"service-{name}")
            local, local_s = self._ends(f"local-{name}")
            backends = tuple(
                Backend(*end, in_cluster=end in cluster, in_local=end in local)
                for end in sorted(cluster | local)
            )
            self._lists[name] = backends, cluster_s or local_s
        return self._lists[name]

    def _ends(self, chain: str) -> tuple[frozenset[End], int]:
        """The endpoints a chain chooses from, and its affinity in seconds."""
        rules = self._held.rules.get(chain, ())
        balance = balanced(rules)
        if balance is not None:
            elements: Mapping[bytes, Element] = self._held.elements[balance[0]]
            values = (elements[key].value for key in map(INDEX.pack, balance[1]) if key in elements)
            ends = (self._layout.unpack_end(each) for each in values if isinstance(each, bytes))
            return frozenset(ends), 0
        found, affinity_s = set(), 0
        for rule in rules:
            for each in rule.expressions:
                if isinstance(each, Lookup) and each.set in self._held.sets:
                    affinity_s = self._held.sets[each.set].timeout_s
            for element in rule.inline.elements if rule.inline is not None else ():
                if isinstance(element.value, Verdict):
                    found.add(self._end_of(element.value.chain))
        return frozenset(found), affinity_s

    def _end_of(self, chain: str) -> End:
        """Where an endpoint's chain leads."""
        values = [
            each.data
            for rule in self._held.rules.get(chain, ())
            for each in rule.expressions
            if isinstance(each, Immediate) and isinstance(each.data, bytes)
        ]
        address, port = values
        return self._layout.unpack(address), unpack_port(port)

    def _ranges(self, chain: str) -> tuple[str, ...]:
        rules = self._held.rules.get(chain, ())
        inline = rules[0].inline if rules else None
        return _prefixes(inline.elements) if inline is not None else ()


def _leads_to(rule: Rule, chain: str) -> bool:
    last = rule.expressions[-1]
    return isinstance(last, Immediate) and last.data == Verdict(nf.JUMP, chain)


def _prefixes(elements: tuple[Element, ...]) -> tuple[str, ...]:
    """The prefixes of an interval set."""
    found: list[str] = []
    first: int | None = None
    size = len(elements[0].key)
    bounds = [(int.from_bytes(each.key, "big"), each.flags) for each in elements]
    bounds.append((1 << (8 * size), INTERVAL_END))
    for number, flags in bounds:
        if not flags & INTERVAL_END:
            first = number
        elif first is not None:
            start, last = (ip_address(each.to_bytes(size, "big")) for each in (first, number - 1))
            found += (str(each) for each in summarize_address_range(start, last))
            first = None
    return tuple(sorted(found))
