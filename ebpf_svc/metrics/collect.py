"""Metrics that are looked up when somebody collects: of the plan in force, and of the kernel."""

from __future__ import annotations

import platform
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ebpf_svc import __version__
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.dataplane.inspect import (
    ShowsDrops,
    ShowsFill,
    ShowsFlowCounts,
    ShowsSeries,
    ShowsStart,
    ShowsTraffic,
)
from ebpf_svc.errors import DataplaneError
from ebpf_svc.log import get_logger
from ebpf_svc.metrics import catalog
from ebpf_svc.metrics.catalog import Spec
from ebpf_svc.metrics.make import counter, family
from ebpf_svc.model.desired import DesiredState, FrontendKind, PlanKey, ServicePlan
from ebpf_svc.model.net import Family
from ebpf_svc.model.service import ServicePortName

INTERNAL, EXTERNAL = "internal", "external"

log = get_logger(__name__)


class PlanCollector(Collector):
    """How many of what the plan in force has; counted anew only when it changed."""

    def __init__(
        self, desired: Callable[[], DesiredState | None], families: Iterable[Family]
    ) -> None:
        """Take where the plan in force is found, and the families to show even if empty."""
        self._desired, self._families = desired, tuple(families)
        self._counted: Mapping[PlanKey, ServicePlan] = {}
        self._counts: Counter[tuple[str, ...]] = Counter()

    def collect(self) -> Iterator[Metric]:
        """Look; called by the registry."""
        desired = self._desired() or DesiredState()
        if desired.plans is not self._counted:
            self._counts, self._counted = _count(desired.plans), desired.plans
        checks = Counter(check.family.label for check in desired.health_checks)
        for spec in (catalog.PORTS, catalog.FRONTENDS, catalog.BACKENDS, catalog.REFUSING):
            metric = family(spec)
            for each in self._families:
                metric.add_metric([each.label], self._counts[spec.name, each.label])
            yield metric
        no_local, node_ports = family(catalog.NO_LOCAL_ENDPOINTS), family(catalog.HEALTH_CHECKS)
        for each in self._families:
            node_ports.add_metric([each.label], checks[each.label])
            for policy in (INTERNAL, EXTERNAL):
                count = self._counts[catalog.NO_LOCAL_ENDPOINTS.name, policy, each.label]
                no_local.add_metric([policy, each.label], count)
        yield no_local
        yield node_ports


def _count(plans: Mapping[PlanKey, ServicePlan]) -> Counter[tuple[str, ...]]:
    """By metric and labels."""
    counts: Counter[tuple[str, ...]] = Counter()
    labels = {each: each.label for each in Family}
    for key, plan in plans.items():
        label = labels[key.family]
        counts[catalog.PORTS.name, label] += 1
        counts[catalog.FRONTENDS.name, label] += len(plan.frontends)
        counts[catalog.BACKENDS.name, label] += len(plan.backends)
        if not plan.has_endpoints:
            counts[catalog.REFUSING.name, label] += 1
            continue
        policies = {
            INTERNAL if frontend.kind is FrontendKind.CLUSTER_IP else EXTERNAL
            for frontend in plan.frontends
            if frontend.local_for
        }
        # Endpoints are elsewhere only, for there are some (MX2).
        if policies and not any(backend.in_local for backend in plan.backends):
            for policy in policies:
                counts[catalog.NO_LOCAL_ENDPOINTS.name, policy, label] += 1
    return counts


class KernelCollector(Collector):
    """What the dataplane that serves shows of the kernel; what it has no method for is left out."""

    def __init__(
        self, dataplane: Dataplane | None, registry: CollectorRegistry, refused: Mapping[str, str]
    ) -> None:
        """Bind to a dataplane, open or not.

        Args:
            dataplane: the one that serves; None = none does yet.
            registry: for the count of failures.
            refused: dataplanes that were preferred and cannot run here, with why.
        """
        self._lock = threading.Lock()
        self._dataplane, self._refused = dataplane, refused
        self._failures = counter(catalog.COLLECT_FAILURES, registry)
        self._specs = {spec.name: spec for spec in catalog.specs() if spec.modes}

    def serve(self, dataplane: Dataplane, refused: Mapping[str, str]) -> None:
        """Collect from another dataplane; nobody looks at the one before any more on return."""
        with self._lock:
            self._dataplane, self._refused = dataplane, refused

    def collect(self) -> Iterator[Metric]:
        """Look; called by the registry. What the kernel does not give is left out and counted."""
        with self._lock:
            found = list(self._static())
            for look in (
                *(self._start, self._drops, self._fill, self._flows, self._traffic, self._series),
            ):
                try:
                    found += look()
                except (OSError, DataplaneError) as error:
                    self._failures.inc()
                    log.warning("metrics.collect", error=str(error))
        yield from found

    def _static(self) -> Iterator[Metric]:
        yield _one(catalog.BUILD, [__version__, platform.python_version()], 1)
        if self._dataplane is not None:
            yield _one(catalog.MODE, [self._dataplane.name], 1)
        refused = family(catalog.MODE_REFUSED)
        for mode, reason in self._refused.items():
            refused.add_metric([mode, reason], 1)
        yield refused

    def _start(self) -> Iterator[Metric]:
        if isinstance(self._dataplane, ShowsStart):
            yield _many(catalog.START_SECONDS, self._dataplane.start_s())

    def _drops(self) -> Iterator[Metric]:
        if isinstance(self._dataplane, ShowsDrops):
            yield _many(catalog.DROPPED, self._dataplane.drops())

    def _fill(self) -> Iterator[Metric]:
        if not isinstance(self._dataplane, ShowsFill):
            return
        entries, capacity = family(catalog.MAP_ENTRIES), family(catalog.MAP_CAPACITY)
        for each in self._dataplane.fill():
            entries.add_metric([each.name], each.entries)
            capacity.add_metric([each.name, str(each.evicts).lower()], each.capacity)
        yield entries
        yield capacity

    def _flows(self) -> Iterator[Metric]:
        if not isinstance(self._dataplane, ShowsFlowCounts):
            return
        counts = self._dataplane.flow_counts()
        totals = Counter(counts.draining)
        by_port, draining = family(catalog.SERVICE_FLOWS), family(catalog.DRAINING_FLOWS)
        for (name, of), count in counts.by_port.items():
            totals[of] += count
            by_port.add_metric(_service_port(name, of), count)
        alive = family(catalog.FLOWS)
        for of in counts.draining:
            alive.add_metric([of.label], totals[of])
            draining.add_metric([of.label], counts.draining[of])
        yield alive
        yield draining
        yield by_port

    def _traffic(self) -> Iterator[Metric]:
        if not isinstance(self._dataplane, ShowsTraffic):
            return
        families = [
            family(spec)
            for spec in (
                *(catalog.SERVICE_CONNECTIONS, catalog.SERVICE_PACKETS, catalog.SERVICE_BYTES),
            )
        ]
        for (name, of), traffic in self._dataplane.traffic().items():
            labels = _service_port(name, of)
            for metric, count in zip(families, traffic, strict=True):
                metric.add_metric(labels, count)
        yield from families

    def _series(self) -> Iterator[Metric]:
        if not isinstance(self._dataplane, ShowsSeries):
            return
        found: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for name, labels, value in self._dataplane.series():
            spec = self._specs[name]
            metric = found.setdefault(name, family(spec))
            metric.add_metric([labels[label] for label in spec.labels], value)
        yield from found.values()


def _service_port(name: ServicePortName, of: Family) -> list[str]:
    """Labels of a metric by service port."""
    return [name.namespace, name.name, name.port, name.protocol.value, of.label]


def _one(spec: Spec, labels: list[str], value: float) -> Metric:
    metric = family(spec)
    metric.add_metric(labels, value)
    return metric


def _many(spec: Spec, values: Mapping[str, float]) -> Metric:
    """A family with one label."""
    metric = family(spec)
    for label, value in values.items():
        metric.add_metric([label], value)
    return metric
