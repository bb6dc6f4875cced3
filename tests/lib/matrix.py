"""Keep what a run of the behaviour suite proved, to be shown as docs/behaviours.md.

A pytest plugin: with `--results FILE` the run's outcomes are written there as JSON, one record a
test function and variant. `tests.lib.behaviours` makes a page of such files, from this kernel and
others.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

WORST_FIRST = ("failed", "xfailed", "skipped", "passed")
PROGRAM = "program "
"""Properties of a test of this name tell the size of an eBPF program."""
PROVED, SIZES = "proved", "sizes"
"""Properties of a report: its `Record`, and the sizes of programs by parameters of the test."""


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note on the report what it proved: the report may go to another process (pytest-xdist)."""
    report = yield
    callspec = getattr(item, "callspec", None)
    if callspec is None or (report.when != "call" and report.passed):
        return report
    sizes = {
        name.removeprefix(PROGRAM): value
        for name, value in report.user_properties
        if name.startswith(PROGRAM)
    }
    if sizes:
        report.user_properties.append((SIZES, {callspec.id: sizes}))
    variant = callspec.params.get("variant")
    if variant is not None and isinstance(item, pytest.Function):
        record = Record(
            test=f"{item.path.stem}::{item.originalname}",
            promise=(item.obj.__doc__ or item.originalname).strip(),
            variant=str(variant),
            outcome="xfailed" if hasattr(report, "wasxfail") else report.outcome,
            reason=_reason(report),
        )
        report.user_properties.append((PROVED, asdict(record)))
    return report


class Recorder:
    """Collects what reports say was proved."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[tuple[str, str], Record] = {}
        self._programs: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test function and variant keep the worst outcome, the first of it."""
        properties: list[tuple[str, Any]] = list(report.user_properties)
        for name, value in properties:
            if name == SIZES:
                self._programs.update(value)
            elif name == PROVED:
                record = Record(**value)
                known = self._records.setdefault((record.test, record.variant), record)
                if WORST_FIRST.index(record.outcome) < WORST_FIRST.index(known.outcome):
                    self._records[record.test, record.variant] = record

    def pytest_runtest_logfinish(self) -> None:
        """Write the file, after each test: a run that is cut short has proved something, too."""
        records = [record for _, record in sorted(self._records.items())]
        Results(platform.release(), records, self._programs).write(self._path)


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail).removeprefix("reason: ")
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0] if crash else ""


def pytest_configure(config: pytest.Config) -> None:
    """Collect only when asked to, and where all reports arrive."""
    path = config.getoption("--results")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path), "behaviour-results")
