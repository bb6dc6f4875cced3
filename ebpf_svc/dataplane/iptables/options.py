"""What of the settings, and of this host, changes rules."""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.netfilter.pods import PodMatch, pod_match
from ebpf_svc.model.net import Family


@dataclass(frozen=True, slots=True)
class RuleOptions:
    """How rules of one family look on this node."""

    family: Family
    pods: PodMatch | None = None
    """None = pods look like anybody else (D2)."""
    mark: int = 1 << 14
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
        return cls(
            family=family,
            pods=pod_match(settings, family),
            mark=1 << settings.masquerade_bit,
            has_recent=has_recent,
            has_random_fully=has_random_fully,
            has_sctp=has_sctp,
            drops_invalid=drops_invalid,
        )
