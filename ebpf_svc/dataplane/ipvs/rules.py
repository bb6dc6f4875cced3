"""The iptables rules of ipvs mode: a few, in the words of iptables-save. Pure.

Sets say what a destination is, so services come and go without a rule being written (V14-V16); only
the first of its kind brings rules about its set, and the last takes them away.
Where these differ from kube-proxy's: packets that open nothing leave the access filter at once;
with policy Local the node's own packets are masqueraded, as in the other modes, since their source
is the VIP, to which no other node can answer; and what the node itself sends to a VIP with source
ranges is checked in table mangle, before IPVS translates it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.ipvs import sets
from ebpf_svc.dataplane.ipvs.sets import name_of
from ebpf_svc.dataplane.netfilter.pods import PodMatch, pod_match
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
Contents = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Table -> chain -> rules, each starting with the chain's name."""
ALL = frozenset(sets.SPECS)
"""Every set's name."""
SET = re.compile(r"--match-set (\S+)")
"""The sets a rule asks, in its words."""


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


def contents(options: RuleOptions, occupied: Collection[str] = ALL) -> Contents:
    """Our chains; some may be empty.

    Args:
        options: how rules look on this node.
        occupied: the sets that have elements. Each packet would look in vain into the others.
    """
    is_guarded = name_of(sets.LOAD_BALANCER_FW, options.family) in occupied
    ranges = _ranges(options) if is_guarded else ()
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
            RANGES: ranges,
            IPVS_FILTER: _ipvs_filter(options),
        },
        MANGLE: {OUT_FILTER: _firewall(options), RANGES: ranges},
    }
    kept = {name_of(sets.CLUSTER_IP, options.family), *occupied}
    return {table: _about(kept, chains) for table, chains in rules.items()}


def _about(kept: set[str], chains: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
    """The rules of a table that ask these sets alone, and no chain that is left without a rule."""
    asking = {
        chain: [rule for rule in held if kept.issuperset(SET.findall(rule))]
        for chain, held in chains.items()
    }
    empty = {chain for chain, held in asking.items() if not held}
    return {
        chain: tuple(f"{chain} {rule}" for rule in held if rule.rpartition("-j ")[2] not in empty)
        for chain, held in asking.items()
    }


def jumps(table: str) -> Iterator[tuple[str, str]]:
    """Jumps from the kernel's own chains, each to go in front of what is there, and to where."""
    for chain, why, to in _JUMPS[table]:
        yield f"{chain} {_comment(why)} -j {to}", to


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
