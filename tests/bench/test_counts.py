"""Counts that must not grow without somebody meaning it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebpf_svc.bench import counts
from ebpf_svc.bench.counts import ANYWHERE

RECORDED = Path(__file__).with_name("counts.json")


@pytest.mark.root
def test_no_count_has_grown() -> None:
    """Writes and system calls of an apply, instructions compiled and verified.

    Where growth is meant: make bench-counts ARGS=--update, and commit what it changed.
    """
    recorded = json.loads(RECORDED.read_text())
    measured = counts.measure()
    for scope in measured.keys() - recorded.keys():
        print(f"not compared: nothing is recorded for {scope}")
    assert list(counts.grown(recorded, measured)) == []
    assert measured[ANYWHERE]["ebpf: 100 x 10, nothing changed: bpf calls"] == 0


def test_growth_and_what_is_not_recorded_are_told() -> None:
    """Fewer is fine; a compiler or kernel nobody recorded is not compared."""
    recorded = {ANYWHERE: {"a": 5, "b": 5, "c": 5}}
    measured = {ANYWHERE: {"a": 5, "b": 4, "c": 6, "d": 1}, "Linux 9.9": {"x": 1}}
    assert list(counts.grown(recorded, measured)) == [
        "c (anywhere): 6, was 5",
        "d (anywhere): 1, not recorded yet",
    ]


def test_the_verifier_may_walk_a_little_further() -> None:
    """Another number in the source makes other states alike; one percent is no growth."""
    recorded = {"Linux 6.18": {"x: instructions verified": 1_000}}
    assert not list(counts.grown(recorded, {"Linux 6.18": {"x: instructions verified": 1_010}}))
    assert list(counts.grown(recorded, {"Linux 6.18": {"x: instructions verified": 1_011}}))
