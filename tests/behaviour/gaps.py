"""Behaviours a dataplane does not offer: each row is a strict expected failure.

Closing a gap fails the run until its row goes.
"""

from __future__ import annotations

GAPS: dict[tuple[str, str], str] = {}
"""(dataplane or variant, test function) -> why, in a sentence."""
