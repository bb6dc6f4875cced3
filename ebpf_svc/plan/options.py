"""What the administrator decided about plans, in the planner's words."""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.config.detect import detector_families
from ebpf_svc.model.net import EVERYWHERE, Family


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Settings that change plans."""

    families: tuple[Family, ...] = (Family.V4, Family.V6)
    """Families this node serves; services of another are left out (M2)."""
    node_port_addresses: tuple[str, ...] = ()
    """Canonical prefixes and the words primary, localhost, all; empty = all local addresses
    (A1).
    """
    localhost_node_ports: bool = True
    """False: loopback serves no NodePort, whatever the selection says."""
    masquerade_all: bool = False
    """Masquerade everything sent to cluster IPs (D3)."""
    local_detector: frozenset[Family] = frozenset()
    """Families in which pods can be told from outside clients (D1); in the others matrix rows
    change (D2).
    """
    external_ip_ranges: tuple[str, ...] = EVERYWHERE
    """Canonical prefixes. External IPs outside get no frontend, though they still count as one for
    policies (F8, F21).
    """

    @classmethod
    def from_settings(cls, settings: Settings) -> PlanOptions:
        """Pick what the plan needs."""
        return cls(
            families=settings.families,
            node_port_addresses=settings.node_port_addresses,
            localhost_node_ports=settings.localhost_node_ports,
            masquerade_all=settings.masquerade_all,
            local_detector=detector_families(settings),
            external_ip_ranges=external_ip_ranges(settings),
        )


def external_ip_ranges(settings: Settings) -> tuple[str, ...]:
    """The prefixes in which external IPs are honoured."""
    allowed = settings.allow_external_ips
    if isinstance(allowed, tuple):
        return allowed
    return EVERYWHERE if allowed else ()
