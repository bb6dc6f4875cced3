"""Read saved rules back into the words of the model, and say what of a plan rules can tell. Pure.

Rules are the truth; comments are heeded only to tell an external IP from a VIP. What the kernel has
no place for (see `view`): endpoints that drain, and whatever there is to a frontend that refuses or
drops everybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ebpf_svc.dataplane.iptables import chains
from ebpf_svc.dataplane.iptables.chains import FILTER, NAT
from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.dataplane.iptables.services import is_dropped, served_frontends
from ebpf_svc.host.iptables import Table
from ebpf_svc.model.desired import (
    Backend,
    Frontend,
    FrontendKey,
    FrontendKind,
    FrontendView,
    ServicePlan,
)
from ebpf_svc.model.net import Protocol, Sources

_PORT = re.compile(r"-p (\w+) .*--dport (\d+)")
_TO = re.compile(r"(?<!! )-d ([^/ ]+)/(?:32|128) ")
_FROM = re.compile(r"(?<!! )-s (\S+)")
_JUMP = re.compile(r"-j (\S+)")
_DNAT = re.compile(r"--to-destination \[?([^\]\s]+?)\]?:(\d+)$")
_SECONDS = re.compile(r"--seconds (\d+)")
_LOCAL = "--dst-type LOCAL"


def view(
    plans: Iterable[ServicePlan], options: RuleOptions
) -> Iterator[tuple[FrontendKey, FrontendView]]:
    """What `read` finds once these plans of one family are written."""
    for plan in plans:
        backends = tuple(each for each in plan.backends if each.in_cluster or each.in_local)
        affinity_s = plan.affinity_s if options.has_recent else 0
        for frontend in served_frontends(plan, options):
            key, kind = frontend.key, frontend.kind
            is_internal = kind is FrontendKind.CLUSTER_IP
            if not plan.has_endpoints:
                yield key, _unserved(key, kind, has_endpoints=False)
            elif is_internal and is_dropped(plan, frontend):
                yield key, _unserved(key, kind, has_endpoints=True)
            else:
                yield key, FrontendView(frontend, backends, True, affinity_s)


def _unserved(key: FrontendKey, kind: FrontendKind, *, has_endpoints: bool) -> FrontendView:
    """A frontend that nobody gets through; of external addresses no rule tells which they are."""
    if kind is FrontendKind.LOAD_BALANCER:
        kind = FrontendKind.EXTERNAL_IP
    return FrontendView(Frontend(key, kind), (), has_endpoints, 0)


def read(tables: Mapping[str, Table]) -> dict[FrontendKey, FrontendView]:
    """Frontends that the rules of one family make."""
    return _Reader(tables).read()


@dataclass(slots=True)
class _Group:
    """What the chains of one service port say."""

    backends: tuple[Backend, ...] = ()
    affinity_s: int = 0


@dataclass(slots=True)
class _Reader:
    tables: Mapping[str, Table]
    rules: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    groups: dict[str, _Group] = field(default_factory=dict)
    """By the hash in the names of a service port's chains."""

    def read(self) -> dict[FrontendKey, FrontendView]:
        for name in (FILTER, NAT):
            by_chain = self.rules.setdefault(name, {})
            for rule in self.tables[name].rules if name in self.tables else ():
                by_chain.setdefault(rule.chain, []).append(rule.text)
        found: dict[FrontendKey, FrontendView] = {}
        for make in (self._addresses, self._refused, self._node_ports):
            for frontend in make():
                found.setdefault(frontend.frontend.key, frontend)
        return found

    def _chain(self, name: str, table: str = NAT) -> list[str]:
        return self.rules[table].get(name, [])

    def _addresses(self) -> Iterator[FrontendView]:
        for rule in self._chain(chains.SERVICES):
            to, target = _TO.search(rule), _target(rule)
            port = _port(rule)
            if to and port and chains.is_per_service(target):
                key = FrontendKey(to[1], port[1], port[0])
                if target.startswith(("KUBE-SVC-", "KUBE-SVL-")):
                    yield self._served(self._internal(key, target), target)
                else:
                    yield self._served(self._external(key, rule, target), target)

    def _internal(self, key: FrontendKey, chain: str) -> Frontend:
        masquerade = Sources.NONE
        for rule in self._chain(chain):
            if _target(rule) == chains.MARK_MASQ:
                is_limited = "! -s " in rule or "! -i " in rule
                masquerade = Sources.NODE | Sources.EXTERNAL if is_limited else Sources.ALL
        local = Sources.ALL if chain.startswith("KUBE-SVL-") else Sources.NONE
        return Frontend(key, FrontendKind.CLUSTER_IP, local, masquerade)

    def _external(self, key: FrontendKey, rule: str, chain: str) -> Frontend:
        is_vip = ' loadbalancer IP"' in rule
        kind = FrontendKind.LOAD_BALANCER if is_vip else FrontendKind.EXTERNAL_IP
        frontend = self._treated(key, kind, _hash(chain))
        if not chain.startswith("KUBE-FW-"):
            return frontend
        sources = (_FROM.search(each) for each in self._chain(chain))
        return replace(frontend, source_ranges=tuple(sorted(each[1] for each in sources if each)))

    def _treated(self, key: FrontendKey, kind: FrontendKind, hashed: str) -> Frontend:
        """How KUBE-EXT-x treats its clients (I9)."""
        rules = self._chain(f"KUBE-EXT-{hashed}")
        from_node = [rule for rule in rules if "--src-type LOCAL" in rule]
        if not from_node:
            is_masquerading = any(_target(rule) == chains.MARK_MASQ for rule in rules)
            masquerade = Sources.ALL if is_masquerading else Sources.NONE
            return Frontend(key, kind, Sources.NONE, masquerade)
        spares_pods = any(" -s " in rule or " -i " in rule for rule in rules)
        local = Sources.EXTERNAL if spares_pods else Sources.POD | Sources.EXTERNAL
        return Frontend(key, kind, local, Sources.NODE)

    def _refused(self) -> Iterator[FrontendView]:
        for chain, kind in (
            (chains.SERVICES, FrontendKind.CLUSTER_IP),
            (chains.EXTERNAL_SERVICES, FrontendKind.EXTERNAL_IP),
        ):
            for rule in self._chain(chain, FILTER):
                to, port, target = _TO.search(rule), _port(rule), _target(rule)
                if to is None or port is None or target not in ("REJECT", "DROP"):
                    continue
                is_node_port = _LOCAL in rule
                if target == "DROP" and is_node_port:
                    continue  # nat has it as well
                key = FrontendKey(to[1], port[1], port[0])
                of = FrontendKind.NODE_PORT if is_node_port else kind
                yield _unserved(key, of, has_endpoints=target == "DROP")

    def _node_ports(self) -> Iterator[FrontendView]:
        addresses: list[str] = []
        for rule in self._chain(chains.SERVICES):
            if _target(rule) == chains.NODE_PORTS:
                addresses += (to[1] for to in [_TO.search(rule)] if to)
        for rule in self._chain(chains.NODE_PORTS):
            port, target = _port(rule), _target(rule)
            if port is None or not target.startswith("KUBE-EXT-"):
                continue
            for address in addresses:
                key = FrontendKey(address, port[1], port[0])
                frontend = self._treated(key, FrontendKind.NODE_PORT, _hash(target))
                yield self._served(frontend, target)

    def _served(self, frontend: Frontend, chain: str) -> FrontendView:
        group = self._group(_hash(chain))
        return FrontendView(
            frontend, group.backends, has_endpoints=True, affinity_s=group.affinity_s
        )

    def _group(self, hashed: str) -> _Group:
        group = self.groups.get(hashed)
        if group is None:
            cluster, affinity_s = self._balanced(f"KUBE-SVC-{hashed}")
            local, local_affinity_s = self._balanced(f"KUBE-SVL-{hashed}")
            backends = tuple(
                Backend(*each, in_cluster=each in cluster, in_local=each in local)
                for each in sorted(cluster | local)
            )
            group = self.groups[hashed] = _Group(backends, affinity_s or local_affinity_s)
        return group

    def _balanced(self, chain: str) -> tuple[set[tuple[str, int]], int]:
        """The endpoints a chain chooses from, and how long it remembers a client."""
        found: set[tuple[str, int]] = set()
        affinity_s = 0
        for rule in self._chain(chain):
            target = _target(rule)
            if not target.startswith("KUBE-SEP-"):
                continue
            if seconds := _SECONDS.search(rule):
                affinity_s = int(seconds[1])
            for to in map(_DNAT.search, self._chain(target)):
                if to:
                    found.add((to[1], int(to[2])))
        return found, affinity_s


def _target(rule: str) -> str:
    match = _JUMP.search(rule)
    return match[1] if match else ""


def _hash(chain: str) -> str:
    return chain.rpartition("-")[2]


def _port(rule: str) -> tuple[Protocol, int] | None:
    match = _PORT.search(rule)
    return (Protocol(match[1].upper()), int(match[2])) if match else None
