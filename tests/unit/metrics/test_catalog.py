"""The names are a contract: with kube-proxy's dashboards, and with ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.dataplane.fake import FakeDataplane
from ebpf_svc.metrics import catalog
from ebpf_svc.metrics.catalog import Kind, Spec
from ebpf_svc.metrics.reference import reference
from ebpf_svc.metrics.server import Metrics
from ebpf_svc.model.net import Family
from tests.unit.metrics.collected import Collected

H, G, C = Kind.HISTOGRAM, Kind.GAUGE, Kind.COUNTER
EVERYWHERE: tuple[str, ...] = ()

KUBE_PROXY: dict[str, tuple[Kind, tuple[str, ...], tuple[str, ...]]] = {
    "sync_proxy_rules_duration_seconds": (H, ("ip_family",), EVERYWHERE),
    "sync_proxy_rules_last_queued_timestamp_seconds": (G, ("ip_family",), EVERYWHERE),
    "sync_proxy_rules_last_timestamp_seconds": (G, ("ip_family",), EVERYWHERE),
    "sync_proxy_rules_endpoint_changes_pending": (G, (), EVERYWHERE),
    "sync_proxy_rules_endpoint_changes_total": (C, (), EVERYWHERE),
    "sync_proxy_rules_service_changes_pending": (G, (), EVERYWHERE),
    "sync_proxy_rules_service_changes_total": (C, (), EVERYWHERE),
    "proxy_healthz_total": (C, ("code",), EVERYWHERE),
    "proxy_livez_total": (C, ("code",), EVERYWHERE),
    "network_programming_duration_seconds": (H, ("ip_family",), EVERYWHERE),
    "sync_proxy_rules_no_local_endpoints_total": (G, ("traffic_policy", "ip_family"), EVERYWHERE),
    "sync_full_proxy_rules_duration_seconds": (H, ("ip_family",), ("iptables", "nftables")),
    "sync_partial_proxy_rules_duration_seconds": (H, ("ip_family",), ("iptables", "nftables")),
    "sync_proxy_rules_iptables_restore_failures_total": (C, ("ip_family",), ("iptables", "ipvs")),
    "sync_proxy_rules_iptables_partial_restore_failures_total": (C, ("ip_family",), ("iptables",)),
    "sync_proxy_rules_iptables_total": (G, ("table", "ip_family"), ("iptables",)),
    "sync_proxy_rules_iptables_last": (G, ("table", "ip_family"), ("iptables",)),
    "iptables_ct_state_invalid_dropped_packets_total": (C, (), ("iptables",)),
    "iptables_localhost_nodeports_accepted_packets_total": (C, (), ("iptables",)),
    "conntrack_reconciler_sync_duration_seconds": (H, ("ip_family",), catalog.NOT_EBPF),
    "conntrack_reconciler_deleted_entries_total": (C, ("ip_family",), catalog.NOT_EBPF),
    "sync_proxy_rules_nftables_sync_failures_total": (C, ("ip_family",), ("nftables",)),
    "sync_proxy_rules_nftables_cleanup_failures_total": (C, ("ip_family",), ("nftables",)),
}
"""Section 3.7 of the behaviour notes: type, labels, where registered."""

SPECS = {spec.name: spec for spec in catalog.specs()}


@pytest.mark.parametrize("name", KUBE_PROXY)
def test_metric_of_kube_proxy_has_its_type_and_labels(name: str) -> None:
    """Dashboards and alerts made for kube-proxy find what they look for (3.7, MX1)."""
    spec = SPECS[f"kubeproxy_{name}"]
    assert (spec.kind, spec.labels, spec.modes) == KUBE_PROXY[name]


def test_no_other_name_looks_like_kube_proxys() -> None:
    """What is ours says so."""
    assert {name for name in SPECS if name.startswith("kubeproxy_")} == {
        f"kubeproxy_{name}" for name in KUBE_PROXY
    }


def test_buckets_are_kube_proxys() -> None:
    """Quantiles of mixed clusters need equal buckets."""
    durations = [each for each in SPECS.values() if each.name in _durations()]
    assert durations
    for spec in durations:
        assert spec.buckets == tuple(0.001 * 2**i for i in range(15)), spec.name
    programming = SPECS["kubeproxy_network_programming_duration_seconds"].buckets
    assert programming[:4] == (0.25, 0.5, 1, 2)
    assert programming[60:63] == (59, 60, 65)
    assert programming[-8:] == (115, 120, 150, 180, 210, 240, 270, 300)


def _durations() -> set[str]:
    return {
        f"kubeproxy_{name}"
        for name, (kind, *_) in KUBE_PROXY.items()
        if kind is H and name != "network_programming_duration_seconds"
    }


@pytest.mark.parametrize("spec", list(catalog.specs()), ids=lambda spec: spec.name)
def test_names_follow_the_rules_of_prometheus(spec: Spec) -> None:
    """Counters end in _total and times in _seconds; each has a sentence."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
    assert spec.name.endswith("_total") or spec.kind is not C
    assert spec.help.endswith(".")
    assert bool(spec.buckets) is (spec.kind is H)


def registered(mode: str) -> Iterator[str]:
    dataplane = FakeDataplane()
    dataplane.name = mode
    metrics = Metrics(dataplane, tuple(Family))
    for registry in (metrics.registry, metrics.slis):
        yield from Collected(registry).families


def base(spec: Spec) -> str:
    """As the text format's parser calls a family."""
    return spec.name.removesuffix("_total") if spec.kind is C else spec.name


def test_everything_registered_is_in_the_catalog() -> None:
    """The reference leaves nothing out."""
    known = {base(spec) for spec in SPECS.values()}
    assert set(registered("ebpf")) <= known


def test_metrics_of_other_modes_are_not_registered() -> None:
    """A series that stays at zero for ever would be taken for good news."""
    there = set(registered("ebpf"))
    assert not there & {base(spec) for spec in SPECS.values() if not spec.serves("ebpf")}
    full = base(catalog.FULL_SYNC_DURATION)
    assert full in set(registered("nftables"))
    assert full not in set(registered("ipvs"))


def test_registry_of_a_caller_is_not_the_global_one() -> None:
    """Two agents in one process do not meet."""
    one, other = Metrics(FakeDataplane(), (Family.V4,)), Metrics(FakeDataplane(), (Family.V4,))
    one.answered("healthz", 200)
    assert "kubeproxy_proxy_healthz_total" not in Collected(other.registry).names


def test_reference_names_every_metric_with_its_labels() -> None:
    """The page users read comes from the code."""
    text = reference()
    for spec in SPECS.values():
        assert f"`{spec.name}`" in text
    assert "| `ebpf_svc_dropped_packets_total` | counter | reason |" in text


def test_page_is_up_to_date() -> None:
    """python -m ebpf_svc.metrics.reference > docs/metrics.md writes it."""
    assert (Path(__file__).parents[3] / "docs" / "metrics.md").read_text() == reference()
