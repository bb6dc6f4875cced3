"""What the sync loop tells, and what comes out for collectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry

from ebpf_svc.dataplane.base import ApplyReport, Reconciled
from ebpf_svc.errors import ApplyError, DataplaneError
from ebpf_svc.metrics.sync import SyncMetrics
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.net import Family
from ebpf_svc.model.snapshot import Problem, Snapshot
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.sync import Synced
from tests.lib.builders import (
    make_endpoints,
    make_name,
    make_service,
    make_snapshot,
    ready,
)
from tests.unit.metrics.collected import Collected

STARTED_AT = 1_790_000_000.0
CHANGES = "kubeproxy_sync_proxy_rules_{}_changes_{}"
PROGRAMMING = "kubeproxy_network_programming_duration_seconds"
LATENCY = "ebpf_svc_event_to_kernel_duration_seconds"
WEB, API = make_service("web"), make_service("api", cluster_ip="10.96.0.11")


@dataclass
class Rig:
    """Metrics fed by hand, with clocks that only move when told."""

    mode: str = "ebpf"
    passed_s: float = 0.0
    registry: CollectorRegistry = field(
        default_factory=lambda: CollectorRegistry(auto_describe=False)
    )

    def __post_init__(self) -> None:
        self.metrics = SyncMetrics(
            self.registry,
            tuple(Family),
            mode=self.mode,
            wall=lambda: STARTED_AT + self.passed_s,
            monotonic=lambda: 100.0 + self.passed_s,
        )
        self._revision = 0
        self._planner = Planner(PlanOptions())

    def queue(self, snapshot: Snapshot, *, since_s: float = 0.0) -> None:
        """Let the loop take up a snapshot whose oldest change came at that second."""
        self._revision += 1
        self.snapshot = replace(snapshot, revision=self._revision, since_s=100.0 + since_s)
        self.metrics.queued(self.snapshot)

    def apply(
        self,
        *failed: ApplyError,
        resync: bool = False,
        details: Mapping[str, int] | None = None,
        repaired: tuple[str, ...] = (),
        problems: tuple[Problem, ...] = (),
        reconciled: tuple[Reconciled, ...] = (),
    ) -> None:
        desired = self._planner.plan(self.snapshot)
        report = ApplyReport(
            failed=failed, details=details or {}, repaired=repaired, reconciled=reconciled
        )
        desired = DesiredState(desired.plans, problems=problems)
        self.metrics.applied(Synced(desired, report, resync, plan_s=0.002, apply_s=0.01))

    def collect(self) -> Collected:
        return Collected(self.registry)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def slice_of(
    address: str, *, service: str = "web", trigger_s: float | None = None
) -> EndpointSlice:
    """A slice changed so many seconds after the agent's start; None = it does not say."""
    made = make_endpoints(service, ready(address))
    return made if trigger_s is None else replace(made, trigger_time_s=STARTED_AT + trigger_s)


def test_hung_sync_shows_in_the_two_timestamps(rig: Rig) -> None:
    """Queued later than synced: this is what alerts compare (MX5)."""
    rig.queue(make_snapshot(WEB))
    rig.passed_s = 1.0
    rig.apply()
    rig.passed_s = 60.0
    rig.queue(make_snapshot(WEB))
    for label in ("IPv4", "IPv6"):
        collected = rig.collect()
        name = "kubeproxy_sync_proxy_rules_last_{}timestamp_seconds"
        assert collected.value(name.format("queued_"), ip_family=label) == STARTED_AT + 60
        assert collected.value(name.format(""), ip_family=label) == STARTED_AT + 1


def test_changes_are_counted_and_pend_until_applied(rig: Rig) -> None:
    """Services and slices that are new objects, each once a sync (M5, M6)."""

    def changes(of: str) -> tuple[float, float]:
        collected = rig.collect()
        pending = collected.value(CHANGES.format(of, "pending"))
        return collected.value(CHANGES.format(of, "total")), pending

    first = slice_of("10.1.0.1")
    rig.queue(make_snapshot(WEB, API, first))
    assert (changes("service"), changes("endpoint")) == ((2, 2), (1, 1))
    rig.apply()
    assert (changes("service"), changes("endpoint")) == ((2, 0), (1, 0))
    rig.queue(make_snapshot(WEB, API, slice_of("10.1.0.2")))
    rig.metrics.failed(DataplaneError("no"))
    rig.queue(make_snapshot(WEB, slice_of("10.1.0.3")))
    assert (changes("service"), changes("endpoint")) == ((3, 1), (3, 2))
    rig.apply()
    rig.queue(make_snapshot(WEB))
    assert changes("endpoint") == (4, 1)


def test_read_back_of_the_same_snapshot_changes_nothing(rig: Rig) -> None:
    """The periodic look is no change."""
    rig.queue(make_snapshot(WEB))
    rig.apply()
    before = rig.collect().value(CHANGES.format("service", "total"))
    rig.metrics.queued(rig.snapshot)
    rig.apply(resync=True)
    after = rig.collect()
    assert after.value(CHANGES.format("service", "total")) == before
    assert after.value("ebpf_svc_apply_duration_seconds_count", resync="true") == 1
    assert after.value("ebpf_svc_apply_duration_seconds_count", resync="false") == 1


def test_programming_latency_counts_from_the_trigger(rig: Rig) -> None:
    """One sample for each change since the agent's start, in its family, on success (E10)."""
    rig.queue(make_snapshot(WEB, slice_of("10.1.0.1", trigger_s=-5.0)))
    rig.apply()
    assert rig.collect().value(f"{PROGRAMMING}_count", ip_family="IPv4") == 0
    rig.queue(make_snapshot(WEB, slice_of("10.1.0.2", trigger_s=10.0)))
    rig.metrics.failed(DataplaneError("no"))
    rig.queue(make_snapshot(WEB, slice_of("10.1.0.3", trigger_s=11.0)))
    rig.passed_s = 12.0
    rig.apply()
    collected = rig.collect()
    assert collected.value(f"{PROGRAMMING}_count", ip_family="IPv4") == 2
    assert collected.value(f"{PROGRAMMING}_sum", ip_family="IPv4") == pytest.approx(3.0)
    assert collected.value(f"{PROGRAMMING}_count", ip_family="IPv6") == 0


def test_trigger_is_observed_once(rig: Rig) -> None:
    """A slice that did not change says nothing new, whatever else does."""
    kept = slice_of("10.1.0.1", trigger_s=1.0)
    rig.passed_s = 2.0
    rig.queue(make_snapshot(WEB, kept))
    rig.apply()
    rig.queue(make_snapshot(WEB, API, kept, slice_of("10.1.0.9", service="api")))
    rig.apply()
    assert rig.collect().value(f"{PROGRAMMING}_count", ip_family="IPv4") == 1


def test_deleted_slice_takes_its_trigger_along(rig: Rig) -> None:
    """Its time is that of the change before (E10)."""
    rig.queue(make_snapshot(WEB, slice_of("10.1.0.1", trigger_s=1.0)))
    rig.queue(make_snapshot(WEB))
    rig.apply()
    assert rig.collect().value(f"{PROGRAMMING}_count", ip_family="IPv4") == 0


def test_trigger_of_a_clock_ahead_is_no_negative_latency(rig: Rig) -> None:
    """The controller's clock need not be ours."""
    rig.queue(make_snapshot(WEB, slice_of("10.1.0.1", trigger_s=30.0)))
    rig.apply()
    collected = rig.collect()
    assert collected.value(f"{PROGRAMMING}_count", ip_family="IPv4") == 1
    assert collected.value(f"{PROGRAMMING}_sum", ip_family="IPv4") == 0


def test_event_latency_counts_from_the_oldest_change(rig: Rig) -> None:
    """Failed tries in between and the pause belong to it; the start does not."""
    rig.queue(make_snapshot(WEB), since_s=0.0)
    rig.passed_s = 3.0
    rig.apply()
    assert rig.collect().value(f"{LATENCY}_count") == 0
    rig.queue(make_snapshot(WEB, API), since_s=3.0)
    rig.metrics.failed(DataplaneError("no"))
    rig.queue(make_snapshot(API), since_s=3.5)
    rig.passed_s = 4.0
    rig.apply()
    rig.metrics.queued(rig.snapshot)
    rig.apply(resync=True)
    collected = rig.collect()
    assert collected.value(f"{LATENCY}_count") == 1
    assert collected.value(f"{LATENCY}_sum") == pytest.approx(1.0)


def test_sync_duration_is_plan_and_apply(rig: Rig) -> None:
    """Each family shows the apply that carried both."""
    rig.queue(make_snapshot(WEB))
    rig.apply()
    collected = rig.collect()
    name = "kubeproxy_sync_proxy_rules_duration_seconds_sum"
    assert collected.value(name, ip_family="IPv4") == pytest.approx(0.012)
    assert collected.value(name, ip_family="IPv6") == pytest.approx(0.012)
    assert collected.value("ebpf_svc_plan_duration_seconds_sum") == pytest.approx(0.002)


def test_failures_are_counted_and_gone_when_they_are(rig: Rig) -> None:
    """Refused applies count up; service ports that fail are a gauge, by family."""
    rig.queue(make_snapshot(WEB, slice_of("10.1.0.1")))
    rig.metrics.failed(DataplaneError("no"))
    assert rig.collect().value("ebpf_svc_ready") == 0
    rig.apply(ApplyError("default/web/TCP/IPv4", "full"))
    collected = rig.collect()
    assert collected.value("ebpf_svc_sync_failures_total") == 1
    assert collected.values("ebpf_svc_failed_service_ports", "ip_family") == {"IPv4": 1, "IPv6": 0}
    rig.apply()
    collected = rig.collect()
    assert collected.values("ebpf_svc_failed_service_ports", "ip_family") == {"IPv4": 0, "IPv6": 0}
    assert collected.value("ebpf_svc_ready") == 1


def test_writes_repairs_and_problems_are_counted(rig: Rig) -> None:
    """What an apply wrote, by table; what a look put right; what is wrong with objects."""
    bad = Problem("web.yaml", "Service default/x", "spec.ports", "is required")
    rig.queue(replace(make_snapshot(WEB), problems=(bad, bad)))
    rig.apply(details={"frontends4": 3, "slots": 7})
    rig.apply(details={"slots": 1}, repaired=("a", "b"), problems=(bad,))
    collected = rig.collect()
    assert collected.values("ebpf_svc_writes_total", "map") == {"frontends4": 3, "slots": 8}
    assert collected.value("ebpf_svc_repairs_total") == 2
    assert collected.values("ebpf_svc_problems", "kind") == {"invalid": 2, "conflict": 1}


def test_extent_of_syncs_is_told_where_the_mode_has_it() -> None:
    """Full and partial, for modes that know the difference."""
    rig = Rig(mode="nftables")
    rig.queue(make_snapshot(WEB))
    rig.apply(resync=True)
    rig.apply()
    rig.apply()
    collected = rig.collect()
    name = "kubeproxy_sync_{}_proxy_rules_duration_seconds_count"
    assert collected.value(name.format("full"), ip_family="IPv4") == 1
    assert collected.value(name.format("partial"), ip_family="IPv4") == 2


def test_one_change_among_many_costs_the_loop_little(rig: Rig) -> None:
    """One changed slice is found without looking into the others."""
    names = [make_name(f"s{number}") for number in range(1000)]
    slices = {name: (slice_of("10.1.0.1", service=str(name)),) for name in names}
    snapshot = replace(make_snapshot(), slices=slices)
    rig.queue(snapshot)
    calls: list[object] = []
    original = rig.metrics._compare
    rig.metrics._compare = lambda *args: (calls.append(args), original(*args))[1]  # type: ignore[method-assign]
    name = make_name("s77")
    rig.queue(replace(snapshot, slices=slices | {name: (slice_of("10.1.0.2", service="s77"),)}))
    assert [args[0] for args in calls] == [name]  # type: ignore[index]


def test_metrics_of_a_mode_come_and_go_with_it() -> None:
    """After a switch a collector sees what the mode that serves has, and no other's."""
    full, deleted = (
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count",
        "kubeproxy_conntrack_reconciler_deleted_entries_total",
    )
    rig = Rig(mode="ebpf")
    rig.queue(make_snapshot(WEB))
    rig.apply(resync=True, reconciled=(Reconciled(Family.V4, 3, 0.01),))
    assert {full, deleted}.isdisjoint(rig.collect().names)
    rig.metrics.serve("nftables")
    rig.apply(resync=True, reconciled=(Reconciled(Family.V4, 3, 0.01),))
    assert rig.collect().value(full, ip_family="IPv4") == 1
    assert rig.collect().value(deleted, ip_family="IPv4") == 3
    rig.metrics.serve("ipvs")
    rig.apply(reconciled=(Reconciled(Family.V4, 2, 0.01),))
    assert full not in rig.collect().names
    assert rig.collect().value(deleted, ip_family="IPv4") == 5
