"""How many requests may be sent: kube-proxy's qps and burst."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimit:
    """A bucket of tokens that refills evenly; thread-safe."""

    def __init__(
        self,
        qps: float,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Start full.

        Args:
            qps: tokens a second; 0 or less = no limit.
            burst: tokens the bucket holds, at least 1.
            clock: seconds that only grow.
            sleep: waits for so many seconds.
        """
        self._qps, self._burst = qps, max(burst, 1)
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._tokens, self._filled_s = float(self._burst), clock()

    def wait(self) -> None:
        """Take a token; return when it is there. Whoever asked first is served first."""
        if self._qps <= 0:
            return
        with self._lock:
            now_s = self._clock()
            grown = (now_s - self._filled_s) * self._qps
            self._tokens = min(self._burst, self._tokens + grown) - 1
            self._filled_s = now_s
            pause_s = -self._tokens / self._qps
        if pause_s > 0:
            self._sleep(pause_s)
