"""Keep what a run of the behaviour suite proved, to be shown as docs/behaviours.md.

A pytest plugin: with `--results FILE` the run's outcomes are written there as JSON, one record a
test function and variant. `tests.lib.behaviours` makes a page of such files, from this kernel and
others.
"""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

WORST_FIRST = ("failed", "xfailed", "skipped", "passed")
PROGRAM = "program "
"""Properties of a test of this name tell the size of an eBPF program."""


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a test function with a variant, the worst of its parameters'."""

    test: str
    """Module and function."""
    promise: str
    """The docstring."""
    variant: str
    outcome: str
    """One of WORST_FIRST."""
    reason: str = ""
    """Why it was expected to fail, failed, or was not run."""


@dataclass(slots=True)
class Results:
    """A run on one kernel."""

    kernel: str
    records: list[Record] = field(default_factory=list)
    programs: dict[str, Any] = field(default_factory=dict)
    """Sizes by option set and program."""

    def write(self, path: Path) -> None:
        """Keep them as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote."""
        held = json.loads(path.read_text())
        records = [Record(**record) for record in held["records"]]
        return cls(held["kernel"], records, held["programs"])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer --results."""
    parser.addoption("--results", type=Path, help="write the outcomes to this file, as JSON")


class Recorder:
    """Collects outcomes while the tests run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._promises: dict[str, str] = {}
        self._outcomes: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        self._programs: dict[str, Any] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note the outcome of a test under its function and variant."""
        report = yield
        callspec = getattr(item, "callspec", None)
        if report.when != "call" and report.passed:
            return report
        sizes = {
            name.removeprefix(PROGRAM): value
            for name, value in report.user_properties
            if name.startswith(PROGRAM)
        }
        if sizes and callspec:
            self._programs[callspec.id] = sizes
        variant = callspec.params.get("variant") if callspec else None
        if variant is None or not isinstance(item, pytest.Function):
            return report
        name = f"{item.path.stem}::{item.originalname}"
        self._promises[name] = (item.obj.__doc__ or item.originalname).strip()
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        self._outcomes[name, str(variant)].setdefault(outcome, _reason(report))
        return report

    def pytest_runtest_logfinish(self) -> None:
        """Write the file, after each test: a run that is cut short has proved something, too."""
        results = Results(platform.release(), programs=self._programs)
        for (name, variant), outcomes in sorted(self._outcomes.items()):
            worst = next(each for each in WORST_FIRST if each in outcomes)
            promise = self._promises[name]
            results.records.append(Record(name, promise, variant, worst, outcomes[worst]))
        results.write(self._path)


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail).removeprefix("reason: ")
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0] if crash else ""


def pytest_configure(config: pytest.Config) -> None:
    """Collect only when asked to."""
    path = config.getoption("--results")
    if path:
        config.pluginmanager.register(Recorder(path), "behaviour-results")
