"""Builders of what a dataplane is given, for tests that need no planner."""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_svc.model.desired import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Protocol, Sources, family_of
from ebpf_svc.model.service import ServicePortName


def make_frontend(
    address: str = "10.96.0.1",
    port: int = 80,
    protocol: str = "TCP",
    *,
    kind: FrontendKind = FrontendKind.CLUSTER_IP,
    local_for: Sources = Sources.NONE,
    masquerade_for: Sources = Sources.NONE,
    source_ranges: Iterable[str] | None = None,
) -> Frontend:
    """A cluster IP, unless given."""
    return Frontend(
        FrontendKey(address, port, Protocol(protocol)),
        kind,
        local_for,
        masquerade_for,
        None if source_ranges is None else tuple(sorted(source_ranges)),
    )


def make_backend(
    address: str, port: int = 8080, *, in_cluster: bool = True, in_local: bool = False
) -> Backend:
    """An endpoint in the Cluster list, unless told otherwise."""
    return Backend(address, port, in_cluster, in_local)


def make_plan(
    name: str = "web",
    *frontends: Frontend,
    backends: Iterable[str | Backend] = ("10.1.0.1", "10.1.0.2"),
    affinity_s: int = 0,
    has_endpoints: bool | None = None,
) -> ServicePlan:
    """The plan of service port `default/NAME`, one cluster IP and two endpoints unless given."""
    frontends = frontends or (make_frontend(),)
    key = frontends[0].key
    made = sorted(
        (make_backend(each) if isinstance(each, str) else each for each in backends),
        key=lambda each: (each.address, each.port),
    )
    return ServicePlan(
        PlanKey(ServicePortName("default", name, "", key.protocol), family_of(key.address)),
        tuple(sorted(frontends, key=lambda each: each.key)),
        tuple(made),
        has_endpoints=bool(made) if has_endpoints is None else has_endpoints,
        affinity_s=affinity_s,
    )


def make_desired(*plans: ServicePlan) -> DesiredState:
    """A state of just these plans."""
    return DesiredState({plan.key: plan for plan in plans})
