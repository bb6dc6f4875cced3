"""Expected text beside the tests; `--update` rewrites it, the diff is then for review."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="rewrite golden files")


@pytest.fixture
def expect_text(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compare a text with a golden file, or with --update write it there."""
    update = request.config.getoption("--update", default=False)

    def expect(path: Path, text: str) -> None:
        if update:
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing: make golden ARGS=--update writes it"
        assert text == path.read_text()

    return expect
