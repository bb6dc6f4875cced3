"""docs/peers.md: the tests it names are there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path("docs/peers.md")
RINGS = ("tests/behaviour", "tests/packet")
_DEFINED = re.compile(r"^\s*def (test_\w+)\(", re.MULTILINE)
_NAMED = re.compile(r"`(?:(tests/\S+\.py)::)?(test_\w+)`")


def _defined(files: list[Path]) -> set[str]:
    return {name for file in files for name in _DEFINED.findall(file.read_text())}


def test_every_test_named_exists() -> None:
    """A test that is renamed takes its row along."""
    in_rings = _defined([file for ring in RINGS for file in Path(ring).glob("test_*.py")])
    named = _NAMED.findall(PAGE.read_text())
    missing = [
        test for path, test in named if test not in (_defined([Path(path)]) if path else in_rings)
    ]

    assert len(named) > 40
    assert missing == []


def test_every_problem_has_a_test_or_a_reason() -> None:
    """No row is empty."""
    tested, untested = PAGE.read_text().split("Not tested here")
    rows = [line for line in tested.splitlines() if line.startswith("| ")][1:]

    assert [row for row in rows if "`test_" not in row and "::test_" not in row] == []
    assert all(cell.strip() for row in untested.splitlines() if row.startswith("| ")
               for cell in row.strip("|").split("|"))  # fmt: skip
