"""The iptables rules of ipvs mode: a few, always the same, in the words of iptables-save. Pure.

Sets say what a destination is, so services come and go without a rule being written (V14-V16).
Where these differ from kube-proxy's: rules for sets that are empty stand as well; packets that open
nothing leave the access filter at once; with policy Local the node's own packets are masqueraded,
as in the other modes, since their source is the VIP, to which no other node can answer; and what
the node itself sends to a VIP with source ranges is checked in table mangle, before IPVS translates
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.ipvs import sets
from ebpf_svc.dataplane.ipvs.sets import name_of
from ebpf_svc.dataplane.netfilter.pods import PodMatch, pod_match
from ebpf_svc.host.iptables import Table
from ebpf_svc.host.kubeproxy import IPVS_CHAIN, MARKER
from ebpf_svc.model.net import Family, Protocol

FILTER, NAT, MANGLE = "filter", "nat", "mangle"
SERVICES, POSTROUTING, MARK_MASQ = "KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"
NODE_PORT, BALANCER, FORWARD = IPVS_CHAIN, "KUBE-LOAD-BALANCER", "KUBE-FORWARD"
FIREWALL, RANGES = "KUBE-PROXY-FIREWALL", "KUBE-SOURCE-RANGES-FIREWALL"
IPVS_FILTER, OUT_FILTER = "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER"

_LOOPBACK = {Family.V4: "127.0.0.0/8", Family.V6: "::1/128"}
_REFUSAL = {Family.V4: "icmp-port-unreachable", Family.V6: "icmp6-port-unreachable"}
_FROM_NODE = "-m addrtype --src-type LOCAL "
_TO_NODE = "-m addrtype --dst-type LOCAL "
_NOT_NEW = "-m conntrack ! --ctstate NEW "

_JUMPS = {
    MANGLE: (("OUTPUT", "kube-proxy firewall rules", OUT_FILTER),),
    NAT: (
        ("OUTPUT", "kubernetes service portals", SERVICES),
        ("PREROUTING", "kubernetes service portals", SERVICES),
        ("POSTROUTING", "kubernetes postrouting rules", POSTROUTING),
    ),
    FILTER: (
        ("FORWARD", "kubernetes forwarding rules", FORWARD),
        ("INPUT", "kubernetes health check rules", NODE_PORT),
        ("INPUT", "kube-proxy firewall rules", FIREWALL),
        ("FORWARD", "kube-proxy firewall rules", FIREWALL),
        ("INPUT", "kubernetes ipvs access filter", IPVS_FILTER),
    ),
}
TABLES = tuple(_JUMPS)
OURS = {
    MANGLE: (OUT_FILTER, RANGES),
    NAT: (SERVICES, POSTROUTING, NODE_PORT, BALANCER, MARK_MASQ),
    FILTER: (FORWARD, NODE_PORT, FIREWALL, RANGES, IPVS_FILTER),
}
"""Chains of ours by table, beside the sign that they are ours."""
Wording = Mapping[tuple[str, str], tuple[str, ...]]
"""(table, chain) -> its rules as the host's tool prints them."""


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """How the rules of one family look on this node."""

    family: Family
    pods: PodMatch | None = None
    """None = pods look like anybody else (D2)."""
    mark: int = 1 << 14
    masquerade_all: bool = False

    @classmethod
    def from_settings(cls, settings: Settings, family: Family) -> RuleOptions:
        return cls(
            family, pod_match(settings, family), 1 << settings.masquerade_bit,
            settings.masquerade_all,
        )  # fmt: skip


def jumps(table: str) -> tuple[str, ...]:
    """Jumps from the kernel's own chains; each goes in front of what is there."""
    return tuple(f"{chain} {_comment(why)} -j {to}" for chain, why, to in _JUMPS[table])


def contents(options: RuleOptions) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """Table -> chain -> rules, each starting with the chain's name."""
    rules = {
        NAT: {
            MARKER: (),
            SERVICES: _services(options),
            NODE_PORT: _node_ports(options),
            BALANCER: _balancer(options),
            MARK_MASQ: (f"-j MARK --set-xmark {options.mark:#x}/{options.mark:#x}",),
            POSTROUTING: _postrouting(options),
        },
        FILTER: {
            FORWARD: _forward(options),
            NODE_PORT: (_match(options, sets.HEALTH_CHECK, "dst", "-j ACCEPT"),),
            FIREWALL: _firewall(options),
            RANGES: _ranges(options),
            IPVS_FILTER: _ipvs_filter(options),
        },
        MANGLE: {OUT_FILTER: _firewall(options), RANGES: _ranges(options)},
    }
    return {
        table: {chain: tuple(f"{chain} {rule}" for rule in held) for chain, held in chains.items()}
        for table, chains in rules.items()
    }


def _match(options: RuleOptions, short: str, directions: str, rest: str) -> str:
    """A rule for what is in a set; directions as `-m set` takes them."""
    return f"-m set --match-set {name_of(short, options.family)} {directions} {rest}"


def _services(options: RuleOptions) -> tuple[str, ...]:
    """Who is masqueraded; the end of the chain keeps other chains from looking (V15)."""
    to_mark = f"-j {MARK_MASQ}"
    rules = [
        # Test 62: first, for nothing from there can be masqueraded.
        f"-s {_LOOPBACK[options.family]} -j RETURN",
        _match(options, sets.LOAD_BALANCER, "dst,dst", f"-j {BALANCER}"),
        _cluster_ip(options),
        _match(options, sets.EXTERNAL_IP, "dst,dst", to_mark),
        _match(options, sets.EXTERNAL_IP_LOCAL, "dst,dst", _FROM_NODE + to_mark),
        *(
            _match(options, short, "dst,dst", "-j ACCEPT")
            for short in (sets.EXTERNAL_IP, sets.EXTERNAL_IP_LOCAL)
        ),
        f"{_TO_NODE}-j {NODE_PORT}",
        *(
            _match(options, short, "dst,dst", "-j ACCEPT")
            for short in (sets.CLUSTER_IP, sets.LOAD_BALANCER)
        ),
    ]
    return tuple(rules)


def _cluster_ip(options: RuleOptions) -> str:
    """Masquerading towards cluster IPs (P8, D3); without a detector, what a VIP itself sends."""
    to_mark = f"-j {MARK_MASQ}"
    if options.masquerade_all:
        return _match(options, sets.CLUSTER_IP, "dst,dst", to_mark)
    if options.pods is None:
        return _match(options, sets.CLUSTER_IP, "src,dst", to_mark)
    source, device = _is_pod(options.pods)
    if source:
        return f"! {source} {_match(options, sets.CLUSTER_IP, 'dst,dst', to_mark)}"
    return f"! {device} {_match(options, sets.CLUSTER_IP, 'dst,dst', to_mark)}"


def _is_pod(pods: PodMatch) -> tuple[str, str]:
    """What a pod's packet matches: its source, or its interface; the other is empty."""
    if pods.prefix:
        return f"-s {pods.prefix}", ""
    return "", f"-i {pods.device or pods.device_prefix + '+'}"


def _node_ports(options: RuleOptions) -> tuple[str, ...]:
    found = []
    for protocol in Protocol:
        directions = "dst,dst" if protocol is Protocol.SCTP else "dst"
        word = f"-p {protocol.value.lower()} "
        local = word + _match(options, sets.NODE_PORT_LOCAL[protocol], directions, "")
        found += [
            f"{local}{_FROM_NODE}-j {MARK_MASQ}",
            f"{local}-j RETURN",
            word + _match(options, sets.NODE_PORT[protocol], directions, f"-j {MARK_MASQ}"),
        ]
    return tuple(found)


def _balancer(options: RuleOptions) -> tuple[str, ...]:
    local = _match(options, sets.LOAD_BALANCER_LOCAL, "dst,dst", "")
    return (
        f"{local}{_FROM_NODE}-j {MARK_MASQ}",
        f"{local}-j RETURN",
        f"-j {MARK_MASQ}",
    )


def _postrouting(options: RuleOptions) -> tuple[str, ...]:
    bit = f"{options.mark:#x}"
    hairpin = _comment("Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose")
    return (
        f"{hairpin} {_match(options, sets.LOOP_BACK, 'dst,dst,src', '-j MASQUERADE')}",
        f"-m mark ! --mark {bit}/{bit} -j RETURN",
        f"-j MARK --set-xmark {bit}/0x0",
        f"{_comment('kubernetes service traffic requiring SNAT')} -j MASQUERADE --random-fully",
    )


def _forward(options: RuleOptions) -> tuple[str, ...]:
    bit = f"{options.mark:#x}"
    return (
        f"{_comment('kubernetes forwarding rules')} -m mark --mark {bit}/{bit} -j ACCEPT",
        f"{_comment('kubernetes forwarding conntrack rule')} "
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    )


def _firewall(options: RuleOptions) -> tuple[str, ...]:
    return (_match(options, sets.LOAD_BALANCER_FW, "dst,dst", f"-j {RANGES}"),)


def _ranges(options: RuleOptions) -> tuple[str, ...]:
    """Sources a VIP does not let in are dropped (P10)."""
    return (
        _match(options, sets.SOURCE_CIDR, "dst,dst,src", "-j RETURN"),
        _match(options, sets.SOURCE_IP, "dst,dst,src", "-j RETURN"),
        "-j DROP",
    )


def _ipvs_filter(options: RuleOptions) -> tuple[str, ...]:
    """What the node itself listens on is not to be had at the addresses of services (V16), and
    frontends without endpoints refuse (P2).
    """
    balanced = (sets.LOAD_BALANCER, sets.CLUSTER_IP, sets.EXTERNAL_IP, sets.EXTERNAL_IP_LOCAL)
    return (
        # Only new connections are refused: the packets of others need no look at six sets.
        f"{_NOT_NEW}-j RETURN",
        *_refuse(options, sets.NO_ENDPOINTS, "dst,dst"),
        *(_match(options, short, "dst,dst", "-j RETURN") for short in balanced),
        _match(options, sets.HEALTH_CHECK, "dst", "-j RETURN"),
        *_refuse(options, sets.IPVS_IPS, "dst"),
    )


def _refuse(options: RuleOptions, short: str, directions: str) -> tuple[str, ...]:
    """Answer new connections like a host on which nothing listens.

    TCP gets a reset: an ICMPv6 error is lost on a socket of this machine that is still connecting.
    """
    new = "-m conntrack --ctstate NEW "
    return tuple(
        protocol + new + _match(options, short, directions, f"-j REJECT --reject-with {answer}")
        for protocol, answer in (("-p tcp ", "tcp-reset"), ("", _REFUSAL[options.family]))
    )


def _comment(text: str) -> str:
    return f'-m comment --comment "{text}"'


# -- what to write ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Changes:
    """What leads from the rules that were saved to ours."""

    text: str
    """Input of iptables-restore --noflush; empty when nothing is to change."""
    count: int
    """Rules and chains written."""
    found: tuple[str, ...]
    """What was missing or changed, in words."""


def difference(
    options: RuleOptions, tables: Mapping[str, Table], wording: Wording | None = None
) -> Changes:
    """Compare what is there with what should be; rules and chains of others are left alone.

    Args:
        options: how our rules look.
        tables: as saved.
        wording: how this host's tool words rules it was given; what is missing is worded as here.
    """
    lines: list[str] = []
    found: list[str] = []
    count = 0
    worded = wording or {}
    for name, chains in contents(options).items():
        table = tables.get(name) or Table(name)
        held = _by_chain(table)
        filled = {
            chain: rules
            for chain, rules in chains.items()
            if chain not in table.chains
            or tuple(held.get(chain, ())) != worded.get((name, chain), rules)
        }
        absent = [rule for rule in jumps(name) if not _jumps(held, rule)]
        if not filled and not absent:
            continue
        rules = [rule for written in filled.values() for rule in written]
        lines += [f"*{name}", *(f":{chain} - [0:0]" for chain in filled)]
        lines += [*(f"-A {rule}" for rule in rules), *(f"-I {rule}" for rule in absent), "COMMIT"]
        count += len(filled) + len(rules) + len(absent)
        where = f"{options.family.label} {name}"
        found += (
            f"{where}: chain {chain} was {'changed' if chain in table.chains else 'missing'}"
            for chain in filled
        )
        found += (f"{where}: jump to {rule.split()[-1]} was missing" for rule in absent)
    return Changes("\n".join([*lines, ""]) if lines else "", count, tuple(found))


def wording_of(options: RuleOptions, tables: Mapping[str, Table]) -> Wording:
    """How the host's tool words our chains, which were just written."""
    held = {name: _by_chain(table) for name, table in tables.items()}
    return {
        (name, chain): tuple(held.get(name, {}).get(chain, ()))
        for name, chains in contents(options).items()
        for chain in chains
    }


def _jumps(held: Mapping[str, list[str]], rule: str) -> bool:
    """Whether a jump is there, under whatever comment: only its ends tell it."""
    chain, _, rest = rule.partition(" ")
    end = rest[rest.rindex(" -j ") :]
    return any(
        each.endswith(end) and ("--comment" in each or each == chain + end)
        for each in held.get(chain, ())
    )


def removal(tables: Mapping[str, Table], *, marker: bool) -> str:
    """What takes our chains away with every jump to them, or in the end only the sign of them.

    Chains whose names the iptables mode has as well are left where that mode serves by now.

    Args:
        tables: as saved.
        marker: remove the sign that they are ours, not the chains themselves.
    """
    lines: list[str] = []
    shared = _shared(tables)
    for name, owned in OURS.items():
        table = tables.get(name)
        names = [MARKER] if marker and name == NAT else [] if marker else owned
        chains = [
            chain
            for chain in names
            if table and chain in table.chains and (name, chain) not in shared
        ]
        if table is None or not chains:
            continue
        lines.append(f"*{name}")
        lines += (f":{chain} - [0:0]" for chain in chains)
        lines += (
            f"-D {rule.text}"
            for rule in table.rules
            if rule.target in chains and rule.chain not in chains
        )
        lines += (f"-X {chain}" for chain in chains)
        lines.append("COMMIT")
    return "\n".join([*lines, ""]) if lines else ""


def is_ours(tables: Mapping[str, Table]) -> bool:
    """Whether rules of this mode stand here, and are our agent's rather than kube-proxy's.

    The sign alone is left where a removal was cut short.
    """
    nat = tables.get(NAT)
    if nat is None or MARKER not in nat.chains:
        return False
    return NODE_PORT in nat.chains or not _is_iptables_mode(tables)


def _is_iptables_mode(tables: Mapping[str, Table]) -> bool:
    """Whether the iptables mode has its rules here, not only chains it left behind.

    It alone has KUBE-NODEPORTS; the chain both begin with asks no sets then.
    """
    nat = tables.get(NAT)
    return (
        nat is not None
        and "KUBE-NODEPORTS" in nat.chains
        and not any(rule.chain == SERVICES and "--match-set" in rule.text for rule in nat.rules)
    )


def _shared(tables: Mapping[str, Table]) -> frozenset[tuple[str, str]]:
    if not _is_iptables_mode(tables):
        return frozenset()
    return frozenset(
        {
            *((NAT, chain) for chain in (SERVICES, POSTROUTING, MARK_MASQ, MARKER)),
            *((FILTER, chain) for chain in (FORWARD, FIREWALL)),
        }
    )


def _by_chain(table: Table) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rule in table.rules:
        found.setdefault(rule.chain, []).append(rule.text)
    return found
