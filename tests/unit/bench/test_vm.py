"""Benchmarks under another kernel: which machine is asked for, and what it is called."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ebpf_svc.bench import generator, vm


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of the last guest that was asked for; each leaves an empty result."""
    words: list[str] = []

    def guest(argv: Sequence[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        words[:] = argv
        result = Path(argv[argv.index("--out") + 1]) / "test-logs/bench.json"
        result.parent.mkdir()
        result.write_text("{}")
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(subprocess, "run", guest)
    monkeypatch.setattr(generator, "program", lambda _: Path("generator"))
    return words


def test_emulated_kernel_counts_instructions_and_says_so(asked: list[str]) -> None:
    """Its modules are loaded first."""
    vm.run("6.1", "path", ["--services", "1"]).unlink()
    assert "--count-instructions" in asked
    assert "Linux 6.1 in an emulator, time = instructions" in asked[-1]
    assert "modprobe -a ip_vs" in asked[-1]


def test_kernel_as_a_process_has_the_machines_clock(asked: list[str]) -> None:
    """It has nothing to load, and memory for more services than an emulator gets through."""
    vm.run("6.12-um", "path", ["--services", "100000"]).unlink()
    assert "--count-instructions" not in asked
    assert asked[asked.index("--memory") + 1] == vm.MEMORY_OF_PROCESS
    assert "Linux 6.12 as a process" in asked[-1]
    assert "modprobe" not in asked[-1]
