"""One agent at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.host.lock import DirectoryLock, lock_holder

HOLD = """
import sys
from pathlib import Path
from ebpf_svc.host.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_second_agent_is_refused_and_told_the_pid(tmp_path: Path) -> None:
    """The message names who holds the directory, so that one can stop it."""
    with (
        DirectoryLock(tmp_path),
        pytest.raises(UnsupportedHost, match=rf"pid {os.getpid()}.*{tmp_path}"),
    ):
        DirectoryLock(tmp_path)


def test_directory_is_made_when_missing(tmp_path: Path) -> None:
    """The first agent of a host finds no /run/ebpf-svc."""
    with DirectoryLock(tmp_path / "run" / "ebpf-svc") as lock:
        assert lock.directory.is_dir()


def test_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    """Releasing twice is harmless."""
    lock = DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    DirectoryLock(tmp_path).release()


def test_other_directories_are_free(tmp_path: Path) -> None:
    """Agents of several simulated nodes run on one machine."""
    with DirectoryLock(tmp_path / "a"), DirectoryLock(tmp_path / "b"):
        assert lock_holder(tmp_path / "a") == os.getpid()


def test_killed_agent_leaves_no_lock(tmp_path: Path) -> None:
    """SIGKILL frees the directory: nothing has to be removed by hand."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert lock_holder(tmp_path) == holder.pid
        holder.kill()
        holder.wait()
        DirectoryLock(tmp_path).release()


def test_nobody_holds_a_free_or_missing_directory(tmp_path: Path) -> None:
    """Asking takes no lock itself."""
    assert lock_holder(tmp_path) is None
    assert lock_holder(tmp_path / "missing") is None
