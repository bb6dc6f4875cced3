"""What the ways of telling pods (D1) come to: prefixes of sources, patterns of devices."""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_svc.config.settings import DetectLocalMode, Settings
from ebpf_svc.errors import ConfigError
from ebpf_svc.model.net import Family, family_of

BY_DEVICE = frozenset({DetectLocalMode.BRIDGE_INTERFACE, DetectLocalMode.INTERFACE_NAME_PREFIX})
"""Modes in which a packet's way in says whether its source is a pod."""


def prepare(settings: Settings) -> Settings:
    """Let `cluster_cidrs` and `pod_devices` say what `detect_local` means.

    Only ClusterCIDR uses `cluster_cidrs` as given (D1); NodeCIDR gets its prefixes from the Node,
    see `with_pod_cidrs`.
    """
    detect = settings.detect_local
    if detect.mode is DetectLocalMode.CLUSTER_CIDR:
        return settings
    ebpf = settings.ebpf
    pattern = f"{detect.interface_name_prefix}*"
    if detect.mode is DetectLocalMode.INTERFACE_NAME_PREFIX and pattern not in ebpf.pod_devices:
        ebpf = ebpf.model_copy(update={"pod_devices": (*ebpf.pod_devices, pattern)})
    return settings.model_copy(update={"cluster_cidrs": (), "ebpf": ebpf})


def with_pod_cidrs(settings: Settings, pod_cidrs: Iterable[str]) -> Settings:
    """In mode NodeCIDR, take the prefixes of pods from the Node's spec.podCIDRs.

    To be called once they are known, which kube-proxy awaits for 5 min (N3); other modes are left
    alone.

    Raises:
        ConfigError: no prefix is of a family that is served (A6).
    """
    if settings.detect_local.mode is not DetectLocalMode.NODE_CIDR:
        return settings
    known = tuple(pod_cidrs)
    served = tuple(prefix for prefix in known if family_of(prefix) in settings.families)
    if not served:
        families = " or ".join(family.label for family in settings.families)
        raise ConfigError(
            "spec.podCIDRs of the Node",
            got=", ".join(known) or None,
            expected=f"a prefix of {families}, since detectLocal.mode is NodeCIDR",
        )
    return settings.model_copy(update={"cluster_cidrs": served})


def detector_families(settings: Settings) -> frozenset[Family]:
    """Families in which pods can be told from outside clients; in the others D2 holds."""
    if settings.detect_local.mode in BY_DEVICE:
        return frozenset(settings.families)
    return frozenset(map(family_of, settings.cluster_cidrs))
