"""The rules that lead packets to the relay's doors, as text for nft. Pure.

One table of our own. For each class of clients a map says which door a frontend has for it; the
policies are thus decided before a connection exists. What has no endpoint goes to a port where
nobody listens: the kernel refuses, TCP and UDP alike (P2). What is to be dropped goes to another,
where rules do so (P3, P4).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.model.desired import Frontend, ServicePlan
from ebpf_svc.model.net import Family, Protocol, Sources

TABLE = "inet ebpf-svc-userspace"
RELAY = {Family.V4: "169.254.97.1", Family.V6: "fd65:6270:662d:7376:6361::1"}
"""Where the doors are: addresses of this node alone, by a route; not one of an interface, for those
are taken for the node's."""
REFUSED = 1
"""A port at which nobody listens (tcpmux)."""
SILENT = 2
"""A port at which the rules drop everything. Dropped on its way out, a datagram of a process of the
node would be an error, EPERM, to it; here it is lost as if on its way."""
CLASSES = {Sources.POD: "pod", Sources.NODE: "node", Sources.EXTERNAL: "external"}
PROTOCOLS = (Protocol.TCP, Protocol.UDP)
"""U6: no SCTP."""
NO_LOCAL, SOURCE_RANGE = "no_local_endpoint", "source_range"
"""Counters, by the reason of a drop."""
CLUSTER, LOCAL = "cluster", "local"
"""Doors, by the list of backends they lead to."""

_IP = {Family.V4: "ip", Family.V6: "ip6"}
_TYPE = {Family.V4: "ipv4_addr", Family.V6: "ipv6_addr"}
_SERVICE = "inet_proto . inet_service"


class Element(NamedTuple):
    """One entry of a set or map."""

    container: str
    key: str


Elements = Mapping[Element, str]
"""What the containers hold; values are those of maps, empty for sets."""


def door_name(frontend: Frontend, source: Sources) -> str:
    """Which door a frontend has for a class of clients."""
    return LOCAL if frontend.local_for & source else CLUSTER


def door_names(plan: ServicePlan) -> list[str]:
    """The doors a plan needs, in order; none where nobody could be let in."""
    if not plan.backends:
        return []
    wanted = {door_name(each, source) for each in plan.frontends for source in CLASSES}
    return sorted(wanted)


def elements(
    plan: ServicePlan, numbers: Mapping[str, int], frontends: Iterable[Frontend] | None = None
) -> dict[Element, str]:
    """What the table holds for a service port.

    Args:
        plan: the service port.
        numbers: the port at which each of its doors listens.
        frontends: only these of the plan's; None = all.
    """
    serves = {
        CLUSTER: any(each.in_cluster for each in plan.backends),
        LOCAL: any(each.in_local for each in plan.backends),
    }
    family = plan.key.family
    suffix, found = str(family.value), {}
    for frontend in plan.frontends if frontends is None else frontends:
        key = frontend_text(frontend)
        for source, name in CLASSES.items():
            door = door_name(frontend, source)
            if not plan.has_endpoints:
                found[Element(name + suffix, key)] = str(REFUSED)
            elif serves[door]:
                found[Element(name + suffix, key)] = str(numbers[door])
            else:
                found[Element(name + suffix, key)] = str(SILENT)
        if frontend.source_ranges is not None:
            found[Element("ranged" + suffix, key)] = ""
            address, port, protocol = frontend.key
            for prefix in _collapsed(frontend.source_ranges):
                element = Element(_allowed(protocol, family), f"{address} . {port} . {prefix}")
                found[element] = ""
    return found


def _allowed(protocol: Protocol, family: Family) -> str:
    """The set of sources let in; Linux 7.2 takes no protocol into a key with intervals."""
    return f"allowed_{protocol.value.lower()}{family.value}"


def frontend_text(frontend: Frontend) -> str:
    """A frontend as nft prints it numerically."""
    address, port, protocol = frontend.key
    return f"{address} . {protocol.number} . {port}"


def _collapsed(prefixes: Iterable[str]) -> Iterator[str]:
    """Prefixes that do not overlap, which nft would refuse; single addresses as it prints them."""
    networks = [ipaddress.ip_network(each) for each in prefixes]
    for network in ipaddress.collapse_addresses(networks):  # type: ignore[type-var]
        single = network.prefixlen == network.max_prefixlen
        yield str(network.network_address) if single else str(network)


def skeleton(pods: Mapping[Family, PodMatch | None]) -> str:
    """A transaction that makes the table hold our chains and rules; elements stay.

    Args:
        pods: the families served, with what tells a pod's packet (D1).
    """
    lines = [f'add table {TABLE} {{ comment "ebpf-svc userspace" ; }}']
    lines += [f"add counter {TABLE} {name}" for name in (NO_LOCAL, SOURCE_RANGE)]
    for container, kind in containers(pods).items():
        lines.append(f"add {kind.split()[0]} {TABLE} {container} {{ {kind.partition(' ')[2]} }}")
    for chain, hook in _CHAINS.items():
        lines.append(f"add chain {TABLE} {chain} {{ {hook}; policy accept; }}")
        lines.append(f"flush chain {TABLE} {chain}")
    for family, match in pods.items():
        lines += [f"add rule {TABLE} {rule}" for rule in _rules(family, match)]
    return "\n".join(lines) + "\n"


_CHAINS = {
    "guard": "type filter hook prerouting priority -300",
    "judge_arriving": "type filter hook prerouting priority -101",
    "judge_own": "type filter hook output priority -101",
    "lead_arriving": "type nat hook prerouting priority -100",
    "lead_own": "type nat hook output priority -100",
    "silence": "type filter hook input priority -10",
}
"""Judged behind conntrack and ahead of every translation."""


def containers(families: Iterable[Family]) -> dict[str, str]:
    """The maps and sets, with kind and type."""
    found = {}
    for family in families:
        key, suffix = f"{_TYPE[family]} . {_SERVICE}", str(family.value)
        for name in CLASSES.values():
            found[name + suffix] = f"map type {key} : inet_service;"
        found["ranged" + suffix] = f"set type {key};"
        ends = f"{_TYPE[family]} . inet_service . {_TYPE[family]}"
        for protocol in PROTOCOLS:
            found[_allowed(protocol, family)] = f"set type {ends}; flags interval;"
    return found


def _rules(family: Family, pods: PodMatch | None) -> Iterator[str]:
    ip, suffix, relay = _IP[family], str(family.value), RELAY[family]
    key = f"{ip} daddr . meta l4proto . th dport"
    # Nobody else may call a door by its own address.
    yield f'guard iifname != "lo" {ip} daddr {relay} drop'
    yield (
        f"silence meta l4proto {{ tcp, udp }} {ip} daddr {relay} th dport {SILENT} "
        f"counter name {NO_LOCAL} drop"
    )
    is_pod, is_other = _matches(ip, pods)
    classes = {
        "arriving": [*([(is_pod, "pod")] if is_pod else []), (is_other, "external")],
        "own": [("", "node")],
    }
    target = relay if family is Family.V4 else f"[{relay}]"
    for side, matches in classes.items():
        first = 'iifname != "lo" ' if side == "arriving" else ""
        for protocol in PROTOCOLS:
            yield (
                f"judge_{side} {first}meta l4proto {protocol.value.lower()} ct state new "
                f"{key} @ranged{suffix} {ip} daddr . th dport . {ip} saddr "
                f"!= @{_allowed(protocol, family)} counter name {SOURCE_RANGE} drop"
            )
        for match, name in matches:
            yield (
                f"lead_{side} {first}meta l4proto {{ tcp, udp }} {match}"
                f"dnat {ip} to {target} : {key} map @{name}{suffix}"
            )


def _matches(ip: str, pods: PodMatch | None) -> tuple[str, str]:
    """What a pod's packet and another's look like; without a detector all look alike (D2)."""
    if pods is None:
        return "", ""
    if pods.prefix:
        return f"{ip} saddr {pods.prefix} ", f"{ip} saddr != {pods.prefix} "
    device = pods.device or f"{pods.device_prefix}*"
    return f'iifname "{device}" ', f'iifname != "{device}" '


def change(held: Elements, wanted: Elements) -> tuple[str, list[Element]]:
    """The transaction that turns one content into another, and what it touches."""
    deleted = [key for key, value in held.items() if wanted.get(key) != value]
    added = [key for key, value in wanted.items() if held.get(key) != value]
    lines = [*_statements("delete", deleted, {}), *_statements("add", added, wanted)]
    return "".join(lines), list(dict.fromkeys((*deleted, *added)))


def _statements(verb: str, keys: Iterable[Element], values: Elements) -> Iterator[str]:
    by_container: dict[str, list[str]] = {}
    for element in keys:
        value = values.get(element, "")
        text = f"{element.key} : {value}" if value else element.key
        by_container.setdefault(element.container, []).append(text)
    for container, texts in by_container.items():
        yield f"{verb} element {TABLE} {container} {{ {', '.join(texts)} }}\n"


_CONTAINER = re.compile(r"\t(map|set) (\S+) \{\n(.*?)\n\t\}", re.DOTALL)
_ELEMENTS = re.compile(r"\n?\t\telements = \{(.*?)\}", re.DOTALL)


def parse(listing: str) -> tuple[str, dict[Element, str]]:
    """Split what `nft -n -s list table` prints into the rules around and the elements."""
    found = {}
    for kind, container, body in _CONTAINER.findall(listing):
        match = _ELEMENTS.search(body)
        for text in match[1].split(",") if match else ():
            key, _, value = (
                text.strip().rpartition(" : ") if kind == "map" else (text.strip(), "", "")
            )
            found[Element(container, key)] = value
    return _ELEMENTS.sub("", listing), found
