"""What the API says about endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import ServiceName

NO_HINTS: frozenset[str] = frozenset()


class EndpointPort(NamedTuple):
    """One entry of `ports` of a slice; the name is what joins it to a service port (E3)."""

    name: str
    protocol: Protocol
    port: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of a slice, with the conditions' defaults already applied (E5)."""

    address: str
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node_name: str = ""
    """Empty = unknown, hence not local (E6)."""
    zone_hints: frozenset[str] = NO_HINTS
    node_hints: frozenset[str] = NO_HINTS


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """A slice of a Service's endpoints: every endpoint serves every port of the slice."""

    namespace: str
    name: str
    service_name: ServiceName
    family: Family
    ports: tuple[EndpointPort, ...]
    endpoints: tuple[Endpoint, ...]
    trigger_time_s: float = 0.0
    """`endpoints.kubernetes.io/last-change-trigger-time` (E10); 0 = not given."""
