"""The sync loop's time table, with a clock that only moves when the loop waits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport, Support
from ebpf_svc.errors import ApplyError, DataplaneError
from ebpf_svc.model.desired import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKey,
    FrontendKind,
    FrontendView,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import ServicePortName
from ebpf_svc.model.snapshot import NodeFacts, Problem, Snapshot
from ebpf_svc.status import read_names
from ebpf_svc.sync import Synced, SyncLoop

WEB = PlanKey(ServicePortName("default", "web", "http", Protocol.TCP), Family.V4)
PLAN = ServicePlan(
    WEB,
    (Frontend(FrontendKey("10.96.0.1", 80, Protocol.TCP), FrontendKind.CLUSTER_IP),),
    (Backend("10.244.0.5", 8080), Backend("10.244.0.6", 8080)),
    has_endpoints=True,
)


class FakeClock:
    """Time that jumps to whatever the loop waits for; `at` makes things happen on the way."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self._events: list[tuple[float, Callable[[], None]]] = []

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something once the clock shows 100 + `time_s`."""
        self._events.append((100.0 + time_s, action))
        self._events.sort(key=lambda entry: entry[0])

    def now(self) -> float:
        return self.time_s

    def wait(self, event: threading.Event, timeout_s: float | None) -> None:
        deadline = self.time_s + timeout_s if timeout_s is not None else float("inf")
        while not event.is_set():
            if not self._events or self._events[0][0] > deadline:
                assert deadline < float("inf"), "the loop would wait forever"
                self.time_s = deadline
                return
            moment, action = self._events.pop(0)
            self.time_s = max(self.time_s, moment)
            action()


@dataclass
class FakeStore:
    changed: threading.Event = field(default_factory=threading.Event)
    current: Snapshot | None = None

    def snapshot(self) -> Snapshot | None:
        return self.current

    def change(self, *problems: Problem) -> None:
        """A new snapshot, as the watch would make it."""
        before = self.current or Snapshot(NodeFacts("node1"))
        self.current = replace(before, revision=before.revision + 1, problems=problems)
        self.changed.set()


@dataclass
class FakePlanner:
    """Every snapshot plans the same service."""

    plans: dict[PlanKey, ServicePlan] = field(default_factory=lambda: {WEB: PLAN})
    conflicts: tuple[Problem, ...] = ()

    def plan(self, snapshot: Snapshot) -> DesiredState:
        return DesiredState(self.plans, problems=self.conflicts, revision=snapshot.revision)


@dataclass
class Recorder:
    """A dataplane that notes when it was asked and answers what it is told."""

    clock: FakeClock
    took_s: float = 0.0
    answer: Callable[[int], ApplyReport] = lambda nth: ApplyReport()
    applied: list[tuple[float, int, bool]] = field(default_factory=list)
    name: str = "recorder"

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        self.applied.append((round(self.clock.now() - 100, 3), desired.revision, resync))
        self.clock.time_s += self.took_s
        return self.answer(len(self.applied))

    def check(self) -> Support:
        return Support(self.name, ())

    def open(self) -> None: ...
    def close(self) -> None: ...
    def cleanup(self) -> None: ...
    def read(self) -> dict[FrontendKey, FrontendView]:
        return {}


@dataclass
class Told:
    """An observer that keeps what it was told, with the time."""

    clock: FakeClock
    calls: list[tuple[float, str, object]] = field(default_factory=list)

    def started(self) -> None:
        self._note("started", None)

    def queued(self, snapshot: Snapshot) -> None:
        self._note("queued", snapshot.revision)

    def applied(self, synced: Synced) -> None:
        self._note("applied", synced)

    def failed(self, error: DataplaneError) -> None:
        self._note("failed", str(error))

    def _note(self, what: str, detail: object) -> None:
        self.calls.append((round(self.clock.now() - 100, 3), what, detail))


class Rig:
    """A loop with everything around it replaced."""

    def __init__(self, run_dir: Path) -> None:
        self.clock, self.store, self.planner = FakeClock(), FakeStore(), FakePlanner()
        self.dataplane = Recorder(self.clock)
        self.told = Told(self.clock)
        self.run_dir = run_dir
        self.ready_count = 0
        self.settings = Settings(
            node_name="node1", run_dir=run_dir, min_sync_period_s=1.0, resync_period_s=1000.0
        )

    def run(self, until_s: float) -> list[tuple[float, int, bool]]:
        """Run to that time; return (seconds, revision, resync) of each apply."""
        self.clock.at(until_s, self.loop.close)
        self.loop.run()
        return self.dataplane.applied

    @cached_property
    def loop(self) -> SyncLoop:
        """The loop, made from the settings of that moment."""

        def count_ready() -> None:
            self.ready_count += 1

        return SyncLoop(
            self.store,
            self.planner,
            self.dataplane,
            self.settings,
            self.clock,
            on_ready=count_ready,
            observers=(self.told,),
            jitter=lambda: 0.0,
        )

    def status(self) -> dict[str, object]:
        status: dict[str, object] = json.loads((self.run_dir / "status.json").read_text())
        return status


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "run")


def test_nothing_applied_before_the_store_is_in_sync(rig: Rig) -> None:
    """Events before the first full lists only accumulate (M4)."""
    rig.clock.at(1, rig.store.changed.set)
    rig.clock.at(5, rig.store.change)
    assert rig.run(until_s=10) == [(5.0, 1, False)]
    assert rig.ready_count == 1


def test_agent_without_snapshot_says_it_is_not_ready(rig: Rig) -> None:
    """A status left by an earlier agent must not look like this one's."""
    rig.run(until_s=1)
    status = rig.status()
    assert (status["ready"], status["revision"]) == (False, 0)
    assert not rig.dataplane.applied


def test_burst_of_changes_becomes_one_further_apply(rig: Rig) -> None:
    """The first run is immediate; what comes within the pause is carried by one run (R2, R6)."""
    rig.store.change()
    for milliseconds in range(1, 900, 10):
        rig.clock.at(milliseconds / 1000, rig.store.change)
    assert rig.run(until_s=10) == [(0.0, 1, False), (1.0, 91, False)]


def test_pause_counts_from_the_end_of_a_run(rig: Rig) -> None:
    """A slow apply is followed by the whole pause (R2)."""
    rig.dataplane.took_s = 3.0
    rig.store.change()
    rig.clock.at(0.5, rig.store.change)
    assert [when for when, *_ in rig.run(until_s=10)] == [0.0, 4.0]


def test_change_during_an_apply_is_not_lost(rig: Rig) -> None:
    """A change that arrives while the kernel is written is carried by the next run (R1, R6)."""

    def change_once(nth: int) -> ApplyReport:
        if nth == 1:
            rig.store.change()
        return ApplyReport()

    rig.dataplane.answer = change_once
    rig.store.change()
    assert rig.run(until_s=10) == [(0.0, 1, False), (1.0, 2, False)]


def test_failed_frontend_is_retried_later_and_later_until_it_works(rig: Rig) -> None:
    """Pauses double from 0.1 s up to the longest allowed; success ends them (R3)."""
    failing = ApplyReport(failed=(ApplyError("default/web:http", "no memory"),))
    rig.settings = rig.settings.model_copy(update={"min_sync_period_s": 0.0, "retry_max_s": 1.0})
    rig.dataplane.answer = lambda nth: failing if nth <= 7 else ApplyReport()
    rig.store.change()
    assert [when for when, *_ in rig.run(until_s=100)] == [0.0, 0.1, 0.3, 0.7, 1.5, 2.5, 3.5, 4.5]
    assert rig.status()["failed"] == []


def test_failed_frontend_is_told_and_the_rest_counts_as_applied(rig: Rig) -> None:
    """One frontend's failure never holds back the others: the agent is ready and names the one."""
    failing = ApplyReport(failed=(ApplyError("default/web:http", "no memory"),))
    rig.dataplane.answer = lambda nth: failing
    rig.store.change()
    rig.run(until_s=0.05)
    status = rig.status()
    assert (status["ready"], status["failed"]) == (
        True,
        [{"service": "default/web:http", "reason": "no memory"}],
    )


def test_success_resets_the_back_off(rig: Rig) -> None:
    """The next failure starts at 0.1 s again (R3)."""
    failing = ApplyReport(failed=(ApplyError("default/web:http", "busy"),))
    rig.settings = rig.settings.model_copy(update={"min_sync_period_s": 0.0})
    rig.dataplane.answer = lambda nth: failing if nth in (1, 2, 4) else ApplyReport()
    rig.store.change()
    rig.clock.at(10, rig.store.change)
    assert [when for when, *_ in rig.run(until_s=20)] == [0.0, 0.1, 0.3, 10.0, 10.1]


def test_new_event_cuts_the_retry_pause_short(rig: Rig) -> None:
    """A retry comes sooner when something changed (R3)."""
    failing = ApplyReport(failed=(ApplyError("default/web:http", "busy"),))
    rig.settings = rig.settings.model_copy(update={"min_sync_period_s": 0.01})
    rig.dataplane.answer = lambda nth: failing if nth == 1 else ApplyReport()
    rig.store.change()
    rig.clock.at(0.05, rig.store.change)
    assert rig.run(until_s=10) == [(0.0, 1, False), (0.05, 2, False)]


def test_dataplane_error_is_retried_with_a_read_back(rig: Rig) -> None:
    """Nobody knows how far a broken apply came: the next one reads the kernel first (R3)."""

    def break_twice(nth: int) -> ApplyReport:
        if nth <= 2:
            raise DataplaneError("netlink is gone")
        return ApplyReport()

    rig.settings = rig.settings.model_copy(update={"min_sync_period_s": 0.0})
    rig.dataplane.answer = break_twice
    rig.store.change()
    assert rig.run(until_s=10) == [(0.0, 1, False), (0.1, 1, True), (0.3, 1, True)]
    assert rig.ready_count == 1


def test_dataplane_error_leaves_the_agent_unready_and_says_why(rig: Rig) -> None:
    """Before the first apply that worked, ready stays false."""

    def broken(nth: int) -> ApplyReport:
        raise DataplaneError("netlink is gone")

    rig.dataplane.answer = broken
    rig.store.change()
    rig.run(until_s=0.05)
    status = rig.status()
    assert (status["ready"], status["failed"]) == (
        False,
        [{"service": "", "reason": "netlink is gone"}],
    )


def test_kernel_is_read_back_every_period(rig: Rig) -> None:
    """Drift is looked for every `resync_period_s`, counted from the last look."""
    rig.settings = rig.settings.model_copy(update={"resync_period_s": 30.0})
    rig.store.change()
    rig.clock.at(10, rig.store.change)
    assert rig.run(until_s=70) == [
        (0.0, 1, False),
        (10.0, 2, False),
        (30.0, 2, True),
        (60.0, 2, True),
    ]


def test_read_backs_take_a_tenth_of_the_time_at_most(rig: Rig) -> None:
    """What takes seven seconds to read is read after 63 more; the first sync, which writes, and one
    that repairs are no measure of that.
    """
    rig.settings = rig.settings.model_copy(update={"resync_period_s": 30.0})
    rig.dataplane.took_s = 7.0
    rig.dataplane.answer = lambda nth: ApplyReport(writes=5 if nth in (1, 3) else 0)
    rig.store.change()
    assert rig.run(until_s=190) == [
        (0.0, 1, False),
        (37.0, 1, True),
        (107.0, 1, True),
        (144.0, 1, True),
    ]


def test_failure_during_a_read_back_keeps_the_back_off(rig: Rig) -> None:
    """A resync that breaks is retried with pauses, not in a tight loop."""

    def broken_from_the_second(nth: int) -> ApplyReport:
        if nth > 1:
            raise DataplaneError("netlink is gone")
        return ApplyReport()

    rig.settings = rig.settings.model_copy(
        update={"resync_period_s": 30.0, "min_sync_period_s": 0.0}
    )
    rig.dataplane.answer = broken_from_the_second
    rig.store.change()
    assert [when for when, *_ in rig.run(until_s=31)] == [0.0, 30.0, 30.1, 30.3, 30.7]


def test_requested_resync_reads_back_at_once(rig: Rig) -> None:
    """SIGHUP does not wait for the period."""
    rig.store.change()
    rig.clock.at(5, rig.loop.request_resync)
    assert rig.run(until_s=10) == [(0.0, 1, False), (5.0, 1, True)]


def test_repaired_drift_is_a_warning(rig: Rig) -> None:
    """What others changed and the agent put right is told with a warning and counted."""
    rig.settings = rig.settings.model_copy(update={"resync_period_s": 30.0})
    rig.dataplane.answer = lambda nth: (
        ApplyReport(writes=2, repaired=("filter of eth0",)) if nth == 2 else ApplyReport()
    )
    rig.store.change()
    with capture_logs() as lines:
        rig.run(until_s=40)
    warnings = [line for line in lines if line["log_level"] == "warning"]
    assert [(line["event"], line["repaired"]) for line in warnings] == [
        ("sync.repaired", ("filter of eth0",))
    ]


def test_each_sync_is_one_line_and_quiet_read_backs_are_none(rig: Rig) -> None:
    """One info line per sync with revision, writes and time; a look without finding is debug."""
    rig.settings = rig.settings.model_copy(update={"resync_period_s": 30.0})
    rig.dataplane.took_s = 0.012
    rig.dataplane.answer = lambda nth: ApplyReport(writes=3 if nth == 1 else 0, changed=1)
    rig.store.change()
    with capture_logs() as lines:
        rig.run(until_s=40)
    assert [line for line in lines if line["log_level"] == "info"] == [
        {
            "event": "sync.applied",
            "log_level": "info",
            "module": "sync",
            "revision": 1,
            "changed": 1,
            "writes": 3,
            "took_ms": 12.0,
        }
    ]


def test_conflict_is_logged_once_while_it_lasts(rig: Rig) -> None:
    """A lost claim is named when it appears, not with every sync; again when it comes back."""
    lost = Problem("", "Service shop/web", "spec.externalIPs[0]", "is taken by shop/api")

    def plan(*conflicts: Problem) -> None:
        rig.planner.conflicts = conflicts
        rig.store.change()

    plan(lost)
    rig.clock.at(5, lambda: plan(lost))
    rig.clock.at(10, plan)
    rig.clock.at(15, lambda: plan(lost))
    with capture_logs() as lines:
        rig.run(until_s=20)
    named = [line for line in lines if line["event"] == "plan.conflict"]
    assert [(line["object"], line["reason"]) for line in named] == [
        ("Service shop/web", "is taken by shop/api")
    ] * 2


def test_observers_are_told_of_every_sync(rig: Rig) -> None:
    """Started once; then queued before each try and applied or failed after it."""
    report = ApplyReport(writes=3, changed=1)
    rig.dataplane.took_s = 0.25

    def answer(nth: int) -> ApplyReport:
        if nth == 1:
            raise DataplaneError("map slots: no space")
        return report

    rig.dataplane.answer = answer
    rig.clock.at(5, rig.store.change)
    rig.run(until_s=10)
    assert rig.told.calls == [
        (0.0, "started", None),
        (5.0, "queued", 1),
        (5.25, "failed", "map slots: no space"),
        (6.25, "queued", 1),
        (6.5, "applied", Synced(DesiredState({WEB: PLAN}, revision=1), report, True, 0.0, 0.25)),
    ]


def test_unexpected_exception_ends_the_loop(rig: Rig) -> None:
    """A broken invariant is not retried: the process ends, forwarding stays (R3)."""

    def broken(nth: int) -> ApplyReport:
        raise KeyError("slot")

    rig.dataplane.answer = broken
    rig.store.change()
    with pytest.raises(KeyError):
        rig.run(until_s=10)
    assert len(rig.dataplane.applied) == 1


def test_death_of_another_thread_ends_the_loop(rig: Rig) -> None:
    """The loop raises what broke the thread."""
    rig.store.change()
    rig.clock.at(5, lambda: rig.loop.abort(RuntimeError("watch thread")))
    with pytest.raises(RuntimeError, match="watch thread"):
        rig.run(until_s=10)


def test_status_says_what_is_served(rig: Rig) -> None:
    """`status.json` holds revision, problems and counts; `state.json` the names of frontends."""
    bad = Problem("web.yaml", "Service default/x", "spec.ports", "is required")
    rig.store.change(bad)
    rig.run(until_s=1)
    status = rig.status()
    assert (status["ready"], status["mode"], status["node"], status["revision"]) == (
        True,
        "recorder",
        "node1",
        1,
    )
    assert status["services"] == {
        "ports": 1,
        "frontends": 1,
        "backends": 2,
        "without_endpoints": 0,
    }
    assert status["problems"] == [
        {
            "source": "web.yaml",
            "object": "Service default/x",
            "field": "spec.ports",
            "message": "is required",
        }
    ]
    names = read_names(rig.run_dir)
    (named,) = names.values()
    assert list(names) == [PLAN.frontends[0].key]
    assert (named.namespace, named.name, named.port, named.kind) == (
        "default",
        "web",
        "http",
        FrontendKind.CLUSTER_IP,
    )


def test_endpoint_change_leaves_the_names_file_alone(rig: Rig) -> None:
    """Names are written when names change; counts follow every change."""
    rig.store.change()
    written: list[float] = []

    def remove_backend() -> None:
        written.append((rig.run_dir / "state.json").stat().st_ino)
        rig.planner.plans = {WEB: replace(PLAN, backends=PLAN.backends[:1])}
        rig.store.change()

    rig.clock.at(5, remove_backend)
    rig.run(until_s=10)
    written.append((rig.run_dir / "state.json").stat().st_ino)
    assert written[0] == written[1]
    assert rig.status()["services"] == {
        "ports": 1,
        "frontends": 1,
        "backends": 1,
        "without_endpoints": 0,
    }


def test_removed_service_leaves_the_names_file(rig: Rig) -> None:
    """A deleted service is not named any more."""
    rig.store.change()

    def remove_service() -> None:
        rig.planner.plans = {}
        rig.store.change()

    rig.clock.at(5, remove_service)
    rig.run(until_s=10)
    assert read_names(rig.run_dir) == {}
    assert rig.status()["services"] == {
        "ports": 0,
        "frontends": 0,
        "backends": 0,
        "without_endpoints": 0,
    }


def test_other_planner_and_time_table_count_from_the_next_sync_on(rig: Rig) -> None:
    """Changed settings are carried out at once, and the kernel is read back on the way."""
    rig.settings = rig.settings.model_copy(update={"resync_period_s": 30.0})
    rig.store.change()
    settings = rig.settings.model_copy(update={"resync_period_s": 10.0})
    other = FakePlanner(plans={})
    rig.clock.at(5, lambda: rig.loop.reconfigure(other, settings))
    assert rig.run(until_s=30) == [
        (0.0, 1, False),
        (5.0, 1, True),
        (15.0, 1, True),
        (25.0, 1, True),
    ]
    synced = [detail for _, what, detail in rig.told.calls if what == "applied"]
    assert [isinstance(each, Synced) and each.desired.plans is other.plans for each in synced] == [
        False,
        True,
        True,
        True,
    ]
