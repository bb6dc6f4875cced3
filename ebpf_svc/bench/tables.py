"""Comparisons as aligned text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ebpf_svc.bench.figures import Comparison, Figure
from ebpf_svc.bench.record import aligned
from ebpf_svc.bench.variants import DIRECT

PEERS = ("ipvs", "nftables", "iptables")
"""Beside whom the eBPF modes are held: the first that was measured."""


def number(value: float) -> str:
    """Three digits that count, thousands apart."""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 4
        return f"{round(value, -max(0, digits)):,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def peer_of(comparison: Comparison) -> str | None:
    """The best known peer that was measured."""
    names = {variant.name for variant in comparison.measured}
    return next((peer for peer in PEERS if peer in names), None)


def size(figure: Figure) -> str:
    """At which size a figure was taken."""
    backends = "backend" if figure.backends == 1 else "backends"
    return f"{figure.services:,} x, {figure.backends:,} {backends}"


def line(figure: Figure, comparison: Comparison) -> str:
    """A figure in one line, while the run goes on."""
    parts = []
    for variant in comparison.measured:
        if variant.name not in figure.samples:
            continue
        ratio = figure.ratio(variant.name, DIRECT)
        beside = f" ({ratio:.2f})" if ratio is not None and variant.name != DIRECT else ""
        parts.append(f"{variant.name} {number(figure.median(variant.name))}{beside}")
    return f"{figure.title} [{figure.unit}] {size(figure)}: {'  '.join(parts)}"


def comparison(comparison: Comparison) -> Iterator[str]:
    """Every figure as a table, then what must be known about them."""
    peer = peer_of(comparison)
    for figure in comparison.figures:
        better = "more is better" if figure.better == "more" else "less is better"
        yield ""
        yield f"{figure.title} [{figure.unit}], {size(figure)}; {better}"
        head = ("", "median", "spread", "/ direct", f"/ {peer}" if peer else "")
        details = [name for name in ("p50_us", "p99_us", "p999_us", "cpu_us")
                   if any(name in each for each in figure.details.values())]  # fmt: skip
        rows = [(*head, *(DETAILS[name] for name in details))]
        for variant in comparison.measured:
            if variant.name in figure.samples:
                rows.append(_row(figure, variant.name, variant.title, peer, details))
        yield from aligned(rows)
    yield ""
    for variant in comparison.variants:
        if variant.skipped:
            yield f"{variant.title}: not measured: {variant.skipped}"
    yield from comparison.notes


DETAILS = {
    "p50_us": "p50 µs",
    "p99_us": "p99 µs",
    "p999_us": "p99.9 µs",
    "cpu_us": "CPU µs each",
}
"""What else is told of a figure, and how it is called."""


def _row(
    figure: Figure, name: str, title: str, peer: str | None, details: Sequence[str]
) -> tuple[str, ...]:
    seen = figure.details.get(name, {})
    return (
        f"  {title}",
        number(figure.median(name)),
        f"±{figure.spread(name):.0%}",
        _ratio(figure.ratio(name, DIRECT)),
        _ratio(figure.ratio(name, peer)) if peer else "",
        *(number(seen[detail]) if detail in seen else "" for detail in details),
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
