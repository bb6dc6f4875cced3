"""Whole plans as readable text; `make golden ARGS=--update` rewrites them for review."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from ebpf_svc.plan.planner import Planner
from tests.golden.plan.cases import CASES
from tests.lib.plantext import state_text

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_situation_gives_the_plan_on_file(case, expect_text):
    """What a node does in each situation changes only on purpose, in a reviewed diff."""
    about = "".join(f"# {line}".rstrip() + "\n" for line in inspect.getdoc(case).splitlines())
    state = Planner(CASES[case]).plan(case())

    expect_text(HERE / f"{case.__name__}.txt", f"{about}\n{state_text(state)}")


def test_every_file_belongs_to_a_situation():
    """A renamed case leaves no stale expectation behind."""
    assert {path.stem for path in HERE.glob("*.txt")} == {case.__name__ for case in CASES}
