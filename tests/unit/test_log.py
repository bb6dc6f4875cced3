"""Log lines: two looks, one list of keys."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ebpf_svc
from ebpf_svc.log import KEYS, LogFormat, configure, get_logger


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _default_logging() -> Iterator[None]:
    yield
    configure()


def test_line_into_a_pipe_is_json() -> None:
    """A machine gets one JSON object per line, with time, level and module."""
    out = io.StringIO()
    configure(stream=out)
    get_logger("ebpf_svc.sync").info("sync.applied", revision=3, took_ms=1.5)
    line = json.loads(out.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "sync.applied",
        "level": "info",
        "module": "sync",
        "revision": 3,
        "took_ms": 1.5,
    }


def test_line_on_a_terminal_is_coloured_text() -> None:
    """A person gets text with colours."""
    out = Terminal()
    configure(stream=out)
    get_logger("ebpf_svc.sync").warning("sync.repaired", count=1)
    assert "sync.repaired" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_format_can_be_forced() -> None:
    """`--log-format` wins over what the stream is; colours need a terminal all the same."""
    terminal, pipe = Terminal(), io.StringIO()
    configure(style=LogFormat.JSON, stream=terminal)
    get_logger("ebpf_svc.sync").info("sync.applied")
    configure(style=LogFormat.CONSOLE, stream=pipe)
    get_logger("ebpf_svc.sync").info("sync.applied")
    assert json.loads(terminal.getvalue())["event"] == "sync.applied"
    assert "sync.applied" in pipe.getvalue()
    assert "\x1b[" not in pipe.getvalue()


def test_level_below_the_threshold_is_silent() -> None:
    """Debug lines cost nothing unless asked for."""
    out = io.StringIO()
    configure(stream=out, level="warning")
    get_logger("ebpf_svc.sync").info("sync.applied")
    assert out.getvalue() == ""


def test_unknown_key_raises_while_a_test_runs() -> None:
    """A misspelt key is found by the first test that logs it."""
    configure(stream=io.StringIO())
    with pytest.raises(ValueError, match="revison"):
        get_logger("ebpf_svc.sync").info("sync.applied", revison=3)


def test_unknown_key_passes_in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent does not stop over a log line."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    out = io.StringIO()
    configure(stream=out)
    get_logger("ebpf_svc.sync").info("sync.applied", revison=3)
    assert json.loads(out.getvalue())["revison"] == 3


def test_every_key_the_package_logs_is_declared() -> None:
    """Also those on paths no test takes: the sources are read, not run."""
    package = Path(ebpf_svc.__file__).parent
    unknown = []
    for source in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            is_log = isinstance(node.func.value, ast.Name) and node.func.value.id == "log"
            names = [keyword.arg for keyword in node.keywords if is_log and keyword.arg]
            where = f"{source.relative_to(package)}:{node.lineno}"
            unknown += [f"{where}: {name}" for name in names if name not in KEYS]
    assert unknown == []


def test_agent_does_not_load_rich() -> None:
    """Logging leaves rich out of the agent, and leaves it loadable for `show`."""
    code = "import sys, ebpf_svc.log; assert 'rich' not in sys.modules; import rich.table"
    subprocess.run([sys.executable, "-c", code], check=True)
