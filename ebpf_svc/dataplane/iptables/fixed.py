"""Rules no service port owns: jumps into our chains, and chains that are always alike. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ebpf_svc.dataplane.iptables import chains, words
from ebpf_svc.dataplane.iptables.chains import FILTER, MANGLE, NAT
from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.host.kubeproxy import CANARY, MARKER
from ebpf_svc.model.desired import HealthCheck
from ebpf_svc.model.net import Family

_NEW = "-m conntrack --ctstate NEW "
_PORTALS = "kubernetes externally-visible service portals"
_SERVICES = "kubernetes service portals"
_FIREWALL = "kubernetes load balancer firewall"
_LAST = "kubernetes service nodeports; NOTE: this must be the last rule in this chain"
_FROM_NODE = words.comment("kubernetes external addresses, for this node")

_JUMPS = {
    FILTER: (
        ("INPUT", _NEW, _PORTALS, chains.EXTERNAL_SERVICES),
        ("FORWARD", _NEW, _PORTALS, chains.EXTERNAL_SERVICES),
        ("INPUT", "", "kubernetes health check service ports", chains.NODE_PORTS),
        ("FORWARD", _NEW, _SERVICES, chains.SERVICES),
        ("OUTPUT", _NEW, _SERVICES, chains.SERVICES),
        ("FORWARD", "", "kubernetes forwarding rules", chains.FORWARD),
        ("INPUT", _NEW, _FIREWALL, chains.PROXY_FIREWALL),
        ("OUTPUT", _NEW, _FIREWALL, chains.PROXY_FIREWALL),
        ("FORWARD", _NEW, _FIREWALL, chains.PROXY_FIREWALL),
    ),
    NAT: (
        ("OUTPUT", "", _SERVICES, chains.SERVICES),
        ("PREROUTING", "", _SERVICES, chains.SERVICES),
        ("POSTROUTING", "", "kubernetes postrouting rules", chains.POSTROUTING),
    ),
    MANGLE: (),
}
TABLES = tuple(_JUMPS)


def jumps(options: RuleOptions, table: str) -> list[str]:
    """Jumps from the kernel's own chains; each goes in front, so the last one ends up first."""
    found = [
        f"{chain} {when}{words.comment(what)} -j {to}" for chain, when, what, to in _JUMPS[table]
    ]
    if table == FILTER and options.family is Family.V4:
        found += [f"{chain} -j {chains.FIREWALL}" for chain in ("INPUT", "OUTPUT")]
    return found


def contents(options: RuleOptions, table: str) -> Mapping[str, tuple[str, ...]]:
    """Chains of ours that hold just these rules (I4, I15, I24)."""
    if table == MANGLE:
        return {CANARY: ()}
    if table == NAT:
        return {CANARY: (), MARKER: (), **_masquerade(options)}
    bit = f"{options.mark:#x}"
    forward = [
        f"{chains.FORWARD} {words.comment('kubernetes forwarding rules')} "
        f"-m mark --mark {bit}/{bit} -j ACCEPT",
        f"{chains.FORWARD} {words.comment('kubernetes forwarding conntrack rule')} "
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]
    if options.drops_invalid:
        # Such a segment would leave untranslated, and the client answer it with a reset.
        forward.insert(0, f"{chains.FORWARD} -m conntrack --ctstate INVALID -j DROP")
    return {CANARY: (), chains.FORWARD: tuple(forward)}


def _masquerade(options: RuleOptions) -> Mapping[str, tuple[str, ...]]:
    bit, chain = f"{options.mark:#x}", chains.POSTROUTING
    random = " --random-fully" if options.has_random_fully else ""
    return {
        chains.MARK_MASQ: (f"{chains.MARK_MASQ} -j MARK --set-xmark {bit}/{bit}",),
        chain: (
            f"{chain} -m mark ! --mark {bit}/{bit} -j RETURN",
            # Cleared before it meets another masquerade rule, as when a tunnel wraps the packet.
            f"{chain} -j MARK --set-xmark {bit}/0x0",
            f"{chain} {words.comment('kubernetes service traffic requiring SNAT')} "
            f"-j MASQUERADE{random}",
        ),
    }


def guards(options: RuleOptions, table: str) -> tuple[str, ...]:
    """Rules of KUBE-FIREWALL, which kubelet may have written already (I6): route_localnet lets
    neighbours reach 127.0.0.1.
    """
    if table != FILTER or options.family is not Family.V4:
        return ()
    loopback = words.LOOPBACK[Family.V4]
    return (
        f"{chains.FIREWALL} ! -s {loopback} -d {loopback} "
        f"{words.comment('block incoming localnet connections')} "
        "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
    )


def entries(options: RuleOptions, table: str, checks: Iterable[HealthCheck]) -> list[str]:
    """Rules of ours in the shared chains, beside those of service ports."""
    if table != FILTER:
        return []
    # kube-proxy leaves the node's own packets to external addresses unanswered (I2).
    mine = [
        f"{chains.SERVICES} {_FROM_NODE} -m addrtype --src-type LOCAL -j {chains.EXTERNAL_SERVICES}"
    ]
    mine += (
        f"{chains.NODE_PORTS} -p tcp "
        f"{words.comment(f'{check.service} health check node port')} "
        f"-m tcp --dport {check.port} -j ACCEPT"
        for check in checks
        if check.family is options.family
    )
    return mine


def node_port_jumps(addresses: Iterable[str]) -> list[str]:
    """The last rules of nat/KUBE-SERVICES: what is sent to an address node ports answer on (I7).

    One each, and not one for all that is local: addresses may be selected anew while we run.
    """
    return [
        f"{chains.SERVICES} -d {words.host_prefix(each)} {words.comment(_LAST)} "
        f"-j {chains.NODE_PORTS}"
        for each in sorted(addresses)
    ]
