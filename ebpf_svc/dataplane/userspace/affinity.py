"""Which backend a client of a service with affinity has: in memory, and in a file (P13, U4).

The file is a log that is only appended to: what was written is there after a SIGKILL as well. It
is written anew when most of its lines are outdated. Clocks: wall time, for it outlives the agent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FILE = "userspace-affinity"
ENTRIES = 100_000
"""Clients remembered at most; the one seen longest ago makes room."""
SPARE_LINES = 1_000
RENEWAL = 10
"""A renewal reaches the file once in this part of the timeout: what a restart may forget."""


class _Entry(NamedTuple):
    backend: str
    used: float
    """Seconds since the epoch."""
    written: float
    """The time that the file has."""


class Affinity:
    """Backends by service port and client, the one used longest ago first."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """Read what an earlier agent knew.

        Args:
            path: the file; None = none is kept.
            clock: seconds since the epoch.
        """
        self._path, self._clock = path, clock
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._lines = 0
        self._fd = -1
        if path is not None:
            self._load(path)
            self._rewrite()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, port: str, client: str, timeout_s: float) -> str | None:
        """The backend of a client whose time is not over; does not renew it."""
        entry = self._entries.get((port, client))
        if entry is None or self._clock() - entry.used > timeout_s:
            return None
        return entry.backend

    def put(self, port: str, client: str, backend: str, timeout_s: float) -> None:
        """Note that a client uses a backend now."""
        now = self._clock()
        last = self._entries.pop((port, client), None)
        written = last.written if last is not None and last.backend == backend else -1.0
        if now - written >= timeout_s / RENEWAL:
            self._append(port, client, backend, now)
            written = now
        self._entries[port, client] = _Entry(backend, now, written)
        if len(self._entries) > ENTRIES:
            del self._entries[next(iter(self._entries))]

    def forget(self, port: str, client: str) -> None:
        """Let a client choose anew: its backend did not answer (U5)."""
        if self._entries.pop((port, client), None) is not None:
            self._append(port, client, "", self._clock())

    def retain(self, keep: Callable[[str, str, float], bool]) -> None:
        """Drop entries that `keep` (service port, backend, seconds since its use) does not want."""
        now = self._clock()
        self._entries = {
            key: entry
            for key, entry in self._entries.items()
            if keep(key[0], entry.backend, now - entry.used)
        }

    def close(self) -> None:
        """Stop writing; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, port: str, client: str, backend: str, used: float) -> None:
        if self._fd < 0:
            return
        with suppress(OSError):  # a full disk costs what a restart would remember, no more
            os.write(self._fd, _line(port, client, backend, used).encode())
        self._lines += 1
        if self._lines > 2 * len(self._entries) + SPARE_LINES:
            self._rewrite()

    def _load(self, path: Path) -> None:
        now = self._clock()
        try:
            text = path.read_text(errors="replace")
        except OSError:
            return
        for port, client, backend, used in _parse(text):
            self._entries.pop((port, client), None)
            if backend:
                # A clock that was set back must not make entries last for ever.
                self._entries[port, client] = _Entry(backend, min(used, now), used)
        while len(self._entries) > ENTRIES:
            del self._entries[next(iter(self._entries))]

    def _rewrite(self) -> None:
        assert self._path is not None
        self.close()
        lines = [_line(*key, entry.backend, entry.used) for key, entry in self._entries.items()]
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            scratch.write_text("".join(lines))
            scratch.replace(self._path)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._lines = len(lines)


def _line(port: str, client: str, backend: str, used: float) -> str:
    return f"{port}\t{client}\t{backend}\t{used:.3f}\n"


def _parse(text: str) -> Iterator[tuple[str, str, str, float]]:
    """The lines that are whole: the last one may have been cut by a crash."""
    for line in text.splitlines():
        try:
            port, client, backend, used = line.split("\t")
            yield port, client, backend, float(used)
        except ValueError:
            continue
