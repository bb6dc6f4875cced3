"""Rules of one service port, as kube-proxy writes them (I1-I2, I5, I7-I14). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ebpf_svc.dataplane.iptables import chains, words
from ebpf_svc.dataplane.iptables.chains import FILTER, NAT
from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.dataplane.netfilter.names import endpoint_text
from ebpf_svc.errors import ApplyError
from ebpf_svc.model.desired import Backend, Frontend, FrontendKind, ServicePlan
from ebpf_svc.model.net import Family, Protocol, Sources

_INTERNAL_MASQUERADE = (Sources.NONE, Sources.NODE | Sources.EXTERNAL, Sources.ALL)
_EXTERNAL_LOCAL = (Sources.EXTERNAL, Sources.POD | Sources.EXTERNAL)


@dataclass(slots=True)
class ServiceRules:
    """What one service port has in the kernel."""

    chains: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Its own chains in nat -> their rules."""
    entries: dict[str, list[str]] = field(default_factory=lambda: {FILTER: [], NAT: []})
    """Table -> its rules in chains it shares with others; their order does not matter."""


def render(plan: ServicePlan, options: RuleOptions, *, comments: bool = True) -> ServiceRules:
    """Write down a service port.

    Args:
        plan: the service port.
        options: how rules look here.
        comments: False leaves them out where there is one for each endpoint (I21).

    Raises:
        ApplyError: clients of a frontend are to be treated in a way these chains cannot express.
    """
    frontends = served_frontends(plan, options)
    if not frontends:
        return ServiceRules()
    return _Renderer(plan, frontends, options, comments=comments).render()


def served_frontends(plan: ServicePlan, options: RuleOptions) -> tuple[Frontend, ...]:
    """Frontends this mode has a place for: node ports on ::1 it has not, for the kernel does not
    let a packet from there leave (I7).
    """
    if plan.key.port_name.protocol is Protocol.SCTP and not options.has_sctp:
        return ()
    if options.family is Family.V4:
        return plan.frontends
    return tuple(
        each
        for each in plan.frontends
        if each.kind is not FrontendKind.NODE_PORT or each.key.address != "::1"
    )


def is_dropped(plan: ServicePlan, frontend: Frontend) -> bool:
    """Whether some clients of a frontend have nobody to be sent to (P3, P4)."""
    wanted = []
    if frontend.local_for:
        wanted.append(any(each.in_local for each in plan.backends))
    if frontend.local_for != Sources.ALL:
        wanted.append(any(each.in_cluster for each in plan.backends))
    return not all(wanted)


class _Renderer:
    """Collects the rules of one service port."""

    def __init__(
        self,
        plan: ServicePlan,
        frontends: tuple[Frontend, ...],
        options: RuleOptions,
        *,
        comments: bool,
    ) -> None:
        self._plan, self._frontends, self._options = plan, frontends, options
        self._name = str(plan.key.port_name)
        self._port, self._protocol = plan.key.port_name, plan.key.port_name.protocol
        self._comments = comments
        self._affinity_s = plan.affinity_s if options.has_recent else 0
        self._cluster = [each for each in plan.backends if each.in_cluster]
        self._local = [each for each in plan.backends if each.in_local]
        self._rules = ServiceRules()

    def render(self) -> ServiceRules:
        plan = self._plan
        internal = [each for each in self._frontends if each.kind is FrontendKind.CLUSTER_IP]
        external = [each for each in self._frontends if each.kind is not FrontendKind.CLUSTER_IP]
        for frontend in internal:
            self._internal_entry(frontend)
        if external:
            self._external_entries(external)
        if not plan.has_endpoints:
            return self._rules
        if external:
            self._external_chain(external)
        cluster, local = chains.cluster_chain(self._port), chains.local_chain(self._port)
        if self._cluster:
            self._balance(cluster, self._cluster, internal)
        if self._local:
            self._balance(local, self._local, internal)
        for backend in plan.backends:
            if backend.in_cluster or backend.in_local:
                self._endpoint(backend)
        return self._rules

    # -- chains shared with others -----------------------------------------------------------------

    def _internal_entry(self, frontend: Frontend) -> None:
        target = self._internal_target(frontend)
        if not self._plan.has_endpoints or is_dropped(self._plan, frontend):
            self._refuse(chains.SERVICES, frontend)
            return
        self._entry(NAT, chains.SERVICES, frontend, "cluster IP", f"-j {target}")

    def _internal_target(self, frontend: Frontend) -> str:
        if frontend.local_for not in (Sources.NONE, Sources.ALL):
            raise self._inexpressible(frontend)
        return (chains.local_chain if frontend.local_for else chains.cluster_chain)(self._port)

    def _external_entries(self, frontends: Sequence[Frontend]) -> None:
        is_served = self._plan.has_endpoints
        for frontend in frontends:
            if frontend.kind is not FrontendKind.NODE_PORT:
                if is_served:
                    self._address_entry(frontend)
                if not is_served or is_dropped(self._plan, frontend):
                    self._refuse(chains.EXTERNAL_SERVICES, frontend)
        node_ports = [each for each in frontends if each.kind is FrontendKind.NODE_PORT]
        if not node_ports:
            return
        if is_served:
            key, target = node_ports[0].key, chains.external_chain(self._port)
            self._rules.entries[NAT].append(
                f"{chains.NODE_PORTS} {words.of_protocol(self._protocol)} "
                f"{words.comment(self._name)} {words.to_port(self._protocol, key.port)} -j {target}"
            )
        for frontend in node_ports:
            if not is_served or is_dropped(self._plan, frontend):
                self._refuse(chains.EXTERNAL_SERVICES, frontend)

    def _address_entry(self, frontend: Frontend) -> None:
        """An external IP or a VIP (I7); a VIP that is not for everybody passes the firewall."""
        is_vip = frontend.kind is FrontendKind.LOAD_BALANCER
        target = chains.external_chain(self._port)
        if frontend.source_ranges is not None:
            target = chains.firewall_chain(self._port)
            why = f"traffic not accepted by {target}"
            self._entry(FILTER, chains.PROXY_FIREWALL, frontend, why, "-j DROP")
        what = "loadbalancer IP" if is_vip else "external IP"
        self._entry(NAT, chains.SERVICES, frontend, what, f"-j {target}")

    def _entry(self, table: str, chain: str, frontend: Frontend, what: str, then: str) -> None:
        key = frontend.key
        is_node_port = frontend.kind is FrontendKind.NODE_PORT
        local = "-m addrtype --dst-type LOCAL " if is_node_port else ""
        self._rules.entries[table].append(
            f"{chain} {words.to_address(key)} {words.of_protocol(key.protocol)} "
            f"{words.comment(f'{self._name} {what}')} {local}"
            f"{words.to_port(key.protocol, key.port)} {then}"
        )

    def _refuse(self, chain: str, frontend: Frontend) -> None:
        """Answer who calls a service without endpoints (P2), stay silent for one without local
        ones (P3, P4).
        """
        what, then = "has no endpoints", words.refuse(self._options.family, self._protocol)
        if self._plan.has_endpoints:
            what, then = "has no local endpoints", "-j DROP"
        self._entry(FILTER, chain, frontend, what, then)

    # -- chains of its own -------------------------------------------------------------------------

    def _external_chain(self, frontends: Sequence[Frontend]) -> None:
        """Masquerade and pick the list for what comes to addresses outside the cluster (I9)."""
        self._firewall_chain(frontends)
        first, name = frontends[0], self._name
        if any(_treatment(each) != _treatment(first) for each in frontends):
            raise self._inexpressible(first)
        chain = chains.external_chain(self._port)
        cluster = f"-j {chains.cluster_chain(self._port)}" if self._cluster else ""
        rules: list[str] = []
        if _treatment(first) == (Sources.NONE, Sources.ALL):
            what = words.comment(f"masquerade traffic for {name} external destinations")
            rules += [f"{chain} {what} -j {chains.MARK_MASQ}"]
            rules += [f"{chain} {cluster}"] if cluster else []
        elif first.local_for in _EXTERNAL_LOCAL and first.masquerade_for == Sources.NODE:
            if (first.local_for == Sources.EXTERNAL) != (self._options.pods is not None):
                raise self._inexpressible(first)
            rules += self._short_circuit(chain, cluster)
            rules += [f"{chain} -j {chains.local_chain(self._port)}"] if self._local else []
        else:
            raise self._inexpressible(first)
        self._rules.chains[chain] = tuple(rules)

    def _short_circuit(self, chain: str, to_cluster: str) -> Iterator[str]:
        """Spare pods and the node the Local list (P5)."""
        name = self._name
        if self._options.pods is not None and to_cluster:
            source, device = words.source_is_pod(self._options.pods)
            what = words.comment(f"pod traffic for {name} external destinations")
            yield f"{chain} {source}{device}{what} {to_cluster}"
        from_node = "-m addrtype --src-type LOCAL"
        what = words.comment(f"masquerade LOCAL traffic for {name} external destinations")
        yield f"{chain} {what} {from_node} -j {chains.MARK_MASQ}"
        if to_cluster:
            what = words.comment(f"route LOCAL traffic for {name} external destinations")
            yield f"{chain} {what} {from_node} {to_cluster}"

    def _firewall_chain(self, frontends: Sequence[Frontend]) -> None:
        """Let in who may use the VIPs (I10); who is left over falls to KUBE-PROXY-FIREWALL."""
        ranges = {each.source_ranges for each in frontends if each.source_ranges is not None}
        if not ranges:
            return
        if len(ranges) > 1:
            raise ApplyError(str(self._plan.key), "its VIPs have different source ranges")
        chain, to = chains.firewall_chain(self._port), chains.external_chain(self._port)
        what = words.comment(f"{self._name} loadbalancer IP")
        rest = f"other traffic to {self._name} will be dropped by {chains.PROXY_FIREWALL}"
        self._rules.chains[chain] = (
            *(f"{chain} -s {prefix} {what} -j {to}" for prefix in ranges.pop()),
            f"{chain} {words.comment(rest)}",
        )

    def _balance(
        self, chain: str, backends: Sequence[Backend], internal: Sequence[Frontend]
    ) -> None:
        """Masquerade for the cluster IP (I11), then those who came before (I12), then by chance
        (I13).
        """
        port, family = self._port, self._options.family
        rules = [
            self._masquerade(chain, each)
            for each in internal
            if each.masquerade_for and self._internal_target(each) == chain
        ]
        targets = [(self._towards(each), chains.endpoint_chain(port, each)) for each in backends]
        if self._affinity_s:
            rules += [
                f"{chain} {towards}{words.remembered(family, to, self._affinity_s)} -j {to}"
                for towards, to in targets
            ]
        for left, (towards, to) in zip(range(len(targets), 0, -1), targets, strict=True):
            chance = f"{words.with_probability(left)} " if left > 1 else ""
            rules.append(f"{chain} {towards}{chance}-j {to}")
        self._rules.chains[chain] = tuple(rules)

    def _masquerade(self, chain: str, frontend: Frontend) -> str:
        """Hide who is no pod behind the node (P8), or everybody (D3)."""
        pods, key = self._options.pods, frontend.key
        source = device = ""
        if frontend.masquerade_for not in _INTERNAL_MASQUERADE:
            raise self._inexpressible(frontend)
        if frontend.masquerade_for != Sources.ALL:
            if pods is None:
                raise self._inexpressible(frontend)
            source, device = words.source_is_pod(pods, negate=True)
        return (
            f"{chain} {source}{words.to_address(key)} {device}{words.of_protocol(key.protocol)} "
            f"{words.comment(f'{self._name} cluster IP')} "
            f"{words.to_port(key.protocol, key.port)} -j {chains.MARK_MASQ}"
        )

    def _endpoint(self, backend: Backend) -> None:
        """Masquerade a pod that calls itself (P9), then translate (I14)."""
        chain = chains.endpoint_chain(self._port, backend)
        protocol = self._protocol.value.lower()
        what = f"{words.comment(self._name)} " if self._comments else ""
        memory = f"{words.remember(self._options.family, chain)} " if self._affinity_s else ""
        self._rules.chains[chain] = (
            f"{chain} -s {words.host_prefix(backend.address)} {what}-j {chains.MARK_MASQ}",
            f"{chain} -p {protocol} {what}{memory}-m {protocol} "
            f"-j DNAT --to-destination {endpoint_text(backend)}",
        )

    def _towards(self, backend: Backend) -> str:
        if not self._comments:
            return ""
        return f"{words.comment(f'{self._name} -> {endpoint_text(backend)}')} "

    def _inexpressible(self, frontend: Frontend) -> ApplyError:
        return ApplyError(
            str(self._plan.key),
            f"{frontend.key}: no chain has local_for={frontend.local_for!r}, "
            f"masquerade_for={frontend.masquerade_for!r}",
        )


def _treatment(frontend: Frontend) -> tuple[Sources, Sources]:
    return frontend.local_for, frontend.masquerade_for
