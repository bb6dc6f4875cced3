"""From the catalog to the Prometheus library."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ebpf_svc.metrics.catalog import Kind, Spec

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# A second series for every counter, saying when it began: kube-proxy has none.
disable_created_metrics()  # type: ignore[no-untyped-call]


def counter(spec: Spec, registry: CollectorRegistry) -> Counter:
    """Make a counter of the catalog."""
    assert spec.kind is Kind.COUNTER, spec.name
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


def gauge(spec: Spec, registry: CollectorRegistry) -> Gauge:
    """Make a gauge of the catalog."""
    assert spec.kind is Kind.GAUGE, spec.name
    return Gauge(spec.name, spec.help, spec.labels, registry=registry)


def histogram(spec: Spec, registry: CollectorRegistry) -> Histogram:
    """Make a histogram of the catalog."""
    assert spec.kind is Kind.HISTOGRAM, spec.name
    return Histogram(spec.name, spec.help, spec.labels, registry=registry, buckets=spec.buckets)


def family(spec: Spec) -> CounterMetricFamily | GaugeMetricFamily:
    """Make an empty family of the catalog, for values looked up when they are collected."""
    of_kind = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
    return of_kind(spec.name, spec.help, labels=spec.labels)


def exposition(registry: CollectorRegistry) -> bytes:
    """Print a registry in Prometheus' text format."""
    return generate_latest(registry)
