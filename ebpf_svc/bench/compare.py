"""`ebpf-svc bench compare OLD NEW`: what got better and what got worse, beyond what runs differ by.

Two runs of one machine differ by more than their spread when the machine was busy: of a data path
run the ratios to direct are compared, which that does not move.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebpf_svc.bench import figures, plots
from ebpf_svc.bench.figures import MORE, Comparison, spread
from ebpf_svc.bench.record import aligned
from ebpf_svc.bench.variants import DIRECT
from ebpf_svc.errors import EbpfSvcError

TOLERANCE = 0.05
"""Smaller differences are not told apart, however narrow the spread."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of two runs."""

    name: str
    old: float
    new: float
    ratio: float
    """New to old, as speed: above 1 is better."""
    noise: float
    """The spreads of both, together."""

    @property
    def verdict(self) -> str:
        """`WORSE` and `better` beyond the noise; empty within."""
        within = max(TOLERANCE, self.noise)
        if self.ratio < 1 - within:
            return "WORSE"
        return "better" if self.ratio > 1 + within else ""


class OtherRuns(EbpfSvcError):
    """Two files that cannot be compared."""


def rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Row]:
    """Every figure both runs have.

    Raises:
        OtherRuns: they are of different benchmarks.
    """
    if old["benchmark"] != new["benchmark"]:
        raise OtherRuns(f"a run of {old['benchmark']} and one of {new['benchmark']}")
    before, after = dict(_samples(old)), dict(_samples(new))
    for name in (name for name in before if name in after):
        (ours, more), (theirs, _) = after[name], before[name]
        middles = statistics.median(theirs), statistics.median(ours)
        if not all(middles):
            continue
        ratio = middles[1] / middles[0] if more else middles[0] / middles[1]
        yield Row(name, *middles, ratio, spread(theirs) + spread(ours))


def _samples(run: Mapping[str, Any]) -> Iterator[tuple[str, tuple[list[float], bool]]]:
    """Name -> samples, and whether more of it is better."""
    if run["benchmark"] == "path":
        for figure in Comparison.of(run).figures:
            at = f"{figure.key} at {figure.services:,} x {figure.backends:,}"
            for name in figure.samples:
                if name == DIRECT or DIRECT not in figure.samples:
                    continue
                yield f"{at}, {name} beside direct", (plots.relative_rounds(figure, name), True)
    elif run["benchmark"] == "packet":
        for row in run["rows"]:
            ours = next(name for name in row["samples_ns"] if name not in ("nothing", "minimal"))
            pairs = zip(row["samples_ns"][ours], row["samples_ns"]["nothing"], strict=True)
            name = f"IPv{row['family']} {row['case']}, {row['flows']} flows, {row['services']:,}"
            yield name, ([taken - empty for taken, empty in pairs], False)
    else:
        for series in run["series"]:
            more = series.get("better", "less") == MORE
            yield f"{series['name']} [{series['unit']}]", (series["samples"], more)


def table(found: Sequence[Row]) -> Iterator[str]:
    """The rows aligned, and how many of them got worse."""
    cells = [("", "old", "new", "speed", "noise", "")]
    for row in found:
        values = (f"{row.old:.4g}", f"{row.new:.4g}", f"{row.ratio:.2f}", f"±{row.noise:.0%}")
        cells.append((row.name, *values, row.verdict))
    yield from aligned(cells)
    worse = sum(1 for row in found if row.verdict == "WORSE")
    yield f"{worse} of {len(found)} figures got worse beyond what the runs spread by."


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files; the exit status is 1 when something got worse."""
    parser = argparse.ArgumentParser(prog="ebpf-svc bench compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args(argv)
    found = list(rows(figures.read(given.old), figures.read(given.new)))
    print("\n".join(table(found)))
    return int(any(row.verdict == "WORSE" for row in found))


if __name__ == "__main__":
    sys.exit(main())
