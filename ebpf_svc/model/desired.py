"""What this node's dataplane must do: the one value every backend receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.model.service import ServiceName, ServicePortName
from ebpf_svc.model.snapshot import Problem


class FrontendKey(NamedTuple):
    """What a client connects to."""

    address: str
    port: int
    protocol: Protocol

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}/{self.protocol.value}"


class FrontendKind(IntEnum):
    """Which field of the Service a frontend comes from."""

    CLUSTER_IP = 0
    NODE_PORT = 1
    EXTERNAL_IP = 2
    LOAD_BALANCER = 3


@dataclass(frozen=True, slots=True)
class Frontend:
    """An address of a service port, with kube-proxy's traffic matrix (P1-P10) solved for it.

    For each class of clients two questions are answered: which list of backends (`local_for`: the
    Local list, else the
    Cluster list) and whether the source is masqueraded (`masquerade_for`).
    """

    key: FrontendKey
    kind: FrontendKind
    local_for: Sources = Sources.NONE
    masquerade_for: Sources = Sources.NONE
    source_ranges: tuple[str, ...] | None = None
    """Prefixes that may connect (P10), the VIP's self-allow included; None = no filter. Sources
    outside are dropped.
    """


@dataclass(frozen=True, slots=True)
class Backend:
    """An endpoint that holds or may get flows of one service port.

    In neither list it is draining: it gets no new flow, but existing UDP flows stay (C5); an
    endpoint that stops
    serving leaves the plan.
    """

    address: str
    port: int
    in_cluster: bool = True
    """Member of the Cluster list (T2)."""
    in_local: bool = False
    """Member of the Local list (T3)."""


class PlanKey(NamedTuple):
    """One service port in one family (M1, M2)."""

    port_name: ServicePortName
    family: Family

    def __str__(self) -> str:
        return f"{self.port_name}/{self.port_name.protocol.value}/{self.family.label}"


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One service port of one family, ready for a backend to write. Compared by identity first."""

    key: PlanKey
    frontends: tuple[Frontend, ...]
    """Sorted by key; never empty."""
    backends: tuple[Backend, ...]
    """Sorted by (address, port)."""
    has_endpoints: bool
    """Some endpoint anywhere is usable (T6): with none, every frontend refuses (P2); else an empty
    list drops (P3, P4).
    """
    affinity_s: int = 0


class HealthCheck(NamedTuple):
    """A healthCheckNodePort to serve in one family (rules H1-H8)."""

    service: ServiceName
    family: Family
    port: int
    addresses: tuple[str, ...]
    """Where it listens (H1): the wildcard where nothing restricts node ports, else each selected
    address of this node; sorted.
    """
    local_endpoint_count: int
    """Distinct local endpoint addresses of the family that are Ready (H6)."""


@dataclass(frozen=True, slots=True)
class FrontendView:
    """A frontend as a kernel holds it, without the names the kernel does not know."""

    frontend: Frontend
    backends: tuple[Backend, ...]
    has_endpoints: bool
    affinity_s: int


@dataclass(frozen=True, slots=True)
class DesiredState:
    """All of this node's service ports. Plans that did not change keep their identity from state to
    state.
    """

    plans: Mapping[PlanKey, ServicePlan] = field(default_factory=dict)
    health_checks: tuple[HealthCheck, ...] = ()
    """Sorted."""
    problems: tuple[Problem, ...] = ()
    """Conflicts between services (a frontend claimed twice), each named; the claim that lost is not
    in `plans`.
    """
    revision: int = 0
    service_cidrs: tuple[str, ...] = ()
    """Prefixes cluster IPs come from, where the API says so (W4)."""

    def view(self) -> dict[FrontendKey, FrontendView]:
        """What `Dataplane.read()` must return once this state is applied."""
        return {
            frontend.key: FrontendView(frontend, plan.backends, plan.has_endpoints, plan.affinity_s)
            for plan in self.plans.values()
            for frontend in plan.frontends
        }
