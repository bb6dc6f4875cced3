"""What the tour found: values that the screen draws and `--json` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ebpf_svc.model.net import Family, Protocol


class Asker(StrEnum):
    """From where a frontend is asked."""

    POD = "pod"
    HOST = "host"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True)
class Probe:
    """One frontend asked from one place, by one protocol in one family, several times."""

    frontend: str
    """What the user calls it, e.g. `NodePort node1`."""
    address: str
    port: int
    protocol: Protocol
    family: Family
    asker: Asker
    requests: int
    servers: Counter[str]
    """Answers by pod."""
    failures: tuple[str, ...]
    """Why requests failed, each reason once; empty = all were answered, by the address asked."""
    slowest_ms: float

    @property
    def held(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {
            "frontend": self.frontend,
            "address": self.address,
            "port": self.port,
            "protocol": self.protocol.value,
            "family": self.family.label,
            "asked_from": self.asker.value,
            "requests": self.requests,
            "servers": dict(sorted(self.servers.items())),
            "failures": list(self.failures),
            "slowest_ms": self.slowest_ms,
            "held": self.held,
        }


@dataclass(frozen=True, slots=True)
class Step:
    """One promise and how it went."""

    name: str
    held: bool
    detail: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "held": self.held, "detail": self.detail, **self.numbers}


@dataclass(slots=True)
class Report:
    """Everything found so far."""

    probes: list[Probe] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    finished: bool = False
    """The tour came to its end: nothing was left out."""
    topology: str = ""

    @property
    def held(self) -> bool:
        parts: Iterable[Probe | Step] = (*self.probes, *self.steps)
        return self.finished and all(part.held for part in parts)

    def as_dict(self) -> dict[str, Any]:
        return {
            "held": self.held,
            "frontends": [probe.as_dict() for probe in self.probes],
            "steps": [step.as_dict() for step in self.steps],
            "topology": self.topology.splitlines(),
        }
