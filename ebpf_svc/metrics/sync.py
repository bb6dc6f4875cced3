"""Count what the sync loop does, as kube-proxy counts it, and what only we can tell.

Told by the loop's thread (`sync.SyncObserver`); costs microseconds a sync besides one look for what
changed. Collected by the server's thread.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram

from ebpf_svc.errors import DataplaneError
from ebpf_svc.metrics import catalog
from ebpf_svc.metrics.catalog import Kind, Spec
from ebpf_svc.metrics.make import counter, gauge, histogram
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Family
from ebpf_svc.model.service import Service, ServiceName
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.sync import Synced

Slices = tuple[EndpointSlice, ...]
_EXTENTS = {True: catalog.FULL_SYNC_DURATION, False: catalog.PARTIAL_SYNC_DURATION}
"""By whether every rule was looked at."""
_OF_MODES = (*_EXTENTS.values(), catalog.CONNTRACK_DURATION, catalog.CONNTRACK_DELETED)


class _Owner(NamedTuple):
    service: ServiceName
    family: Family


class SyncMetrics:
    """Metrics of syncs, in a registry of the caller's."""

    def __init__(
        self,
        registry: CollectorRegistry,
        families: Iterable[Family],
        *,
        mode: str = "ebpf",
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Register everything, at zero where a value is due.

        Args:
            registry: where collectors find it.
            families: those served; each has its own series, though one apply carries both.
            mode: the dataplane that serves, which decides about metrics some modes have; see
                `serve`.
            wall, monotonic: the clocks; a change's trigger time is compared with the first.
        """
        self._registry = registry
        self._labels = tuple(family.label for family in families)
        self._wall, self._monotonic = wall, monotonic
        self._started_at = wall()
        self._last_queued = gauge(catalog.LAST_QUEUED, registry)
        self._last_synced = gauge(catalog.LAST_SYNCED, registry)
        self._durations = histogram(catalog.SYNC_DURATION, registry)
        self._programming = histogram(catalog.PROGRAMMING_DURATION, registry)
        self._service_changes = counter(catalog.SERVICE_CHANGES, registry)
        self._services_pending = gauge(catalog.SERVICE_CHANGES_PENDING, registry)
        self._slice_changes = counter(catalog.ENDPOINT_CHANGES, registry)
        self._slices_pending = gauge(catalog.ENDPOINT_CHANGES_PENDING, registry)
        self._of_mode: dict[Spec, Histogram | Counter] = {}
        """Those of `_OF_MODES` which the mode that serves has."""
        self.serve(mode)
        self._ready = gauge(catalog.READY, registry)
        self._planning = histogram(catalog.PLAN_DURATION, registry)
        self._applying = histogram(catalog.APPLY_DURATION, registry)
        self._latency = histogram(catalog.EVENT_TO_KERNEL, registry)
        self._writes = counter(catalog.WRITES, registry)
        self._repairs = counter(catalog.REPAIRS, registry)
        self._failures = counter(catalog.SYNC_FAILURES, registry)
        self._failed_ports = gauge(catalog.FAILED_PORTS, registry)
        self._problems = gauge(catalog.PROBLEMS, registry)
        for label in self._labels:
            for each in (self._last_queued, self._last_synced, self._failed_ports):
                each.labels(label)
            for each_ in (self._durations, self._programming):
                each_.labels(label)
        self.desired: DesiredState | None = None
        """What was applied last; None before the first."""
        self._services: Mapping[ServiceName, Service] = {}
        self._slices: Mapping[ServiceName, Slices] = {}
        self._revision = -1
        self._since_s = 0.0
        """Monotonic time of the oldest change that is not applied; 0 = none is known."""
        self._invalid_count = 0
        self._triggers: defaultdict[_Owner, list[float]] = defaultdict(list)
        """Trigger times of changes that are not applied (E10)."""

    def serve(self, mode: str) -> None:
        """Register the metrics that mode has, and no other mode's."""
        for spec in _OF_MODES:
            if spec.serves(mode) and spec not in self._of_mode:
                make = histogram if spec.kind is Kind.HISTOGRAM else counter
                self._of_mode[spec] = make(spec, self._registry)
            elif not spec.serves(mode) and spec in self._of_mode:
                self._registry.unregister(self._of_mode.pop(spec))

    # -- what the sync loop tells ------------------------------------------------------------------

    def started(self) -> None:
        """The loop runs."""

    def queued(self, snapshot: Snapshot) -> None:
        """Count what is new in the snapshot."""
        now = self._wall()
        for label in self._labels:
            self._last_queued.labels(label).set(now)
        if snapshot.revision == self._revision:
            return
        # What is there at the start came when we did; it says nothing of how fast we are.
        if self._revision >= 0 and not self._since_s:
            self._since_s = snapshot.since_s
        self._revision = snapshot.revision
        self._invalid_count = len(snapshot.problems)
        if changed := sum(1 for _ in differences(self._services, snapshot.services)):
            self._service_changes.inc(changed)
            self._services_pending.inc(changed)
        changed = 0
        for name in list(differences(self._slices, snapshot.slices)):
            changed += self._compare(
                name, self._slices.get(name, ()), snapshot.slices.get(name, ())
            )
        if changed:
            self._slice_changes.inc(changed)
            self._slices_pending.inc(changed)
        self._services, self._slices = snapshot.services, snapshot.slices

    def applied(self, synced: Synced) -> None:
        """Count a sync that reached the kernel."""
        now, took_s = self._wall(), synced.plan_s + synced.apply_s
        failed = [key.family.label for key in synced.failed_keys()]
        for label in self._labels:
            self._last_synced.labels(label).set(now)
            self._durations.labels(label).observe(took_s)
            self._failed_ports.labels(label).set(failed.count(label))
            self._observe(_EXTENTS[synced.resync], label, took_s)
        for look in synced.report.reconciled:
            self._observe(catalog.CONNTRACK_DURATION, look.family.label, look.took_s)
            self._observe(catalog.CONNTRACK_DELETED, look.family.label, look.deleted)
        self._services_pending.set(0)
        self._slices_pending.set(0)
        for owner, times in self._triggers.items():
            for trigger_s in times:
                # The clocks of the controller and of this node need not agree.
                latency_s = max(0.0, now - trigger_s)
                self._programming.labels(owner.family.label).observe(latency_s)
        self._triggers.clear()
        if self._since_s:
            self._latency.observe(self._monotonic() - self._since_s)
            self._since_s = 0.0
        self._planning.observe(synced.plan_s)
        self._applying.labels(str(synced.resync).lower()).observe(synced.apply_s)
        for table, writes in synced.report.details.items():
            self._writes.labels(table).inc(writes)
        self._repairs.inc(len(synced.report.repaired))
        self._problems.labels("invalid").set(self._invalid_count)
        self._problems.labels("conflict").set(len(synced.desired.problems))
        self._ready.set(1)
        self.desired = synced.desired

    def failed(self, error: DataplaneError) -> None:
        """Count a sync the dataplane refused; what waits goes on waiting."""
        self._failures.inc()

    def _observe(self, spec: Spec, label: str, value: float) -> None:
        """Add to a metric that not every mode has."""
        metric = self._of_mode.get(spec)
        if isinstance(metric, Histogram):
            metric.labels(label).observe(value)
        elif metric is not None:
            metric.labels(label).inc(value)

    def _compare(self, name: ServiceName, old: Slices, new: Slices) -> int:
        """Count the slices of a Service that changed, and remember what triggered it."""
        before = {id(slice_) for slice_ in old}
        fresh = [slice_ for slice_ in new if id(slice_) not in before]
        gone = {slice_.name: slice_ for slice_ in old}
        for slice_ in new:
            gone.pop(slice_.name, None)
        for slice_ in fresh:
            if slice_.trigger_time_s > self._started_at:
                self._triggers[_Owner(name, slice_.family)].append(slice_.trigger_time_s)
        # A deleted slice carries the time of the change before it, and with it the Service's go.
        for slice_ in gone.values():
            self._triggers.pop(_Owner(name, slice_.family), None)
        return len(fresh) + len(gone)
