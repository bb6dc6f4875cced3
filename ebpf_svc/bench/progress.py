"""How far a benchmark is: one line that changes on a terminal, a line per step elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Tells what is being done, and how long the rest may take."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._begun = time.monotonic()
        self._width = 0

    def doing(self, what: str, *, left_s: float | None = None) -> None:
        """Say what begins now."""
        rest = f"  about {left_s:.0f} s left" if left_s is not None else ""
        line = f"[{time.monotonic() - self._begun:4.0f} s] {what}{rest}"
        if not self._live:
            print(line, file=self._stream, flush=True)
            return
        print(f"\r{line.ljust(self._width)}", end="", file=self._stream, flush=True)
        self._width = len(line)

    def done(self, line: str) -> None:
        """Print a finished line and keep it."""
        if self._live:
            print(f"\r{' ' * self._width}\r", end="", file=self._stream)
            self._width = 0
        print(line, file=self._stream, flush=True)
