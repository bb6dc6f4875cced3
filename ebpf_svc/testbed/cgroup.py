"""Folders of the cgroup2 hierarchy: where processes live, and the sure way to end them all."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.testbed.patience import PATIENCE

KILL_DEADLINE_S = 5.0 * PATIENCE


def cgroup2_root() -> Path:
    """Where the cgroup2 hierarchy is mounted; raises UnsupportedHost when it is not."""
    with Path("/proc/mounts").open() as table:
        for line in table:
            _, target, kind, *_ = line.split()
            if kind == "cgroup2":
                return Path(target)
    raise UnsupportedHost(["cgroup2 is not mounted (mount -t cgroup2 none /sys/fs/cgroup)"])


def kill(cgroup: Path) -> None:
    """End every process of a cgroup and of those below it, and wait until they are gone."""
    at_once = cgroup / "cgroup.kill"
    deadline = time.monotonic() + KILL_DEADLINE_S
    if at_once.exists():
        at_once.write_text("1")
    while _populated(cgroup):
        if not at_once.exists():  # before Linux 5.14: again, until none has started another
            _kill_each(cgroup)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes in {cgroup} do not end")
        time.sleep(0.002)


def remove(cgroup: Path) -> None:
    """Kill what runs in a cgroup and remove it with everything below; it may not exist."""
    if not cgroup.is_dir():
        return
    kill(cgroup)
    for folder in sorted((path for path in cgroup.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()
    cgroup.rmdir()


def _kill_each(cgroup: Path) -> None:
    for listed in cgroup.rglob("cgroup.procs"):
        for pid in listed.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _populated(cgroup: Path) -> bool:
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except FileNotFoundError:
        return False
