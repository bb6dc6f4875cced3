"""What the data path benchmark measures, and how a run of the generator becomes a figure.

Client and server share one CPU. What they and the kernel spend on an exchange is then all there is,
and rates are told per second of that CPU: on an idle machine that is the rate, and on a busy one it
still is what the way costs. Round trips are medians of single exchanges.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ebpf_svc.bench.figures import LESS, MORE, Figure
from ebpf_svc.bench.generator import Order, Outcome
from ebpf_svc.bench.site import (
    ECHO,
    NODE_PORT_FAR,
    NODE_PORT_NEAR,
    SERVICE_ECHO,
    SERVICE_SINK,
    SINK,
    address_of,
    node_port_backend,
)
from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing

OPEN_SOCKETS = 16
BACKENDS = 10
"""Of the service that is asked, where a measure does not vary them."""
_HISTOGRAM_STEPS = 8
"""Kept for each power of two."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is timed."""

    key: str
    title: str
    what: str
    """The generator's word for it."""
    unit: str = "1/s"
    outside: str = ""
    """`near` or `far`: asked from outside through a node port whose backend is there."""
    segmented: bool = False
    """The client sends packets of MTU size, not large ones for the device to cut."""
    scales: bool = False
    """Measured at every number of services."""
    varies_backends: bool = False
    histogram: bool = False

    @property
    def better(self) -> str:
        return LESS if self.unit == "µs" else MORE

    @property
    def to_sink(self) -> bool:
        return self.what in ("bulk", "udp-rate")

    def order(self, backends: int, *, direct: bool, family: Family = Family.V4) -> Order:
        """What the client is told: the service's address, or a backend's."""
        sockets = OPEN_SOCKETS if self.what == "request" else 1
        if self.outside:
            far = self.outside == "far"
            address, port = (
                (node_port_backend(family, far=far), ECHO)
                if direct
                else (
                    addressing.node_addresses(1).of(family),
                    NODE_PORT_FAR if far else NODE_PORT_NEAR,
                )
            )
            return Order(self.what, address, port, sockets)
        vip, backend = address_of(backends, family)
        ports = (SINK, SERVICE_SINK) if self.to_sink else (ECHO, SERVICE_ECHO)
        return Order(self.what, backend if direct else vip, ports[not direct], sockets)

    def value(self, outcome: Outcome) -> float:
        """The figure itself."""
        if self.unit == "µs":
            return outcome.p50_ns / 1000
        amount = outcome.bytes * 8 / 1e9 if self.unit == "Gb/s" else outcome.done
        return amount * 1e9 / outcome.cpu_ns


MEASURES = (
    Measure("connect", "TCP connect, request, close", "connect",
            scales=True, varies_backends=True, histogram=True),
    Measure("request", "TCP requests on open connections", "request", histogram=True),
    Measure("bulk", "TCP throughput, one stream", "bulk", "Gb/s"),
    Measure("bulk-mtu", "TCP throughput, packets of MTU size", "bulk", "Gb/s", segmented=True),
    Measure("udp", "UDP round trip", "udp-request", "µs", scales=True),
    Measure("udp-rate", "UDP packets of 64 bytes, one way", "udp-rate"),
    Measure("first", "first packet of a UDP flow, answered", "udp-first", "µs", scales=True),
    Measure("nodeport-near", "node port from outside, backend on the node", "connect",
            outside="near"),
    Measure("nodeport-far", "node port from outside, backend on another node", "connect",
            outside="far"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One figure to take."""

    measure: Measure
    services: int
    backends: int


def steps(services: Sequence[int], *, full_at: int, wanted: Sequence[str] = ()) -> Iterator[Step]:
    """Every figure of a run, by growing number of services.

    Args:
        full_at: the number of services at which every measure is taken; elsewhere those that
            scale.
        wanted: keys of the measures asked for; none = all.
    """
    for count in sorted(services):
        for measure in MEASURES:
            if wanted and measure.key not in wanted:
                continue
            if count == full_at and measure.varies_backends:
                yield from (Step(measure, count, backends) for backends in (1, BACKENDS, 1_000))
            elif count == full_at or measure.scales:
                yield Step(measure, count, 1 if measure.outside else BACKENDS)


def figure(step: Step) -> Figure:
    """Where the samples of a step go."""
    measure = step.measure
    return Figure(
        key=measure.key,
        title=measure.title,
        unit=measure.unit,
        better=measure.better,
        services=step.services,
        backends=step.backends,
    )


def summarize(figure: Figure, measure: Measure, outcomes: dict[str, list[Outcome]]) -> None:
    """Put what was seen beside the samples into the figure."""
    for variant, seen in outcomes.items():
        figure.details[variant] = _details(measure, seen)
        if measure.histogram:
            figure.histograms[variant] = _merged(seen)


def _details(measure: Measure, seen: Sequence[Outcome]) -> dict[str, float]:
    def middle(values: Iterator[float]) -> float:
        return statistics.median(values)

    details = {
        "wall_per_s": middle(each.done * 1e9 / each.elapsed_ns for each in seen),
        "cpu_us": middle(each.cpu_ns / each.done / 1000 for each in seen),
        "cpu_share": middle(each.cpu_ns / each.elapsed_ns for each in seen),
    }
    if not measure.to_sink:
        details |= {
            f"{name}_us": middle(getattr(each, f"{name}_ns") / 1000 for each in seen)
            for name in ("p50", "p99", "p999")
        }
    return details


def _merged(seen: Sequence[Outcome]) -> list[list[int]]:
    """All rounds in one, in steps coarse enough to be kept."""
    total: dict[int, int] = {}
    for each in seen:
        for least, count in each.histogram:
            step = max(0, least.bit_length() - _HISTOGRAM_STEPS.bit_length())
            total[least >> step << step] = total.get(least >> step << step, 0) + count
    return [list(pair) for pair in sorted(total.items())]
