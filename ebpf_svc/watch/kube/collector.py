"""A pause for Python's garbage collector while very many objects are built.

A list of 100,000 endpoints holds no cycles, yet the collector would walk all of it several times as
it grows: a quarter of the time until the first plan.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0
_was_enabled = False


@contextmanager
def paused() -> Iterator[None]:
    """Keep the collector from running; pauses of several threads may overlap."""
    global _pauses, _was_enabled  # noqa: PLW0603 # the collector is the process's, too
    with _lock:
        if not _pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _was_enabled:
                gc.enable()
