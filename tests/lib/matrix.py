"""Print what the behaviour suite proved as a table for people: docs/behaviours.md.

A pytest plugin: with `--matrix PATH` the run's results are written there, a row a promise (the
test's docstring, with its rule ids), a column a dataplane.
"""

from __future__ import annotations

import platform
import re
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest

RULES = re.compile(r"\b(?:[A-Z]{1,2}\d{1,2}(?:-[A-Z]{0,2}\d{1,2})?)\b")
MARKS = {"passed": "✓", "failed": "**fails**", "skipped": "not run here", "xfailed": "gap"}
WORST_FIRST = ("failed", "xfailed", "skipped", "passed")

HEAD = """\
# Behaviours

What the behaviour suite proved, with real packets between network namespaces.
Written by `make behaviours`; do not edit.
Rule ids are those of the suite's docstrings: a letter for the subject, a number for the rule.

Kernel {kernel}. ✓ passed, in every variant (pod network, family, protocol) the suite runs it in.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer --matrix."""
    parser.addoption("--matrix", type=Path, help="write the table of behaviours to this file")


class Matrix:
    """Results by area, promise and dataplane."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._promises: dict[str, tuple[str, str]] = {}
        self._outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._reasons: dict[tuple[str, str], str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note the outcome of a test under its function and dataplane."""
        report = yield
        callspec = getattr(item, "callspec", None)
        dataplane = callspec.params.get("variant") if callspec else None
        if dataplane is None or not isinstance(item, pytest.Function):
            return report
        if report.when != "call" and report.passed:
            return report
        name = f"{item.path.stem}::{item.originalname}"
        self._promises[name] = (item.path.stem, (item.obj.__doc__ or item.originalname).strip())
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        self._outcomes[name, str(dataplane)].add(outcome)
        if outcome == "xfailed":
            self._reasons[name, str(dataplane)] = str(report.wasxfail)
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        dataplanes = sorted({dataplane for _, dataplane in self._outcomes})
        lines = [HEAD.format(kernel=platform.release())]
        area = ""
        for name, (module, promise) in sorted(self._promises.items()):
            if module != area:
                area = module
                title = area.removeprefix("test_").replace("_", " ")
                lines += [
                    f"\n## {title[0].upper()}{title[1:]}\n",
                    "| promise | rules | " + " | ".join(dataplanes) + " |",
                    "|---|---|" + "---|" * len(dataplanes),
                ]
            cells = [self._cell(name, dataplane) for dataplane in dataplanes]
            rules = " ".join(dict.fromkeys(RULES.findall(promise)))
            lines.append(f"| {self._sentence(promise)} | {rules} | " + " | ".join(cells) + " |")
        gaps = [
            f"- `{dataplane}`, {self._sentence(self._promises[name][1])}: {reason}"
            for (name, dataplane), reason in sorted(self._reasons.items())
        ]
        lines += ["\n## Gaps\n", *(gaps or ["None."]), ""]
        self._path.write_text("\n".join(lines))

    def _cell(self, name: str, dataplane: str) -> str:
        outcomes = self._outcomes[name, dataplane]
        return next((MARKS[worst] for worst in WORST_FIRST if worst in outcomes), "")

    @staticmethod
    def _sentence(promise: str) -> str:
        """The docstring's first sentence, without its rule ids."""
        text = " ".join(promise.split("\n\n", maxsplit=1)[0].split())
        text = re.sub(r"\s*\((?:[^()]*\b[A-Z]{1,2}\d[^()]*)\)", "", text)
        return re.sub(r"^(?:[A-Z]{1,2}\d{1,2}[,/ ]*)+:\s*", "", text).replace("|", "\\|")


def pytest_configure(config: pytest.Config) -> None:
    """Collect only when asked to."""
    path = config.getoption("--matrix")
    if path:
        config.pluginmanager.register(Matrix(path), "behaviour-matrix")
