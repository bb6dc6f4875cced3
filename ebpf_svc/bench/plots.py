"""Which plots a run has: name -> SVG."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from ebpf_svc.bench import kubeproxy, tables
from ebpf_svc.bench.figures import LESS, Comparison, Figure
from ebpf_svc.bench.svg import Bar, Bars, Lines, bars, lines
from ebpf_svc.bench.variants import DIRECT

_SHORT = {
    "connect": "TCP connections",
    "request": "TCP requests, open connection",
    "bulk": "TCP throughput",
    "bulk-mtu": "TCP throughput, MTU packets",
    "udp": "UDP round trip",
    "udp-rate": "UDP small packets",
    "first": "first packet of a flow",
    "nodeport-near": "node port, backend near",
    "nodeport-far": "node port, backend far",
}


def of_comparison(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Every plot of a data path run."""
    titles = {variant.name: variant.title for variant in comparison.measured}
    yield "speed", bars(_speed(comparison, titles))
    for key in ("connect", "udp"):
        curves = _over_services(comparison, key)
        if any(len(curve) > 1 for curve in curves.values()):
            sizes = sorted({figure.services for figure in comparison.figures})
            yield (
                f"{key}-by-services",
                lines(
                    Lines(
                        f"{_SHORT[key]}, by number of services",
                        "services, logarithmic",
                        "speed, direct = 1",
                        curves,
                        titles,
                        marks=sizes,
                    )
                ),
            )
    for figure in comparison.figures:
        if figure.histograms and figure.key == "request":
            yield "request-latency", lines(_latency(figure, titles))


def _speed(comparison: Comparison, titles: Mapping[str, str]) -> Bars:
    """Every measure at the size where all were taken."""
    at = comparison.parameters.get("full_at")
    groups = []
    for figure in comparison.figures:
        if figure.services != at or (figure.key == "connect" and figure.backends != 10):
            continue
        group = [
            _relative(figure, variant.name)
            for variant in comparison.measured
            if variant.name in figure.samples
        ]
        groups.append((_SHORT.get(figure.key, figure.title), group))
    return Bars(
        f"Speed beside no Service at all, {at:,} services",
        "times as fast as direct; further right is better",
        groups,
        titles,
        mark=1.0,
    )


def _relative(figure: Figure, name: str) -> Bar:
    rounds = relative_rounds(figure, name)
    value = statistics.median(rounds)
    low, high = value, value
    if len(rounds) > 1:
        low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
    text = f"{value:.2f}   {tables.number(figure.median(name))} {figure.unit}"
    return Bar(name, value, text, low, high)


def relative_rounds(figure: Figure, name: str, base: str = DIRECT) -> list[float]:
    """How many times as fast as direct, round by round; more is better whatever the unit."""
    pairs = zip(figure.samples[name], figure.samples.get(base, ()), strict=False)
    if figure.better == LESS:
        return [limit / ours for ours, limit in pairs]
    return [ours / limit for ours, limit in pairs]


def _over_services(comparison: Comparison, key: str) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for figure in comparison.figures:
        if figure.key == key and figure.backends == 10:
            for name in figure.samples:
                middle = statistics.median(relative_rounds(figure, name))
                curves.setdefault(name, []).append((figure.services, middle))
    return curves


def _latency(figure: Figure, titles: Mapping[str, str]) -> Lines:
    """Which share of the requests was answered within a time."""
    curves = {}
    longest_us = 0.0
    for name, histogram in figure.histograms.items():
        total = sum(count for _, count in histogram)
        shares = accumulate(count / total for _, count in histogram)
        curve = [(ns / 1000, share * 100) for (ns, _), share in zip(histogram, shares, strict=True)]
        curves[name] = curve
        longest_us = max(longest_us, next(us for us, share in curve if share >= 99.5))
    shown = {
        name: [point for point in curve if point[0] <= longest_us] for name, curve in curves.items()
    }
    return Lines(
        f"Requests answered within a time, {tables.size(figure)}",
        "µs, logarithmic",
        "% of the requests",
        shown,
        titles,
        dots=False,
        most=100.0,
    )


def of_applies(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The control plane's plots: ours by mode, and the real kube-proxy's."""
    titles = {run["parameters"]["mode"]: run["parameters"]["mode"] for run in runs}
    titles = {name: f"ebpf-svc, {name}" for name in titles} | {
        "kube-proxy": f"kube-proxy ({kubeproxy.source().partition(',')[0].split()[-1]})"
    }
    for name, title, axis, row, what in (
        (
            "change",
            "One endpoint changes",
            "milliseconds, logarithmic",
            "one endpoint",
            "change_ms",
        ),
        (
            "cold",
            "From exec to every rule",
            "seconds, logarithmic",
            "agent, exec to ready",
            "cold_s",
        ),
        ("memory", "Memory of the agent", "MiB, logarithmic", "agent, resident", "memory_mib"),
    ):
        groups = list(_by_size(runs, row, what))
        if groups:
            yield name, bars(Bars(title, axis, groups, titles, log=True))


def _by_size(
    runs: Sequence[Mapping[str, Any]], row: str, what: str
) -> Iterator[tuple[str, list[Bar]]]:
    sizes = sorted(
        {(size, run["parameters"]["endpoints"]) for run in runs
         for size in run["parameters"]["services"]}
    )  # fmt: skip
    for size, endpoints in sizes:
        group = []
        title = f"{size:,} x {endpoints} {row}"
        for run in runs:
            for series in run["series"]:
                if series["name"] == title:
                    value = series["median"]
                    group.append(
                        Bar(
                            run["parameters"]["mode"],
                            value,
                            f"{tables.number(value)} {series['unit']}",
                        )
                    )
        found = kubeproxy.figures(size, what) if endpoints == kubeproxy.ENDPOINTS else ()
        for mode, value, text in found:
            group.append(Bar("kube-proxy", value, f"{text}, {mode}"))
        if group:
            yield f"{size:,} services x {endpoints}", group
