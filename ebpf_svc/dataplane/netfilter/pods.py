"""What tells a pod's packet to netfilter: the local detector (D1) as something rules can match."""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_svc.config import DetectLocalMode, Settings
from ebpf_svc.model.net import Family, family_of


@dataclass(frozen=True, slots=True)
class PodMatch:
    """The one thing that says that a packet is a pod's; the others are empty."""

    prefix: str = ""
    """Its source is inside."""
    device: str = ""
    """It comes in through this device, a bridge."""
    device_prefix: str = ""
    """It comes in through a device whose name begins so."""


def pod_match(settings: Settings, family: Family) -> PodMatch | None:
    """How rules of a family tell pods; None = they cannot (D2).

    In mode NodeCIDR the settings must have been completed by `config.detect.with_pod_cidrs`.
    """
    detect = settings.detect_local
    if detect.mode is DetectLocalMode.BRIDGE_INTERFACE:
        return PodMatch(device=detect.bridge_interface)
    if detect.mode is DetectLocalMode.INTERFACE_NAME_PREFIX:
        return PodMatch(device_prefix=detect.interface_name_prefix)
    prefixes = (prefix for prefix in settings.cluster_cidrs if family_of(prefix) is family)
    first = next(prefixes, None)
    return None if first is None else PodMatch(prefix=first)
