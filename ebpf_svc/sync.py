"""Carry every change of the store to the dataplane: wait, coalesce, plan, apply, retry, read back.

Owns the time table and nothing else. One thread runs it; `request_resync`, `reconfigure` and
`close` may be called from any other. Nothing is applied before the store is in sync (rule M4).
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.errors import DataplaneError
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import DesiredState, PlanKey
from ebpf_svc.model.snapshot import Problem, Snapshot
from ebpf_svc.status import StatusWriter

FIRST_RETRY_S = 0.1
"""Pause after the first failure in a row; each further one doubles it."""
JITTER = 0.25
"""A retry comes up to this share earlier than planned, so that nodes that failed together part."""
FAILURES_LOGGED = 5
"""Service ports named in the line of a sync that failed in part; the status file has them all."""

READ_BACK_SHARE = 0.1
"""Of the time, that reading back may take: what is slow to read is read less often, so that changes
seldom wait for it."""

log = get_logger(__name__)


class AppliesStates(Protocol):
    """What of a dataplane the loop uses, once it is open."""

    @property
    def name(self) -> str:
        """The mode that chooses it; may be another after an apply."""

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """As `Dataplane.apply`."""


class SnapshotSource(Protocol):
    """What the loop needs of `watch.store.Store`."""

    changed: threading.Event

    def snapshot(self) -> Snapshot | None:
        """The outside world now; None until it is in sync."""


class Planner(Protocol):
    """What the loop needs of `plan.planner.Planner`."""

    def plan(self, snapshot: Snapshot) -> DesiredState:
        """What this node must do."""


class Clock(Protocol):
    """Time, so that tests need not wait for it."""

    def now(self) -> float:
        """Seconds that only grow."""

    def wait(self, event: threading.Event, timeout_s: float | None) -> None:
        """Return when the event is set or the time is over; None = wait for the event alone."""


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, timeout_s: float | None) -> None:
        event.wait(timeout_s)


@dataclass(frozen=True, slots=True)
class Synced:
    """One sync that reached the dataplane; single service ports may have failed."""

    desired: DesiredState
    report: ApplyReport
    resync: bool
    """The kernel was read back first."""
    plan_s: float
    apply_s: float

    def failed_keys(self) -> frozenset[PlanKey]:
        """The service ports that could not be written."""
        if not self.report.failed:
            return frozenset()
        names = {error.service for error in self.report.failed}
        return frozenset(key for key in self.desired.plans if str(key) in names)


class SyncObserver(Protocol):
    """Whoever wants to know how syncs go; called by the loop's thread, and must not hold it up."""

    def started(self) -> None:
        """The loop runs; it may have nothing to apply yet."""

    def queued(self, snapshot: Snapshot) -> None:
        """This snapshot is about to be applied; `applied` or `failed` follows, unless it hangs."""

    def applied(self, synced: Synced) -> None:
        """The kernel was told."""

    def failed(self, error: DataplaneError) -> None:
        """Nobody knows what of it the kernel was told; the loop tries again."""


class SyncLoop:
    """The loop between a store and a dataplane; `run()` returns after `close()`."""

    def __init__(
        self,
        store: SnapshotSource,
        planner: Planner,
        dataplane: AppliesStates,
        settings: Settings,
        clock: Clock | None = None,
        *,
        on_ready: Callable[[], None] = lambda: None,
        observers: Sequence[SyncObserver] = (),
        about: Callable[[], Mapping[str, Any]] = dict,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Bind the parts; nothing runs yet.

        Args:
            store, planner, dataplane, settings: the parts; `run()` needs the dataplane open.
            clock: None = the machine's.
            on_ready: called once, after the first apply that reached the dataplane.
            observers: told of every sync, in this order.
            about: what the status file says of the dataplane besides its mode.
            jitter: gives numbers from 0 to below 1.
        """
        self._store, self._planner, self._dataplane = store, planner, dataplane
        self._settings, self._clock = settings, clock or SystemClock()
        self._on_ready, self._observers, self._jitter = on_ready, observers, jitter
        self._status = StatusWriter(
            settings.run_dir,
            node=settings.node_name,
            serving=lambda: {"mode": dataplane.name, **about()},
        )
        self._closing = threading.Event()
        self._resync_wanted = False
        self._wanted = planner, settings
        """Replaced as one by `reconfigure`; the loop's thread takes it over."""
        self._crash: BaseException | None = None
        self._ready = False
        self._failures = 0
        self._in_doubt = False
        self._known_problems: frozenset[Problem] = frozenset()
        self._not_before = -math.inf
        self._retry_at = self._resync_at = math.inf

    def request_resync(self) -> None:
        """Read the kernel back soon, not only when the period is over."""
        self._resync_wanted = True
        self._store.changed.set()

    def reconfigure(self, planner: Planner, settings: Settings) -> None:
        """Go on with another planner and time table from the next sync on, which comes soon."""
        self._wanted = planner, settings
        self.request_resync()

    def close(self) -> None:
        """Make `run()` return; an apply under way is finished first."""
        self._closing.set()
        self._store.changed.set()

    def abort(self, error: BaseException) -> None:
        """Make `run()` raise: another thread of the agent broke."""
        self._crash = error
        self.close()

    def run(self) -> None:
        """Sync until `close()`.

        Raises:
            BaseException: whatever no part expected; forwarding goes on with what the kernel holds.
        """
        self._status.starting()
        for observer in self._observers:
            observer.started()
        while not self._closing.is_set():
            wanted = self._resync_wanted or self._store.changed.is_set()
            due = self._not_before if wanted else min(self._retry_at, self._resync_at)
            pause_s = max(due, self._not_before) - self._clock.now()
            if pause_s <= 0:
                self._sync()
            elif wanted:
                # Further changes join the one that waits already: they need not wake the loop (R6).
                self._clock.wait(self._closing, pause_s)
            else:
                self._clock.wait(self._store.changed, pause_s if pause_s < math.inf else None)
        if self._crash is not None:
            raise self._crash

    def _sync(self) -> None:
        # Cleared before the snapshot is taken: a change in between costs a sync, never is lost.
        self._store.changed.clear()
        self._planner, self._settings = self._wanted
        started = self._clock.now()
        resync = self._resync_wanted or self._in_doubt or started >= self._resync_at
        snapshot = self._store.snapshot()
        self._resync_wanted = False
        if snapshot is None:
            return
        for observer in self._observers:
            observer.queued(snapshot)
        desired = self._planner.plan(snapshot)
        planned = self._clock.now()
        self._log_new_conflicts(desired.problems)
        try:
            report = self._dataplane.apply(desired, resync=resync)
        except DataplaneError as exc:
            # Nobody knows how far it came, so the next try reads back first, whenever that is.
            self._in_doubt, self._resync_at = True, math.inf
            for observer in self._observers:
                observer.failed(exc)
            retry_s = self._retry_later()
            log.error("sync.refused", revision=desired.revision, error=str(exc), retry_s=retry_s)
            self._status.refused(
                ready=self._ready,
                revision=desired.revision,
                reason=str(exc),
                problems=(*snapshot.problems, *desired.problems),
            )
            return
        ended = self._clock.now()
        synced = Synced(desired, report, resync, planned - started, ended - planned)
        for observer in self._observers:
            observer.applied(synced)
        took_ms = round((ended - started) * 1000, 2)
        self._not_before = ended + self._settings.min_sync_period_s
        self._in_doubt = False
        if resync or not self._ready:
            # What the first sync or a repair wrote is no reason to look less often.
            read_back_s = 0.0 if report.writes else ended - planned
            rest_s = read_back_s * (1 / READ_BACK_SHARE - 1)
            self._resync_at = ended + max(self._settings.resync_period_s, rest_s)
        self._log_report(desired, report, resync=resync, took_ms=took_ms)
        self._status.synced(
            desired, problems=snapshot.problems, failed=report.failed, took_ms=took_ms
        )
        if not self._ready:
            self._ready = True
            self._on_ready()

    def _retry_later(self) -> float:
        """Set the time of the next try (R3) and return the pause in seconds."""
        doubled_s = FIRST_RETRY_S * 2.0 ** min(self._failures, 20)
        pause_s = min(doubled_s, self._settings.retry_max_s) * (1 - JITTER * self._jitter())
        self._failures += 1
        now = self._clock.now()
        self._retry_at = now + pause_s
        self._not_before = now + self._settings.min_sync_period_s
        return round(pause_s, 3)

    def _log_report(
        self, desired: DesiredState, report: ApplyReport, *, resync: bool, took_ms: float
    ) -> None:
        if report.repaired:
            log.warning("sync.repaired", count=len(report.repaired), repaired=report.repaired)
        if report.failed:
            retry_s = self._retry_later()
            some = [str(error) for error in report.failed[:FAILURES_LOGGED]]
            log.error("sync.failed", count=len(report.failed), failed=some, retry_s=retry_s)
        else:
            self._failures, self._retry_at = 0, math.inf
        # A periodic look that found all in order is no news.
        write = log.debug if resync and self._ready and not report.writes else log.info
        write(
            "sync.applied",
            revision=desired.revision,
            changed=report.changed,
            writes=report.writes,
            took_ms=took_ms,
        )

    def _log_new_conflicts(self, problems: tuple[Problem, ...]) -> None:
        """Log what the plan found; whoever read an object has logged what is wrong with it."""
        now = frozenset(problems)
        for problem in sorted(now - self._known_problems, key=str):
            log.warning(
                "plan.conflict",
                source=problem.source,
                object=problem.object_ref,
                field=problem.field,
                reason=problem.message,
            )
        self._known_problems = now
