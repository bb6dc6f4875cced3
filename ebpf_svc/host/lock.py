"""One agent at a time: locks on the directories an agent owns.

The lock is flock(2) on the directory itself: nothing is left behind, a killed agent frees it, and
it works on a BPF file system, where ordinary files cannot be made. The kernel's list of locks names
the holder.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from ebpf_svc.errors import UnsupportedHost


def _holder(fd: int) -> int | None:
    """Pid of the process that locks an open directory, None when it is not visible from here."""
    status = os.fstat(fd)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        # `1: FLOCK  ADVISORY  WRITE 812 00:1b:4711 0 EOF`; a waiter has `->` after the number.
        words = line.split()
        if words[1] == "FLOCK" and words[5] == place:
            return int(words[4])
    return None


class DirectoryLock:
    """Exclusive use of a directory until `release()` or the end of the process."""

    def __init__(self, directory: Path) -> None:
        """Take the lock; the directory is made when missing.

        Raises:
            UnsupportedHost: another process holds it; the message names its pid.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            pid = _holder(self._fd)
            os.close(self._fd)
            who = f"another agent (pid {pid})" if pid else "another agent"
            raise UnsupportedHost(
                [f"{who} uses {directory}: stop it, or choose another directory"]
            ) from exc

    def release(self) -> None:
        """Give the directory free; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lock_holder(directory: Path) -> int | None:
    """Pid of the process that holds the lock of a directory; None when nobody visible does."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _holder(fd)
    finally:
        os.close(fd)
