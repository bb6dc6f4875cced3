"""Which kernel the tests run on."""

from __future__ import annotations

import os


def running_kernel() -> tuple[int, int]:
    """Major and minor version."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)
