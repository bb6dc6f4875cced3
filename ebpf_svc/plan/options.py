"""What the administrator decided about plans, in the planner's words."""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.errors import ConfigError
from ebpf_svc.model.net import Family, canonical_prefix, family_of

NODE_PORT_WORDS = frozenset({"primary", "localhost", "all"})
"""Words `node_port_addresses` takes besides prefixes (A5, Q3)."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Settings that change plans."""

    families: tuple[Family, ...] = (Family.V4, Family.V6)
    """Families this node serves; services of another are left out (M2)."""
    node_port_addresses: tuple[str, ...] = ()
    """Canonical prefixes and `NODE_PORT_WORDS`; empty = all local addresses (A1)."""
    masquerade_all: bool = False
    """Masquerade everything sent to cluster IPs (D3)."""
    local_detector: frozenset[Family] = frozenset()
    """Families in which pods can be told from outside clients (D1); in the others matrix rows
    change (D2).
    """
    allow_external_ips: bool = True
    """False: external IPs get no frontend, though they still count as one for policies (F8,
    F21)."""

    @classmethod
    def from_settings(cls, settings: Settings) -> PlanOptions:
        """Pick what the plan needs; raises ConfigError for a prefix or word that is none."""
        return cls(
            families=settings.families,
            node_port_addresses=tuple(
                text if text in NODE_PORT_WORDS else _prefix("node_port_addresses", text)
                for text in settings.node_port_addresses
            ),
            masquerade_all=settings.masquerade_all,
            local_detector=frozenset(
                family_of(_prefix("cluster_cidrs", text)) for text in settings.cluster_cidrs
            ),
            allow_external_ips=settings.allow_external_ips,
        )


def _prefix(path: str, text: str) -> str:
    try:
        return canonical_prefix(text)
    except ValueError as error:
        raise ConfigError(path, got=text, expected="a prefix such as 10.0.0.0/8") from error
