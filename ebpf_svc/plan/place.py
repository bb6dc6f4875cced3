"""Where this node stands: the facts about it that decide plans, apart from those that do not."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ebpf_svc.model.net import EVERYWHERE, Family, Network, family_of, parse_prefix
from ebpf_svc.model.snapshot import NodeFacts

WILDCARD = {Family.V4: "0.0.0.0", Family.V6: "::"}
LOOPBACK = {Family.V4: "127.0.0.1", Family.V6: "::1"}
"""The one loopback address NodePorts answer on; the socket hooks map others to it."""
_WORD_PREFIXES = {
    "localhost": ("127.0.0.0/8", "::1/128"),
    "all": EVERYWHERE,
}


@dataclass(frozen=True, slots=True)
class Place:
    """What endpoint choice depends on: where an endpoint is local, which hints name this node."""

    node_name: str
    zone: str
    """Empty = none (T8)."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """What the frontends of one family depend on."""

    node_ip: str | None
    """The family's first address of the Node object (N1)."""
    node_ports: tuple[str, ...]
    """Where NodePorts answer, loopback included if selected; sorted."""
    listening: tuple[str, ...]
    """Where health checks listen (H1): the same, or the wildcard where nothing restricts it."""


def place_of(node: NodeFacts) -> Place:
    """Extract what endpoint choice depends on."""
    return Place(node.name, node.zone)


def addresses_of(
    node: NodeFacts,
    families: Iterable[Family],
    selection: tuple[str, ...],
    *,
    localhost: bool = True,
) -> Mapping[Family, Addresses]:
    """Extract what frontends depend on, each family apart.

    Args:
        node: this node.
        families: those served.
        selection: prefixes and words, as in `PlanOptions.node_port_addresses`.
        localhost: the selection may select loopback.
    """
    result = {}
    for family in families:
        own = (address for address in node.addresses if family_of(address) is family)
        node_ip = next(own, None)
        prefixes = [parse_prefix(text) for text in _prefixes(selection, family, node_ip)]
        # No prefix of this family leaves it open, even if the other one is restricted (A2).
        is_open = not prefixes or any(prefix.prefixlen == 0 for prefix in prefixes)
        selected = _selected(node.local_addresses, family, None if is_open else prefixes)
        if not localhost:
            selected = tuple(address for address in selected if address != LOOPBACK[family])
        result[family] = Addresses(node_ip, selected, (WILDCARD[family],) if is_open else selected)
    return result


def _selected(
    local_addresses: Iterable[str], family: Family, prefixes: Iterable[Network] | None
) -> tuple[str, ...]:
    """Apply rules A1-A5, P15 and Q3; no prefixes select everything.

    Loopback is selected by its own prefix, by `localhost`, or where nothing restricts the family;
    link-local IPv6 addresses never are: they mean nothing without an interface.
    """
    selected = set()
    for text in (*local_addresses, LOOPBACK[family]):
        if family_of(text) is not family:
            continue
        address = ipaddress.ip_address(text)
        if address.is_loopback and text != LOOPBACK[family]:
            continue
        if family is Family.V6 and address.is_link_local:
            continue
        if prefixes is None or any(address in prefix for prefix in prefixes):
            selected.add(text)
    return tuple(sorted(selected))


def _prefixes(selection: tuple[str, ...], family: Family, node_ip: str | None) -> Iterable[str]:
    """The prefixes of a family a selection stands for."""
    for text in selection:
        if text != "primary":
            for prefix in _WORD_PREFIXES.get(text, (text,)):
                if family_of(prefix) is family:
                    yield prefix
        elif node_ip is not None and not ipaddress.ip_address(node_ip).is_loopback:
            yield f"{node_ip}/{32 if family is Family.V4 else 128}"
