"""What is held of the instructions a request takes."""

from __future__ import annotations

from types import SimpleNamespace

from tests.vm import requests


def figure(unit: str, **samples: list[float]) -> SimpleNamespace:
    return SimpleNamespace(title="TCP", backends=1, unit=unit, samples=samples)


def test_best_round_counts() -> None:
    """What interrupts a round only adds to it, whether it is told as a rate or as a time."""
    run = SimpleNamespace(figures=[figure("1/s", ebpf=[4000, 5000, 4500])])
    assert requests.counts(run) == {"TCP, 1 backends: ebpf": 200_000}  # type: ignore[arg-type]
    run = SimpleNamespace(figures=[figure("µs", ebpf=[41.0, 40.0, 60.0])])
    assert requests.counts(run) == {"TCP, 1 backends: ebpf": 40_000}  # type: ignore[arg-type]


def test_growth_and_absence_are_found_of_what_is_ours() -> None:
    """A request without a Service is no work of ours, however long it takes."""
    before = {"TCP: ebpf": 1000, "TCP: ipvs": 1000, "UDP: ebpf": 1000, "TCP: direct": 1000}
    now = {"TCP: ebpf": 1029, "TCP: ipvs": 1031, "TCP: direct": 2000}
    assert requests.grown(now, before) == ["TCP: ipvs", "UDP: ebpf"]
