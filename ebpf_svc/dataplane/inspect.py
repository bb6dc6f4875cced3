"""What a backend may show of itself besides its frontends; `show` prints it.

A backend offers these by having methods of these names; one that keeps no flows of its own (the
kernel's conntrack has them) leaves `flows` out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family


@dataclass(frozen=True, slots=True)
class FlowView:
    """One client's flow to a frontend."""

    client: str
    client_port: int
    frontend: FrontendKey
    backend: str
    backend_port: int
    state: str
    """In words: `established`, `closing` …; empty for protocols without one."""
    idle_s: int
    family: Family


@dataclass(frozen=True, slots=True)
class KernelPart:
    """One thing a backend has put into the kernel."""

    kind: str
    """`map`, `program`, `rule` …"""
    name: str
    place: str
    """Where it is pinned or attached."""
    detail: str
    """Size, filling, whatever a reader of the table wants beside the name."""


@runtime_checkable
class ShowsFlows(Protocol):
    """A backend that keeps flows itself."""

    def flows(self) -> Iterable[FlowView]:
        """Flows alive now, in any order; needs no `open()`."""


@runtime_checkable
class ShowsParts(Protocol):
    """A backend that can list what it has put into the kernel."""

    def parts(self) -> Iterable[KernelPart]:
        """Every map, program and rule of ours that is there; needs no `open()`."""
