"""What the real kube-proxy took for the same work: data, to stand beside our figures."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_DATA = Path(__file__).with_name("kube-proxy.json")
ENDPOINTS = 10
"""Of each service, in all of it."""


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_DATA.read_text())
    return found


def source() -> str:
    """Which kube-proxy, and where it was measured."""
    said: str = _data()["source"]
    return said


def beside(mode: str, services: int, endpoints: int, what: str) -> str:
    """Its figures in words, least and most of its runs; empty when there are none.

    Args:
        mode: ours; beside it stand kube-proxy's of that name, with either variant of the tool
            iptables. A mode kube-proxy has not stands beside all of its own.
        what: cold_s, change_ms, change_cpu_ms or memory_mib.
    """
    if endpoints != ENDPOINTS:
        return ""
    modes = _data()["modes"]
    names = [name for name in sorted(modes) if name.partition("-")[0] == mode] or sorted(modes)
    found = {name: modes[name].get(str(services), {}) for name in names}
    return ", ".join(f"{name} {_range(at[what])}" for name, at in found.items() if what in at)


def _range(ends: list[float]) -> str:
    least, most = ends
    return f"{least:,g}" if least == most else f"{least:,g}-{most:,g}"


def figures(services: int, what: str) -> list[tuple[str, float, str]]:
    """Its modes, the middle of each one's runs, and their range in words."""
    found = []
    for mode, sizes in sorted(_data()["modes"].items()):
        ends = sizes.get(str(services), {}).get(what)
        if ends:
            found.append((mode, sum(ends) / 2, _range(ends)))
    return found
