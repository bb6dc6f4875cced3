"""Who gets a frontend that several service ports claim.

The claim of the smallest service port (namespace, name, port name) wins, whatever came first: every
node and every restart decides alike. The others are left without that frontend, each with a Problem
that names both, and get it when the winner goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from ebpf_svc.model.desired import FrontendKey, FrontendKind, PlanKey, ServicePlan
from ebpf_svc.model.snapshot import Problem

_FIELDS = {
    FrontendKind.CLUSTER_IP: "spec.clusterIPs",
    FrontendKind.NODE_PORT: "spec.ports[].nodePort",
    FrontendKind.EXTERNAL_IP: "spec.externalIPs",
    FrontendKind.LOAD_BALANCER: "status.loadBalancer.ingress",
}


class Claims:
    """Which service ports claim which frontends.

    Changes cost what they touch: a frontend with one claimant, the rule, is one dictionary entry.
    """

    def __init__(self) -> None:
        self._first: dict[FrontendKey, PlanKey] = {}
        """Every claimed frontend; of contested ones any claimant."""
        self._contested: dict[FrontendKey, set[PlanKey]] = {}
        """All claimants, where there are several."""

    def enter(self, plan: ServicePlan) -> Iterable[PlanKey]:
        """Add a plan's claims; returns the other plans that claim one of its frontends."""
        rivals: set[PlanKey] = set()
        for frontend in plan.frontends:
            other = self._first.setdefault(frontend.key, plan.key)
            if other is not plan.key and other != plan.key:
                claimants = self._contested.setdefault(frontend.key, {other})
                rivals |= claimants
                claimants.add(plan.key)
        return rivals

    def leave(self, plan: ServicePlan) -> Iterable[PlanKey]:
        """Take a plan's claims back; returns the other plans that claim one of its frontends."""
        rivals: set[PlanKey] = set()
        for frontend in plan.frontends:
            claimants = self._contested.get(frontend.key)
            if claimants is None:
                del self._first[frontend.key]
                continue
            claimants.remove(plan.key)
            rivals |= claimants
            self._first[frontend.key] = next(iter(claimants))
            if len(claimants) == 1:
                del self._contested[frontend.key]
        return rivals

    def settle(self, plan: ServicePlan) -> ServicePlan | None:
        """Leave out the frontends a plan loses: the plan itself when none, None when all."""
        if not self._contested:
            return plan
        kept = tuple(
            frontend
            for frontend in plan.frontends
            if (claimants := self._contested.get(frontend.key)) is None
            or min(claimants) == plan.key
        )
        if len(kept) == len(plan.frontends):
            return plan
        return replace(plan, frontends=kept) if kept else None

    def problems(self, plans: Iterable[ServicePlan]) -> tuple[Problem, ...]:
        """Say what each of these plans loses to whom, sorted.

        Args:
            plans: whole plans, as entered; those without a contested frontend cost little.
        """
        lost: defaultdict[tuple[PlanKey, FrontendKind, PlanKey], list[str]] = defaultdict(list)
        for plan in plans:
            for frontend in plan.frontends:
                claimants = self._contested.get(frontend.key)
                if claimants is not None and (winner := min(claimants)) != plan.key:
                    lost[plan.key, frontend.kind, winner].append(str(frontend.key))
        return tuple(
            Problem(
                source="",
                object_ref=f"Service {loser.port_name.namespace}/{loser.port_name.name}",
                field=_FIELDS[kind],
                message=f"{', '.join(keys)}: claimed by {winner.port_name} too, which comes first "
                f"by name, so {loser.port_name} goes without",
            )
            for (loser, kind, winner), keys in sorted(lost.items())
        )

    @property
    def claimants(self) -> frozenset[PlanKey]:
        """Every plan with a contested frontend, winners included."""
        return frozenset().union(*self._contested.values())
