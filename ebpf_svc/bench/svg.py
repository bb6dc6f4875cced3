"""Bars and lines as SVG: self-contained, readable on paper and on a screen, no script.

Pure: numbers in, text out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
_FONT = "font-family='system-ui, -apple-system, Segoe UI, Roboto, sans-serif'"
_INK, _FAINT, _GRID = "#1f2430", "#6b7280", "#e4e7ec"
COLOURS = {
    "direct": "#8a8f98",
    "conntrack": "#c0c5cd",
    "ebpf": "#0f8f7e",
    "ebpf-tc": "#5cc4b5",
    "ebpf-fast": "#08594e",
    "ebpf-xdp": "#b5d334",
    "nftables": "#3b6fd4",
    "iptables": "#e08a2c",
    "ipvs": "#8e5bd0",
    "userspace": "#c2445a",
    "kube-proxy": "#444b59",
}
_OTHERS = ("#2f855a", "#b7791f", "#97266d", "#2c5282")


def colour(name: str) -> str:
    """A variant's colour, the same in every plot."""
    if name in COLOURS:
        return COLOURS[name]
    return _OTHERS[sum(name.encode()) % len(_OTHERS)]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, with a whisker from `low` to `high`."""

    name: str
    value: float
    text: str
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of horizontal bars."""

    title: str
    axis: str
    groups: Sequence[tuple[str, Sequence[Bar]]]
    titles: Mapping[str, str]
    """What the names of bars are called in the legend."""
    mark: float | None = None
    """Where a line stands that bars are held against."""
    log: bool = False


_LABEL, _RIGHT, _BAR, _GAP = 250, 96, 13, 16


def bars(plot: Bars) -> str:
    """Draw groups of bars, one below the other."""
    values = [one.value for _, group in plot.groups for one in group if one.value > 0]
    scale, ticks = _scale(values, plot.mark, plot.log)
    body: list[str] = []
    labels: list[str] = []
    legend, y = _legend(plot, 58)
    top = y
    for label, group in plot.groups:
        middle = y + len(group) * _BAR / 2 + 4
        body.append(_text(_LABEL - 12, middle, label, size=12.5, anchor="end"))
        for one in group:
            end = scale(one.value)
            body.append(
                f"<rect x='{_LABEL}' y='{y:.1f}' width='{max(1.0, end - _LABEL):.1f}' "
                f"height='{_BAR - 2}' rx='2' fill='{colour(one.name)}'>"
                f"<title>{escape(plot.titles.get(one.name, one.name))}: {escape(one.text)}</title>"
                "</rect>"
            )
            right = end
            if one.high > one.low > 0:
                low, right = scale(one.low), scale(one.high)
                at = y + (_BAR - 2) / 2
                body.append(
                    f"<path d='M{low:.1f} {at:.1f}H{right:.1f}' stroke='{_INK}' opacity='.55'/>"
                )
            at_end = _text(max(end, right) + 6, y + _BAR - 4, one.text, size=10.5, fill=_FAINT)
            over_lines = "<text paint-order='stroke' stroke='#ffffff' stroke-width='3' "
            labels.append(at_end.replace("<text ", over_lines))
            y += _BAR
        y += _GAP
    bottom = y - _GAP / 2
    grid = [
        f"<path d='M{scale(tick):.1f} {top - 8}V{bottom:.1f}' stroke='{_GRID}'/>"
        + _text(scale(tick), bottom + 15, _tick(tick), size=11, fill=_FAINT, anchor="middle")
        for tick in ticks
    ]
    if plot.mark is not None:
        at = scale(plot.mark)
        body.append(
            f"<path d='M{at:.1f} {top - 8}V{bottom:.1f}' stroke='{_INK}' stroke-dasharray='3 3'/>"
        )
    axis = _text((_LABEL + WIDTH - _RIGHT) / 2, bottom + 34, plot.axis, size=12, anchor="middle")
    return _document(plot.title, [*legend, *grid, *body, *labels, axis], bottom + 48)


def _scale(
    values: Sequence[float], mark: float | None, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """From a value to its place, and where the grid stands."""
    most = max([*values, mark or 0.0, 1e-9])
    span = WIDTH - _LABEL - _RIGHT
    if log:
        low = math.floor(math.log10(min(values)) - 0.05)
        high = math.ceil(math.log10(most))
        powers = [10.0**n for n in range(low, high + 1)]
        return (
            lambda value: _LABEL + span * (math.log10(max(value, 10**low)) - low) / (high - low)
        ), powers
    step = nice_step(most)
    ticks = [step * n for n in range(int(most / step) + 1)]
    return (lambda value: _LABEL + span * value / (most * 1.02)), ticks


def nice_step(most: float) -> float:
    """A round distance that gives about five grid lines."""
    rough = most / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough)


def _legend(plot: Bars, y: float) -> tuple[list[str], float]:
    names = list(dict.fromkeys(one.name for _, group in plot.groups for one in group))
    return _legend_of({name: plot.titles.get(name, name) for name in names}, y)


def _legend_of(titles: Mapping[str, str], y: float) -> tuple[list[str], float]:
    """Squares with names, as many rows as they need; returns where the plot begins."""
    parts, x = [], 24.0
    for name, title in titles.items():
        wide = 34 + len(title) * 6.6
        if x + wide > WIDTH - 16:
            x, y = 24.0, y + 20
        parts.append(
            f"<rect x='{x:.0f}' y='{y - 10:.0f}' width='11' height='11' rx='2' "
            f"fill='{colour(name)}'/>" + _text(x + 17, y, title, size=12)
        )
        x += wide
    return parts, y + 26


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over a logarithmic axis."""

    title: str
    axis: str
    side: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    titles: Mapping[str, str]
    marks: Sequence[float] = ()
    """Where the horizontal axis is labelled; none = at powers of ten."""
    dots: bool = True
    most: float | None = None
    """Where the vertical axis ends; none = at the highest point."""


def lines(plot: Lines) -> str:
    """Draw curves."""
    points = [point for curve in plot.curves.values() for point in curve if point[0] > 0]
    low, high = math.log10(min(x for x, _ in points)), math.log10(max(x for x, _ in points))
    high = max(high, low + 0.1)
    legend, top = _legend_of({name: plot.titles.get(name, name) for name in plot.curves}, 58)
    left, height = 74, 260
    most = plot.most or max(y for _, y in points) * 1.05
    bottom = top + height

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(max(x, 1e-12)) - low) / (high - low)
        return left + share * (WIDTH - left - 40), bottom - height * min(y, most) / most

    body = list(legend)
    step = nice_step(most)
    for n in range(int(most / step + 1e-9) + 1):
        y = at(1, step * n)[1]
        body.append(f"<path d='M{left} {y:.1f}H{WIDTH - 40}' stroke='{_GRID}'/>")
        body.append(_text(left - 8, y + 4, _tick(step * n), size=11, fill=_FAINT, anchor="end"))
    for mark in plot.marks or _powers(low, high):
        x = at(mark, 0)[0]
        body.append(f"<path d='M{x:.1f} {top}V{bottom}' stroke='{_GRID}'/>")
        body.append(_text(x, bottom + 16, _tick(mark), size=11, fill=_FAINT, anchor="middle"))
    for name, curve in plot.curves.items():
        places = [at(*point) for point in curve]
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        body.append(
            f"<path d='M{way}' fill='none' stroke='{colour(name)}' stroke-width='2.2' "
            "stroke-linejoin='round'/>"
        )
        if plot.dots:
            body += [
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.4' fill='{colour(name)}'/>"
                for x, y in places
            ]
    body.append(_text((left + WIDTH - 40) / 2, bottom + 36, plot.axis, size=12, anchor="middle"))
    body.append(_text(24, top - 8, plot.side, size=12, fill=_FAINT))
    return _document(plot.title, body, bottom + 50)


def _powers(low: float, high: float) -> Iterator[float]:
    for n in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1):
        yield 10.0**n


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.3g}"


def _text(
    x: float, y: float, text: str, *, size: float, fill: str = _INK, anchor: str = "start"
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{fill}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )


def _document(title: str, body: Sequence[str], height: float) -> str:
    head = _text(24, 30, title, size=17).replace("<text ", "<text font-weight='600' ")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0f}' "
        f"width='{WIDTH}' role='img' aria-label='{escape(title, quote=True)}' {_FONT}>"
        f"<rect width='100%' height='100%' rx='8' fill='#ffffff'/>{head}{''.join(body)}</svg>"
    )
