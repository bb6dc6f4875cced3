"""Time a dataplane of any mode: the first apply, and changes on top of it.

The eBPF maps are measured without programs or devices, which applying does not touch; every other
mode in a network namespace of its own, so that this machine's own rules stay as they are.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ebpf_svc.bench.kubeproxy import beside
from ebpf_svc.bench.maps import artifacts_in, fresh_maps
from ebpf_svc.bench.population import Population
from ebpf_svc.bench.record import Record
from ebpf_svc.config import Settings
from ebpf_svc.daemon import LOADING_OBJECTS, USUAL_THRESHOLDS
from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.modes import make_dataplane
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.host import Node
from ebpf_svc.testbed.namespace import Namespace

EBPF = "ebpf"
PATIENCE_S = 20.0
"""No series of changes takes longer, whatever was asked for."""
ROLLED_OUT = 100
"""Services whose every endpoint is replaced at once."""


class Applies(Protocol):
    """The part of a dataplane that is measured."""

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Write the difference to what was applied last."""


Open = Callable[[], AbstractContextManager[Applies]]
"""Gives a fresh dataplane that holds nothing, and takes it away again."""


def opener(mode: str, settings: Settings, node: Node, folder: Path) -> Open:
    """How a dataplane of that mode is had."""
    if mode == EBPF:
        artifacts = artifacts_in(folder / "cache")
        return lambda: fresh_maps(artifacts, folder)

    @contextmanager
    def opened() -> Iterator[Applies]:
        # Each time another namespace: IPVS remembers for minutes which real servers it had.
        namespace = Namespace(f"{node.namespace.name}-new")
        try:
            with namespace.entered():
                dataplane = make_dataplane(mode, settings)
                try:
                    dataplane.open()
                    yield dataplane
                finally:
                    dataplane.close()
                    dataplane.cleanup()
        finally:
            namespace.close()

    return opened


@dataclass(slots=True)
class _Taken:
    """What several applies took."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Subject:
    """One mode at one size."""

    record: Record
    mode: str
    population: Population
    open: Open
    limits: tuple[float, float, float] | None = None
    """Cold seconds, milliseconds of a change and of its CPU; None where nothing is promised."""

    @property
    def name(self) -> str:
        """The size, as rows begin."""
        return f"{self.population.services:,} x {self.population.endpoints}"

    def _beside(self, what: str) -> str:
        return beside(self.mode, self.population.services, self.population.endpoints, what)

    def measure_cold(self, rounds: int) -> None:
        """Plan and apply everything at once, each time into an empty kernel."""
        plan_s, apply_s, both_s, cpu_s = [], [], [], []
        begun = time.monotonic()
        for _ in range(rounds):
            with self.open() as dataplane:
                planner, snapshot = _planner(), self.population.snapshot()
                gc.collect()
                gc.set_threshold(LOADING_OBJECTS)  # as the agent does until its first sync
                cpu_ms, started = _cpu_ms(), time.perf_counter()
                desired = planner.plan(snapshot)
                planned = time.perf_counter()
                report = _applied(dataplane, desired)
                ended = time.perf_counter()
                cpu_s.append((_cpu_ms() - cpu_ms) / 1000)
                gc.set_threshold(*USUAL_THRESHOLDS)
            plan_s.append(planned - started)
            apply_s.append(ended - planned)
            both_s.append(ended - started)
            if time.monotonic() - begun > PATIENCE_S:
                break
        add, limit = self.record.add, self.limits[0] if self.limits else None
        add(f"{self.name} cold, plan and apply", both_s, "s", limit=limit)
        add(f"{self.name} cold, plan", plan_s, "s")
        add(f"{self.name} cold, apply", apply_s, "s")
        add(f"{self.name} cold, CPU", cpu_s, "s")
        add(f"{self.name} cold, {_writes(self.mode)}", [report.writes], "writes")

    def measure_changes(self, changes: int) -> None:
        """One endpoint, one endpoint in a hundred services, a rollout of many services."""
        population = self.population
        with self.open() as dataplane:
            planner, snapshot = _planner(), population.snapshot()
            _applied(dataplane, planner.plan(snapshot))
            gc.collect()
            gc.freeze()
            subject = _Subject(dataplane, planner, snapshot)
            one = subject.repeat(population.changed, changes)
            churn = subject.repeat(population.churned, max(1, changes // 20))
            rollout = subject.repeat(population.rolled_out, max(1, changes // 20))
            gc.unfreeze()
        _, wall_ms, cpu_ms = self.limits or (None, None, None)
        writes, add = _writes(self.mode), self.record.add
        name = f"{self.name} one endpoint"
        add(name, one.wall_ms, "ms", limit=wall_ms, judged="p99", beside=self._beside("change_ms"))
        add(f"{name}, CPU", one.cpu_ms, "ms", limit=cpu_ms, beside=self._beside("change_cpu_ms"))
        add(f"{name}, {writes}", one.writes, "writes")
        rolled_out = min(ROLLED_OUT, population.services)
        for name, taken in (
            (f"{self.name} 1 % churn", churn),
            (f"{self.name} rollout of {rolled_out} services", rollout),
        ):
            add(name, taken.wall_ms, "ms")
            add(f"{name}, CPU", taken.cpu_ms, "ms")
            add(f"{name}, {writes}", taken.writes, "writes")


@dataclass(slots=True)
class _Subject:
    """A dataplane that holds a population, and where it stands."""

    dataplane: Applies
    planner: Planner
    snapshot: Snapshot
    number: int = 0

    def repeat(self, change: Callable[[Snapshot, int], Snapshot], times: int) -> _Taken:
        """Apply so many changes, each on top of the one before."""
        taken, begun = _Taken(), time.monotonic()
        for _ in range(times):
            self.number += 1
            self.snapshot = change(self.snapshot, self.number)
            cpu_ms, started = _cpu_ms(), time.perf_counter()
            report = _applied(self.dataplane, self.planner.plan(self.snapshot))
            taken.wall_ms.append((time.perf_counter() - started) * 1000)
            taken.cpu_ms.append(_cpu_ms() - cpu_ms)
            taken.writes.append(report.writes)
            if time.monotonic() - begun > PATIENCE_S:
                break
        return taken


def _applied(dataplane: Applies, desired: DesiredState) -> ApplyReport:
    report = dataplane.apply(desired)
    if report.failed:
        raise DataplaneError(f"{len(report.failed)} services failed, the first: {report.failed[0]}")
    return report


def _writes(mode: str) -> str:
    return "map writes" if mode == EBPF else "writes"


def _cpu_ms() -> float:
    """CPU time of this process and of the commands it ran."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return total * 1000


def _planner() -> Planner:
    return Planner(PlanOptions.from_settings(Settings()))
