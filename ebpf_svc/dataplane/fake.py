"""A dataplane in memory, for tests and for trying manifests without a kernel.

It obeys the law of `base.Dataplane` to the letter, counts what it writes, and can be told to fail
or have its state changed behind its back. It must never touch the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ebpf_svc.dataplane.base import ApplyReport, Check, Support
from ebpf_svc.errors import ApplyError, DataplaneError, UnsupportedHost
from ebpf_svc.model.desired import DesiredState, FrontendKey, FrontendView, PlanKey, ServicePlan
from ebpf_svc.model.identity import differences


class Operation(NamedTuple):
    """One line of the journal."""

    verb: str
    """open, put, delete, retire, close or cleanup."""
    key: FrontendKey | None = None


class FakeDataplane:
    """Holds frontends in a dictionary that stands for the kernel.

    Args:
        kernel: what an earlier run left behind; hand the same dictionary to the next instance and
            it is a restart.
        checks: what `check` reports about the host.
    """

    name = "fake"

    def __init__(
        self,
        kernel: dict[FrontendKey, FrontendView] | None = None,
        *,
        checks: Iterable[Check] = (),
    ) -> None:
        self.kernel: dict[FrontendKey, FrontendView] = {} if kernel is None else kernel
        """What a real backend keeps in maps or rules. Change it to provoke drift."""
        self.journal: list[Operation] = []
        self.applies = 0
        """How often `apply` was called."""
        self.writes = 0
        """Entries put or deleted so far, over all applies."""
        self._support = Support(self.name, tuple(checks))
        self._failing: dict[PlanKey, int] = {}
        self._applied: dict[PlanKey, ServicePlan] = {}
        """What was written last."""
        self._clean: dict[PlanKey, ServicePlan] = {}
        """Of these, plans no other has taken a frontend from since: they can be skipped."""
        self._owner: dict[FrontendKey, PlanKey] = {}
        self._open = self._adopting = False

    # -- the seam ----------------------------------------------------------------------------------

    def check(self) -> Support:
        return self._support

    def open(self) -> None:
        if not self._support.ok:
            raise UnsupportedHost(self._support.missing)
        self._open = self._adopting = True
        self._applied, self._clean, self._owner = {}, {}, {}
        self.journal.append(Operation("open"))

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        if not self._open:
            raise DataplaneError("apply before open")
        self.applies += 1
        before = self.writes
        repaired = self._repair() if resync else ()
        failed: list[ApplyError] = []
        work = self._work(desired, failed)
        counts = {key: self._put(key, plan) for key, plan in work.items() if plan is not None}
        # Deletes come last: a frontend that moves between service ports is never missing.
        for key, plan in work.items():
            counts[key] = counts.get(key, 0) + self._retire(key, plan)
        if self._adopting:
            wanted = desired.view()
            for frontend_key in [key for key in self.kernel if key not in wanted]:
                self._delete(frontend_key)
            self._adopting = bool(failed)
        return ApplyReport(
            writes=self.writes - before,
            changed=sum(map(bool, counts.values())),
            failed=tuple(failed),
            repaired=repaired,
            details={"frontends": self.writes - before},
        )

    def read(self) -> dict[FrontendKey, FrontendView]:
        return dict(self.kernel)

    def view(self, desired: DesiredState) -> dict[FrontendKey, FrontendView]:
        return desired.view()

    def retire(self) -> bool:
        self.journal.append(Operation("retire"))
        return True

    def close(self) -> None:
        self._open = False
        self.journal.append(Operation("close"))

    def cleanup(self) -> None:
        self._open = False
        self.kernel.clear()
        self.journal.append(Operation("cleanup"))

    # -- for tests ---------------------------------------------------------------------------------

    def fail(self, key: PlanKey, *, times: int = -1) -> None:
        """Make the next `times` attempts to write this service port fail; -1 = until `heal`."""
        self._failing[key] = times

    def heal(self, key: PlanKey) -> None:
        """Let this service port be written again."""
        self._failing.pop(key, None)

    def lose(self, key: FrontendKey) -> None:
        """Remove a frontend behind the agent's back."""
        del self.kernel[key]

    def plant(self, key: FrontendKey, view: FrontendView) -> None:
        """Put something foreign, or wrong, where the agent writes."""
        self.kernel[key] = view

    # -- writing -----------------------------------------------------------------------------------

    def _work(
        self, desired: DesiredState, failed: list[ApplyError]
    ) -> dict[PlanKey, ServicePlan | None]:
        """Service ports to write (None: to delete); those told to fail go to `failed`."""
        plans = desired.plans
        work: dict[PlanKey, ServicePlan | None] = {
            key: plans.get(key) for key in differences(self._clean, plans)
        }
        if len(self._applied) != len(self._clean):
            work.update((key, None) for key in self._applied if key not in plans)
        for key in list(work):
            left = self._failing.get(key, 0)
            if left:
                self._failing[key] = left - 1
                failed.append(ApplyError(str(key), "told to fail"))
                del work[key]
        return work

    def _put(self, key: PlanKey, plan: ServicePlan) -> int:
        """Write the frontends of a plan that are not there yet; returns how many."""
        before = self.writes
        self._clean[key] = plan
        for frontend_key, view in _views(plan).items():
            owner = self._owner.get(frontend_key)
            if owner is not None and owner != key:
                # Should that plan come back as it was, it has to be written again.
                self._clean.pop(owner, None)
            self._owner[frontend_key] = key
            if self.kernel.get(frontend_key) != view:
                self.kernel[frontend_key] = view
                self._count("put", frontend_key)
        return self.writes - before

    def _retire(self, key: PlanKey, plan: ServicePlan | None) -> int:
        """Delete what a service port had and has no longer; returns how many entries."""
        before = self.writes
        last = self._applied.pop(key, None)
        wanted = set() if plan is None else {frontend.key for frontend in plan.frontends}
        for frontend in last.frontends if last is not None else ():
            if frontend.key not in wanted and self._owner.get(frontend.key) == key:
                del self._owner[frontend.key]
                self._delete(frontend.key)
        if plan is None:
            self._clean.pop(key, None)
        else:
            self._applied[key] = plan
        return self.writes - before

    def _repair(self) -> tuple[str, ...]:
        """Put back what the last apply wrote and remove the rest."""
        expected = {
            frontend_key: view
            for key, plan in self._applied.items()
            for frontend_key, view in _views(plan).items()
            if self._owner.get(frontend_key) == key
        }
        repaired = []
        for frontend_key, view in expected.items():
            held = self.kernel.get(frontend_key)
            if held != view:
                repaired.append(f"{frontend_key} was {'missing' if held is None else 'changed'}")
                self.kernel[frontend_key] = view
                self._count("put", frontend_key)
        for frontend_key in [key for key in self.kernel if key not in expected]:
            if not self._adopting:
                repaired.append(f"{frontend_key} was foreign")
                self._delete(frontend_key)
        return tuple(repaired)

    def _delete(self, key: FrontendKey) -> None:
        if self.kernel.pop(key, None) is not None:
            self._count("delete", key)

    def _count(self, verb: str, key: FrontendKey) -> None:
        self.writes += 1
        self.journal.append(Operation(verb, key))


def _views(plan: ServicePlan) -> dict[FrontendKey, FrontendView]:
    return {
        frontend.key: FrontendView(frontend, plan.backends, plan.has_endpoints, plan.affinity_s)
        for frontend in plan.frontends
    }
