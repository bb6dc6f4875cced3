"""Telling pods from others: what the modes of D1 come to."""

from __future__ import annotations

import pytest

from ebpf_svc.config import DetectLocal, DetectLocalMode, Settings
from ebpf_svc.config.detect import detector_families, prepare, with_pod_cidrs
from ebpf_svc.config.sanity import check_node
from ebpf_svc.errors import ConfigError
from ebpf_svc.model.net import Family
from ebpf_svc.plan.options import PlanOptions

V4, V6 = Family.V4, Family.V6
CIDRS = ("10.244.0.0/16", "fd00::/56")


def by(mode: DetectLocalMode, **parameters: str) -> Settings:
    detect = DetectLocal(mode=mode, **parameters)
    return prepare(Settings(cluster_cidrs=CIDRS, detect_local=detect))


def test_cluster_cidrs_are_used_in_their_mode() -> None:
    """The default; a family without a prefix has no detector (D2)."""
    settings = prepare(Settings(cluster_cidrs=CIDRS[:1]))
    assert settings.cluster_cidrs == CIDRS[:1]
    assert detector_families(settings) == {V4}


def test_cluster_cidrs_are_not_used_in_other_modes() -> None:
    """D1: else a pod of another node would pass for a local one."""
    for mode in (DetectLocalMode.NODE_CIDR, DetectLocalMode.BRIDGE_INTERFACE):
        assert by(mode, bridge_interface="cni0").cluster_cidrs == ()


def test_prefix_of_names_joins_the_pod_devices() -> None:
    """InterfaceNamePrefix: what starts so is a pod's; once, however often it is prepared."""
    settings = by(DetectLocalMode.INTERFACE_NAME_PREFIX, interface_name_prefix="pod")
    assert settings.ebpf.pod_devices == (*Settings().ebpf.pod_devices, "pod*")
    assert prepare(settings) == settings


@pytest.mark.parametrize(
    "settings",
    [
        by(DetectLocalMode.BRIDGE_INTERFACE, bridge_interface="cni0"),
        by(DetectLocalMode.INTERFACE_NAME_PREFIX, interface_name_prefix="veth"),
    ],
)
def test_devices_detect_in_both_families(settings: Settings) -> None:
    """A device does not care for addresses, so the full matrix holds."""
    assert PlanOptions.from_settings(settings).local_detector == {V4, V6}


def test_node_cidr_takes_the_prefixes_of_the_node() -> None:
    """N3: they are known once the Node is; before, there is no detector."""
    settings = by(DetectLocalMode.NODE_CIDR)
    assert detector_families(settings) == frozenset()
    known = with_pod_cidrs(settings, ["10.244.1.0/24"])
    assert known.cluster_cidrs == ("10.244.1.0/24",)
    assert PlanOptions.from_settings(known).local_detector == {V4}


def test_node_without_a_prefix_of_a_served_family_is_refused() -> None:
    """A6: every pod would count as an outside client."""
    settings = by(DetectLocalMode.NODE_CIDR).model_copy(update={"families": (V6,)})
    with pytest.raises(ConfigError, match=r"podCIDRs.*'10.244.1.0/24', expected .* IPv6"):
        with_pod_cidrs(settings, ["10.244.1.0/24"])


def test_pod_cidrs_do_not_matter_in_other_modes() -> None:
    """ClusterCIDR keeps what it was given."""
    settings = Settings(cluster_cidrs=CIDRS)
    assert with_pod_cidrs(settings, ["10.1.0.0/24"]) is settings


def test_cluster_cidr_of_the_wrong_family_is_refused() -> None:
    """A6: fatal on a single-stack node; a dual-stack node or an unknown one takes it."""
    settings = Settings(cluster_cidrs=CIDRS[:1])
    with pytest.raises(ConfigError, match=r"clusterCIDRs: got '10.244.0.0/16', expected .* IPv6"):
        check_node(settings, frozenset({V6}))
    check_node(settings, frozenset({V4, V6}))
    check_node(settings, frozenset())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, ["nodePortAddresses is unset"]),
        ({"node_port_addresses": ("primary",)}, []),
        ({"node_port_addresses": ("10.0.0.0/8",)}, ["names no IPv6 prefix"]),
        ({"node_port_addresses": ("10.0.0.0/8", "::/0")}, []),
        (
            {"node_port_addresses": ("all",), "bind_address": "fd00::1"},
            ["bindAddress fd00::1 is of a family"],
        ),
        ({"node_port_addresses": ("all",), "metrics_bind_address": "[::1]:1"}, []),
        ({"node_port_addresses": ("all",), "healthz_bind_address": ""}, []),
    ],
)
def test_what_does_not_fit_the_node_is_told(fields: dict[str, object], told: list[str]) -> None:
    """A1, A2, A6: accepted, but somebody should know."""
    found = check_node(Settings.model_validate(fields), frozenset({V4}))
    assert len(found) == len(told)
    assert all(part in sentence for part, sentence in zip(told, found, strict=True))
