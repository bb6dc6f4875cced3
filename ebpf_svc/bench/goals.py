"""What the data path shall reach, held against a run. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from ebpf_svc.bench.figures import Comparison, Figure
from ebpf_svc.bench.plots import relative_rounds
from ebpf_svc.bench.variants import DIRECT, TRACKED

BACKENDS = 10
FLAT_WITHIN = 0.02
IPVS_SHARE = 0.4
"""With kernel forwarding, of what ipvs adds to a direct connection."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One sentence, what was measured for it, and whether it holds."""

    sentence: str
    measured: str
    holds: bool
    tracked: str = ""
    """The same beside a direct connection that the kernel tracks; empty = not measured."""


@dataclass(frozen=True, slots=True)
class _Least:
    """The least speed beside direct that a variant shall have in a measure."""

    variant: str
    key: str
    speed: float
    sentence: str


_LEAST = (
    _Least("ebpf", "connect", 1.0, "socket hooks: TCP connections as fast as direct"),
    _Least("ebpf", "udp", 1.0, "socket hooks: UDP round trip as fast as direct"),
    _Least("ebpf", "bulk", 1.0, "socket hooks: TCP throughput of direct"),
    _Least("ebpf-tc", "connect", 0.95, "tc with the kernel's forwarding: TCP connections"),
    _Least("ebpf-fast", "connect", 1.0, "fast path: TCP connections as fast as direct"),
    _Least("ebpf-fast", "udp", 1.0, "fast path: UDP round trip as fast as direct"),
    _Least("ebpf-fast", "bulk", 1.0, "fast path: TCP throughput of direct"),
    _Least("ebpf-fast", "bulk-mtu", 1.15, "fast path: throughput with packets of MTU size"),
    _Least("ebpf-fast", "nodeport-near", 1.0, "fast path: node port, backend on the node"),
    _Least("ebpf-fast", "nodeport-far", 0.9, "fast path: node port, backend on another node"),
    _Least("ebpf-xdp", "nodeport-far", 0.9, "XDP: node port, backend on another node"),
)


def of_comparison(comparison: Comparison) -> Iterator[Goal]:
    """Every goal this run has figures for."""
    at = comparison.parameters["full_at"]
    for least in _LEAST:
        figure = _figure(comparison, least.key, at)
        if figure is not None and least.variant in figure.samples:
            speed = statistics.median(relative_rounds(figure, least.variant))
            sentence = f"{least.sentence}: at least {least.speed:.2f}"
            tracked = relative_rounds(figure, least.variant, TRACKED)
            beside = f"{statistics.median(tracked):.2f}" if tracked else ""
            # A speed is told with two digits, and judged as it is told.
            yield Goal(sentence, f"{speed:.2f}", round(speed, 2) >= least.speed, beside)
    for name in ("ebpf", "ebpf-tc", "ebpf-fast"):
        goal = _flat(comparison, name)
        if goal is not None:
            yield goal
    yield from _beside_ipvs(comparison, at)


def _beside_ipvs(comparison: Comparison, services: int) -> Iterator[Goal]:
    """What a connection costs more than a direct one, beside what ipvs adds."""
    figure = _figure(comparison, "connect", services)
    if figure is None or "ipvs" not in figure.samples:
        return
    direct_us = 1e6 / figure.median(DIRECT)
    ipvs_us = 1e6 / figure.median("ipvs") - direct_us
    for name, most in (("ebpf-tc", IPVS_SHARE), ("ebpf-fast", 0.0)):
        if name in figure.samples:
            added_us = 1e6 / figure.median(name) - direct_us
            sentence = f"{name}: adds to a connection at most {most:g} of what ipvs adds"
            share = added_us / ipvs_us
            measured = f"{share:.2f} ({added_us:+.1f} µs of {ipvs_us:+.1f} µs)"
            yield Goal(sentence, measured, share <= most)


def _figure(comparison: Comparison, key: str, services: int) -> Figure | None:
    return next(
        (
            figure
            for figure in comparison.figures
            if figure.key == key
            and figure.services == services
            and (figure.backends == BACKENDS or key.startswith("nodeport"))
        ),
        None,
    )


def _flat(comparison: Comparison, name: str) -> Goal | None:
    """Whether the number of services makes a difference."""
    speeds = {
        figure.services: statistics.median(relative_rounds(figure, name))
        for figure in comparison.figures
        if figure.key == "connect" and figure.backends == BACKENDS and name in figure.samples
    }
    if len(speeds) < 2:
        return None
    few, many = min(speeds), max(speeds)
    change = speeds[many] / speeds[few] - 1
    return Goal(
        f"{name}: TCP connections with {many:,} services as with {few:,}, within {FLAT_WITHIN:.0%}",
        f"{change:+.1%}",
        change >= -FLAT_WITHIN,
    )
