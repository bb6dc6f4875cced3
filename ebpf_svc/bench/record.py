"""Samples of a benchmark, the machine they are from, a table for people and JSON for programs.

Figures of one machine or one day say little beside those of another: a record keeps every sample
and what it was taken on.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ebpf_svc import __version__
from ebpf_svc.host import toolchain

_KUBE_PROXY = "kube-proxy"
FORMAT = 1
"""Raise it when a field of the JSON changes meaning."""


@dataclass(frozen=True, slots=True)
class Series:
    """Samples of one figure, all taken in one run."""

    name: str
    unit: str
    samples: tuple[float, ...]
    limit: float | None = None
    """What the figure must not exceed, judged by `judged`; None = it is only told."""
    judged: str = "median"
    """Which property is held against the limit: `median`, `p99` or `most`."""
    beside: str = ""
    """What kube-proxy took for the same, in words."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)

    @property
    def most(self) -> float:
        return max(self.samples)

    @property
    def p99(self) -> float:
        """The sample that one in a hundred exceeds; the largest below a hundred samples."""
        ordered = sorted(self.samples)
        return ordered[max(0, -(-len(ordered) * 99 // 100) - 1)]

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.samples) < 2 or not self.median:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / abs(self.median)

    @property
    def holds(self) -> bool | None:
        """Whether the limit is kept; None without a limit."""
        if self.limit is None:
            return None
        value: float = getattr(self, self.judged)
        return value <= self.limit


@dataclass(slots=True)
class Record:
    """One run of one benchmark."""

    benchmark: str
    series: list[Series] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the run was told, by the names of the command's options."""
    started_s: float = field(default_factory=time.time)

    def add(
        self,
        name: str,
        samples: Sequence[float],
        unit: str,
        *,
        limit: float | None = None,
        judged: str = "median",
        beside: str = "",
    ) -> Series:
        """Keep samples, in the order they were taken; at least one."""
        series = Series(name, unit, tuple(samples), limit, judged, beside)
        self.series.append(series)
        return series

    @property
    def holds(self) -> bool:
        """Whether every limit is kept."""
        return all(series.holds is not False for series in self.series)

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        document = {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "started_s": self.started_s,
            "took_s": round(time.time() - self.started_s, 3),
            "environment": environment(),
            "parameters": self.parameters,
            "series": [
                {
                    "name": each.name,
                    "unit": each.unit,
                    "median": each.median,
                    "p99": each.p99,
                    "spread": each.spread,
                    "limit": each.limit,
                    "judged": each.judged,
                    "holds": each.holds,
                    "beside": each.beside,
                    "samples": each.samples,
                }
                for each in self.series
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    def print(self, stream: TextIO | None = None) -> None:
        """Print a line per figure: median, spread, least, p99, most, and how the limit fared."""
        head = ["", "median", "spread", "least", "p99", "most", "n", "limit"]
        rows = [[*_row(series), series.beside] for series in self.series]
        for line in aligned([[*head, _KUBE_PROXY if any(row[-1] for row in rows) else ""], *rows]):
            print(line, file=stream or sys.stdout)


def _row(series: Series) -> tuple[str, ...]:
    limit = ""
    if series.limit is not None:
        verdict = "held" if series.holds else "MISSED"
        limit = f"{series.judged} ≤ {_number(series.limit)}: {verdict}"
    return (
        f"{series.name} [{series.unit}]",
        _number(series.median),
        f"±{series.spread:.0%}",
        _number(series.least),
        _number(series.p99),
        _number(series.most),
        str(len(series.samples)),
        limit,
    )


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()


def _number(value: float) -> str:
    """Three digits that count."""
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def environment() -> dict[str, Any]:
    """What of this machine may explain a figure."""
    return {
        "version": __version__,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "python": platform.python_version(),
        "bcc": toolchain.bcc_version(),
        "spectre_v2": _read("/sys/devices/system/cpu/vulnerabilities/spectre_v2"),
        "jit": _read("/proc/sys/net/core/bpf_jit_enable"),
        "load_1m": os.getloadavg()[0],
    }


def interprets_programs(machine: Mapping[str, Any]) -> bool:
    """Whether a run was made on a kernel that does not compile eBPF programs to machine code.

    Args:
        machine: what `environment` told of it; old runs may lack something.
    """
    return machine.get("jit", "1") in ("", "0")


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
