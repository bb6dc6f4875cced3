"""What a comparison measured: figures of several variants, taken in turns in the same run.

A ratio is the median of the ratios within each round: what disturbs a round disturbs both sides.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ebpf_svc.errors import EbpfSvcError

FORMAT = 2
"""Raise it when a field of the JSON changes meaning."""
MORE, LESS = "more", "less"
"""Which way a figure is better."""


class NoSuchRun(EbpfSvcError):
    """A file is not a run of a benchmark."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of getting a packet to a backend."""

    name: str
    title: str
    skipped: str = ""
    """Why nothing was measured; empty = it was."""


@dataclass(slots=True)
class Figure:
    """One measure at one size, of every variant."""

    key: str
    title: str
    unit: str
    better: str
    services: int
    backends: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    """By variant, round by round."""
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    """By variant: what else was seen, medians over the rounds (p99_us, cpu_us, …)."""
    histograms: dict[str, list[list[int]]] = field(default_factory=dict)
    """By variant: pairs of least nanoseconds and count, all rounds together."""

    def median(self, variant: str) -> float:
        """The middle of a variant's samples."""
        return statistics.median(self.samples[variant])

    def spread(self, variant: str) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return spread(self.samples[variant])

    def ratio(self, variant: str, base: str) -> float | None:
        """Median of each round's ratio; None when one of them was not measured."""
        ours, theirs = self.samples.get(variant), self.samples.get(base)
        if not ours or not theirs:
            return None
        pairs = zip(ours, theirs, strict=False)
        return statistics.median(one / other for one, other in pairs if other)


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    middle = statistics.median(samples)
    if len(samples) < 2 or not middle:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2 / abs(middle)


@dataclass(slots=True)
class Comparison:
    """One run: every variant, every figure, and what it was taken on."""

    benchmark: str
    variants: list[Variant]
    environment: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What whoever reads the figures must know, such as a busy machine."""
    started_s: float = field(default_factory=time.time)
    took_s: float = 0.0

    @property
    def measured(self) -> list[Variant]:
        """Variants that were not skipped."""
        return [variant for variant in self.variants if not variant.skipped]

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, **asdict(self)}
        path.write_text(_compact(document) + "\n")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Comparison:
        """What `write` wrote."""
        fields = {name: value for name, value in document.items() if name != "format"}
        fields["variants"] = [Variant(**each) for each in fields["variants"]]
        fields["figures"] = [Figure(**each) for each in fields["figures"]]
        return cls(**fields)


def _compact(document: Mapping[str, Any]) -> str:
    """JSON with a line per figure: a diff of two runs can be read, and lists stay short."""
    head = {name: value for name, value in document.items() if name != "figures"}
    lines = ",\n  ".join(json.dumps(_rounded(each)) for each in document["figures"])
    text = json.dumps(head, indent=1, ensure_ascii=False)
    return f'{text[:-2]},\n "figures": [\n  {lines}\n ]\n}}'


def _rounded(value: Any) -> Any:
    """Six digits that count; no clock has more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


def read(path: Path) -> dict[str, Any]:
    """The JSON of a run of any benchmark.

    Raises:
        NoSuchRun: it is none.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NoSuchRun(f"{path}: {error}") from error
    if not isinstance(document, dict) or "benchmark" not in document:
        raise NoSuchRun(f"{path} is not a run of `ebpf-svc bench`")
    return document
