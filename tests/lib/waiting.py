"""Waiting for what must become true: returns at once when it is, shows the last value when not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from ebpf_svc.testbed.patience import PATIENCE

T = TypeVar("T")

POLL_S = 0.01


def eventually(
    look: Callable[[], T], *, until: Callable[[T], object] = bool, within_s: float = 5.0
) -> T:
    """Look again and again until the value will do, and return it.

    Raises:
        AssertionError: it never did within the deadline; the message shows the last value.
    """
    deadline = time.monotonic() + within_s * PATIENCE
    while True:
        value = look()
        if until(value):
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"after {within_s * PATIENCE} s still: {value!r}")
        time.sleep(POLL_S)


def wait_out(seconds: float) -> None:
    """Let time pass that is itself what is tested, such as a timeout; not to wait for results."""
    time.sleep(seconds)
