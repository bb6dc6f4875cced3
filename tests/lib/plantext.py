"""Plans as short text: one cell of the traffic matrix, a whole state for golden files."""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_svc.model.desired import Backend, DesiredState, Frontend, FrontendKind, ServicePlan
from ebpf_svc.model.net import Sources

_KINDS = {
    FrontendKind.CLUSTER_IP: "ClusterIP",
    FrontendKind.NODE_PORT: "NodePort",
    FrontendKind.EXTERNAL_IP: "ExternalIP",
    FrontendKind.LOAD_BALANCER: "LoadBalancer",
}


def cell(frontend: Frontend, source: Sources) -> str:
    """How a frontend treats a class of clients: list (C, L) and masquerade (m), as in the rules."""
    chosen = "L" if source & frontend.local_for else "C"
    return f"{chosen} m" if source & frontend.masquerade_for else chosen


def state_text(state: DesiredState) -> str:
    """Print a whole state, sorted, without what tests do not pin (revision, identity)."""
    lines: list[str] = []
    for key in sorted(state.plans):
        lines += [*_plan_lines(state.plans[key]), ""]
    for check in state.health_checks:
        lines += [
            f"health check {check.service} {check.family.label} at {' '.join(check.addresses)} "
            f"port {check.port}: {check.local_endpoint_count} local endpoints",
            "",
        ]
    lines += [f"problem {problem}" for problem in state.problems]
    return "\n".join(lines).rstrip() + "\n"


def _plan_lines(plan: ServicePlan) -> Iterable[str]:
    yield str(plan.key)
    if plan.affinity_s:
        yield f"  affinity {plan.affinity_s} s"
    keys = [str(frontend.key) for frontend in plan.frontends]
    width = max(map(len, keys))
    for frontend, key in zip(plan.frontends, keys, strict=True):
        cells = "".join(
            f"  {name} {cell(frontend, source):3}"
            for name, source in (
                ("pod", Sources.POD),
                ("node", Sources.NODE),
                ("external", Sources.EXTERNAL),
            )
        )
        yield f"  {_KINDS[frontend.kind]:12}  {key:{width}}{cells}".rstrip()
        if frontend.source_ranges is not None:
            yield f"    only from {' '.join(frontend.source_ranges)}"
    for backend in plan.backends:
        yield f"    {backend.address} {backend.port}  {_role(backend)}"
    if not any(backend.in_cluster or backend.in_local for backend in plan.backends):
        yield f"    {'no local endpoint: drop' if plan.has_endpoints else 'no endpoint: refuse'}"


def _role(backend: Backend) -> str:
    lists = [
        name
        for name, member in (("cluster", backend.in_cluster), ("local", backend.in_local))
        if member
    ]
    return " ".join(lists) or "draining"
