"""Delete UDP flows that still go to endpoints that are no more (C1-C10, Q1).

Netfilter translates a flow by its conntrack entry as long as datagrams come, whatever the rules say
by then. After each successful write that touched UDP endpoints the entries of our frontends are
compared with the endpoints that serve. TCP is left alone: its connections end by themselves (C4).

Two things are stricter than in kube-proxy. A node port counts on the node's own addresses only, so
flows of host processes to the same port elsewhere stay (C8). And flows of services that lost their
last endpoint or were deleted go too, as in Kubernetes 1.37 (Q1 instead of C6).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ebpf_svc.dataplane.base import Reconciled
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import conntrack_table
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import DesiredState, PlanKey, ServicePlan
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Family, Protocol

End = tuple[str, int]
"""Address and port."""

log = get_logger(__name__)


class StaleFlows:
    """Remembers what was served, so that only changes cost a look at the table."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = tuple(families)
        self._before: Mapping[PlanKey, ServicePlan] = {}

    def reconcile(self, desired: DesiredState) -> tuple[Reconciled, ...]:
        """Delete what went stale since the last call; to be called once `desired` is written (C2).

        The first call looks at everything: flows may have gone stale while no agent ran. A table
        that cannot be read is logged, and looked at again with the next change.
        """
        before, after = self._before, desired.plans
        touched = {
            key.family
            for key in differences(before, after)
            if key.port_name.protocol is Protocol.UDP
            and _ends(before.get(key)) != _ends(after.get(key))
        }
        done: list[Reconciled] = []
        for family in self._families:
            if family not in touched:
                continue
            begun = time.monotonic()
            served = served_by(after, family)
            for frontend in served_by(before, family):
                served.setdefault(frontend, frozenset())
            try:
                count = _delete_stale(family, served)
            except DataplaneError as error:
                log.warning("conntrack.unread", family=family.label, error=str(error))
                return tuple(done)
            done.append(Reconciled(family, count, time.monotonic() - begun))
        self._before = after
        return tuple(done)


def served_by(plans: Mapping[PlanKey, ServicePlan], family: Family) -> dict[End, frozenset[End]]:
    """UDP frontends of a family -> the endpoints that serve them, draining ones included (C5)."""
    return {
        frontend.key[:2]: _serving(plan)
        for key, plan in plans.items()
        if key.family is family and key.port_name.protocol is Protocol.UDP
        for frontend in plan.frontends
    }


def _ends(plan: ServicePlan | None) -> tuple[frozenset[End], frozenset[End]]:
    """All that a plan's share of the comparison depends on."""
    frontends = () if plan is None else plan.frontends
    return frozenset(frontend.key[:2] for frontend in frontends), _serving(plan)


def _serving(plan: ServicePlan | None) -> frozenset[End]:
    if plan is None:
        return frozenset()
    return frozenset((backend.address, backend.port) for backend in plan.backends)


def _delete_stale(family: Family, served: Mapping[End, frozenset[End]]) -> int:
    """Delete flows to a frontend whose answers come from none of its endpoints (C7)."""

    def is_stale(destination: End, answers_from: End) -> bool:
        serving = served.get(destination)
        return serving is not None and answers_from not in serving

    doomed = conntrack_table.entries(family, Protocol.UDP, is_stale)
    return conntrack_table.delete(family, doomed)
