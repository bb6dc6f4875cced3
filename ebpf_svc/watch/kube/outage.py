"""When the API server may be asked, and by which of those who wait.

While it is away one request at a time tries, for all of them, after pauses that double up to a
limit; the first that is answered lets the others go at once. So the return is noticed within
a second, and a cluster's nodes together bring no more than one attempt a node and pause.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

FIRST_PAUSE_S = 0.1
JITTER = 0.5
"""A pause is shortened by up to this share, so that nodes that failed together part."""


class Outage:
    """Shared by all who ask one API server; thread-safe."""

    def __init__(
        self, longest_pause_s: float, *, jitter: Callable[[], float] = random.random
    ) -> None:
        self._longest_s = longest_pause_s
        self._jitter = jitter
        self._changed = threading.Condition()
        self._failures = 0
        self._next_s = 0.0
        self._trying = False
        self._since_s = 0.0

    @property
    def failures(self) -> int:
        """How often in a row the server did not answer."""
        return self._failures

    @property
    def is_on(self) -> bool:
        """The last request failed for reasons of the server."""
        return self._failures > 0

    def wait_turn(self, stopping: threading.Event) -> None:
        """Return when a request may be sent, or when stopping; the caller then reports how it
        went, by `over` or `failed`."""
        with self._changed:
            while self._failures and not stopping.is_set():
                pause_s = self._next_s - time.monotonic()
                if not self._trying and pause_s <= 0:
                    self._trying = True
                    return
                self._changed.wait(None if self._trying else pause_s)

    def over(self) -> float | None:
        """Say that the server answered; returns how long it was away, None = it was not."""
        with self._changed:
            if not self._failures:
                return None
            self._failures, self._trying = 0, False
            self._changed.notify_all()
            return time.monotonic() - self._since_s

    def failed(self, retry_after_s: float | None = None) -> float | None:
        """Say that the server does not answer; returns the pause, None = others said so before."""
        now_s = time.monotonic()
        with self._changed:
            first = not self._failures
            if first:
                self._since_s = now_s
            elif not self._trying and now_s < self._next_s:
                return None
            doubled_s = FIRST_PAUSE_S * 2.0 ** min(self._failures, 20)
            pause_s = min(doubled_s, self._longest_s) * (1 - JITTER * self._jitter())
            pause_s = max(pause_s, retry_after_s or 0.0)
            self._failures += 1
            self._trying = False
            self._next_s = now_s + pause_s
            self._changed.notify_all()
            return pause_s

    def wake(self) -> None:
        """Let everyone who waits look whether they are to stop."""
        with self._changed:
            self._changed.notify_all()
