"""What of the settings, and of this host, changes rules."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.netfilter.pods import PodMatch, pod_match
from ebpf_svc.model.net import Family, family_of

_WORDS = {"localhost": ("127.0.0.0/8", "::1/128"), "all": ("0.0.0.0/0", "::/0")}


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """How rules of one family look on this node."""

    family: Family
    pods: PodMatch | None = None
    """None = pods look like anybody else (D2)."""
    mark: int = 1 << 14
    open_node_ports: bool = True
    """Node ports answer on every local address, whatever it is (I7)."""
    localhost: bool = True
    """Node ports answer on 127.0.0.1 as well; ::1 never does."""
    has_recent: bool = True
    """The kernel can remember clients (I12)."""
    has_random_fully: bool = True
    has_sctp: bool = True
    drops_invalid: bool = True
    """I4(a)."""

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        family: Family,
        *,
        has_recent: bool = True,
        has_random_fully: bool = True,
        has_sctp: bool = True,
        drops_invalid: bool = True,
    ) -> RuleOptions:
        """Pick what rules need; the rest is what this host was found to have."""
        is_open, loopback = _selection(settings.node_port_addresses, family)
        return cls(
            family=family,
            pods=pod_match(settings, family),
            mark=1 << settings.masquerade_bit,
            open_node_ports=is_open,
            # The kernel has no route_localnet for IPv6.
            localhost=family is Family.V4 and loopback and settings.localhost_node_ports,
            has_recent=has_recent,
            has_random_fully=has_random_fully,
            has_sctp=has_sctp,
            drops_invalid=drops_invalid,
        )


def _selection(selection: tuple[str, ...], family: Family) -> tuple[bool, bool]:
    """Whether all addresses are selected, and whether loopback is (A1-A3, A5).

    `primary` names addresses only the plan knows, so it never is all of them.
    """
    prefixes = [
        ipaddress.ip_network(prefix)
        for text in selection
        if text != "primary"
        for prefix in _WORDS.get(text, (text,))
        if family_of(prefix) is family
    ]
    if any(prefix.prefixlen == 0 for prefix in prefixes):
        return True, True
    if not prefixes and "primary" not in selection:
        return True, True
    loopback = ipaddress.ip_address("127.0.0.1" if family is Family.V4 else "::1")
    return False, any(loopback in prefix for prefix in prefixes)
