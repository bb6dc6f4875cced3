"""Everything known about the outside world at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.service import Service, ServiceName


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """This node, as the API and the kernel describe it."""

    name: str
    addresses: tuple[str, ...] = ()
    """InternalIPs, then ExternalIPs (N1); the first of each family is that family's node IP."""
    local_addresses: tuple[str, ...] = ()
    """Every address on an interface of the node, loopback included, sorted; frontends of NodePorts
    (P15, A1-A4).
    """
    zone: str = ""
    """`topology.kubernetes.io/zone` (N5); empty = none."""
    pod_cidrs: tuple[str, ...] = ()
    eligible: bool = True
    """Load balancers may send traffic here: the node is neither going away nor unknown (N6)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with an object that was skipped, for `show`, logs and Events."""

    source: str
    object_ref: str
    field: str
    message: str

    def __str__(self) -> str:
        return ": ".join(
            part for part in (self.source, self.object_ref, self.field, self.message) if part
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Services, slices and the node, immutable.

    Objects that did not change between two snapshots are the *same* objects (`is`), and so are the
    slice tuples: the
    planner skips by identity.
    """

    node: NodeFacts
    services: Mapping[ServiceName, Service] = field(default_factory=dict)
    slices: Mapping[ServiceName, tuple[EndpointSlice, ...]] = field(default_factory=dict)
    """Slices by the Service they belong to; may name Services that do not exist."""
    problems: tuple[Problem, ...] = ()
    service_cidrs: tuple[str, ...] = ()
    """Prefixes cluster IPs come from, sorted, where the API says so (W4); empty = not known."""
    revision: int = 0
    """Grows by one with every change of the store."""
    since_s: float = field(default=0.0, compare=False)
    """Monotonic time of the oldest change that the snapshot taken before lacks; 0 = not known."""
