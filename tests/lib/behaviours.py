"""Make docs/behaviours.md of results: a row a promise, a column a dataplane, its rules beside it.

`python -m tests.lib.behaviours PAGE RESULTS…` combines runs on any number of kernels. A dataplane's
column shows the kernel it was tried on most; what ran on others follows in a table each.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from tests.lib.matrix import Record, Results

RULES = re.compile(r"\b(?:[A-Z]{1,2}\d{1,2}(?:-[A-Z]{0,2}\d{1,2})?)\b")
MARKS = {"passed": "✓", "failed": "**fails**", "skipped": "not run", "xfailed": "gap"}

HEAD = """\
# Behaviours

What the behaviour suite proved, with real packets between network namespaces.
Written by `make behaviours`; do not edit.
Rule ids are those of the suite's docstrings: a letter for the subject, a number for the rule.

✓ passed, in every way (pod network, family, protocol) the suite runs it.
*gap*: the dataplane does not offer it; the reason is below.
*not run*: the dataplane cannot run on that kernel, or the run left it out.

| dataplane | tried on Linux |
|---|---|"""


class Runs:
    """Results of several runs; of one kernel, a later file counts."""

    def __init__(self, results: Iterable[Results]) -> None:
        self.cells: dict[tuple[str, str, str], Record] = {}
        """By kernel, variant and test."""
        self.programs: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
        """By kernel, option set and program."""
        for run in results:
            for record in run.records:
                self.cells[run.kernel, record.variant, record.test] = record
            if run.programs:
                self.programs.setdefault(run.kernel, {}).update(run.programs)

    def variants(self) -> list[str]:
        """Every column."""
        return sorted({variant for _, variant, _ in self.cells})

    def kernels(self, variant: str) -> list[str]:
        """The kernels a variant was tried on, that with most tests first."""
        passed: dict[str, int] = {}
        for (kernel, of, _), record in self.cells.items():
            if of == variant:
                passed[kernel] = passed.get(kernel, 0) + (record.outcome != "skipped")
        return sorted(passed, key=lambda kernel: (-passed[kernel], kernel))

    def promises(self) -> dict[str, str]:
        """By test."""
        return {test: record.promise for (_, _, test), record in sorted(self.cells.items())}


def page(results: Iterable[Results]) -> str:
    """The whole page."""
    runs = Runs(results)
    main = {variant: runs.kernels(variant)[0] for variant in runs.variants()}
    lines = [HEAD, *(f"| {variant} | {kernel} |" for variant, kernel in main.items())]
    tests = sorted(runs.promises())
    for area, group in groupby(tests, key=lambda test: test.split("::")[0]):
        title = area.removeprefix("test_").replace("_", " ")
        lines += [f"\n## {title[0].upper()}{title[1:]}\n", *_table(runs, list(group), main)]
    others = {(kernel) for kernel, variant, _ in runs.cells if main[variant] != kernel}
    for kernel in sorted(others, key=_version):
        ran = [variant for variant in main if any(c[:2] == (kernel, variant) for c in runs.cells)]
        also = sorted({test for at, _, test in runs.cells if at == kernel})
        lines += [f"\n## On Linux {kernel}\n", *_table(runs, also, dict.fromkeys(ran, kernel))]
    lines += ["\n## Gaps\n", *_reasons(runs, "xfailed")]
    lines += ["\n## Not run\n", *_reasons(runs, "skipped"), *_programs(runs), ""]
    return "\n".join(lines)


def _table(runs: Runs, tests: Sequence[str], columns: dict[str, str]) -> Iterator[str]:
    """Rows of these tests; columns are variants, each on its kernel."""
    yield "| promise | rules | " + " | ".join(columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    promises = runs.promises()
    for test in tests:
        found = [runs.cells.get((kernel, variant, test)) for variant, kernel in columns.items()]
        marks = [MARKS[record.outcome] if record else "not run" for record in found]
        rules = " ".join(dict.fromkeys(RULES.findall(promises[test])))
        yield f"| {_sentence(promises[test])} | {rules} | " + " | ".join(marks) + " |"


def _reasons(runs: Runs, outcome: str) -> list[str]:
    """Why tests had that outcome: a line a reason and promise, with all it holds for."""
    by_reason: dict[tuple[str, str], set[str]] = {}
    for (kernel, variant, _), record in runs.cells.items():
        if record.outcome == outcome:
            # What cannot run at all says the same of each test.
            what = _sentence(record.promise) if outcome == "xfailed" else ""
            by_reason.setdefault((record.reason, what), set()).add(f"`{variant}` ({kernel})")
    lines = [
        f"- {', '.join(sorted(who))}: {f'{what} ' if what else ''}{reason}"
        for (reason, what), who in sorted(by_reason.items())
    ]
    return lines or ["None."]


def _programs(runs: Runs) -> Iterator[str]:
    """How large the programs are, and how far the verifier walks."""
    if not runs.programs:
        return
    kernels = sorted(runs.programs, key=_version)
    yield "\n## Programs\n"
    yield "Instructions of each eBPF program, the most of any option set that was tried;"
    yield "in brackets how many of a million the verifier walked, where the kernel tells.\n"
    yield "| program | " + " | ".join(kernels) + " |"
    yield "|---|" + "---|" * len(kernels)
    names = sorted(
        {name for sets in runs.programs.values() for one in sets.values() for name in one}
    )
    for name in names:
        cells = []
        for kernel in kernels:
            sizes = [one[name] for one in runs.programs[kernel].values() if name in one]
            count = max((size["count"] for size in sizes), default=0)
            verified = max((size["verified"] for size in sizes), default=0)
            cells.append(f"{count}" + (f" ({verified})" if verified else ""))
        yield f"| {name} | " + " | ".join(cells) + " |"


def _version(kernel: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", kernel)[:3])


def _sentence(promise: str) -> str:
    """The docstring's first paragraph, without its rule ids."""
    text = " ".join(promise.split("\n\n", maxsplit=1)[0].split())
    text = re.sub(r"\s*\((?:[^()]*\b[A-Z]{1,2}\d[^()]*)\)", "", text)
    return re.sub(r"^(?:[A-Z]{1,2}\d{1,2}[,/ ]*)+:\s*", "", text).replace("|", "\\|")


def main(argv: Sequence[str]) -> None:
    """Write the page of these result files, which count in order of age."""
    target, *files = map(Path, argv)
    files.sort(key=lambda path: path.stat().st_mtime)
    target.write_text(page(Results.read(path) for path in files))


if __name__ == "__main__":
    main(sys.argv[1:])
