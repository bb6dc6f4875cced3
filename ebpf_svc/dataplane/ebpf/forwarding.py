"""Keep the maps as a DesiredState wants them; nothing here knows of programs or devices.

Not thread-safe: the dataplane holds a lock around every call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.dataplane.ebpf import readback
from ebpf_svc.dataplane.ebpf.codec import Codec
from ebpf_svc.dataplane.ebpf.entries import MaglevOptions
from ebpf_svc.dataplane.ebpf.ids import GRACE_S, RangePool
from ebpf_svc.dataplane.ebpf.maglev import TableCache
from ebpf_svc.dataplane.ebpf.maglev_native import NativeFill
from ebpf_svc.dataplane.ebpf.render import Renderer
from ebpf_svc.dataplane.ebpf.state import FamilyState
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.dataplane.ebpf.verify import FamilyVerifier
from ebpf_svc.dataplane.ebpf.write import Writer
from ebpf_svc.errors import ApplyError, DataplaneError
from ebpf_svc.model.desired import (
    DesiredState,
    FrontendKey,
    FrontendView,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Family

_CHUNK = 1024
"""Plans written together: few enough that what is rendered and not yet written stays small."""


@dataclass(frozen=True, slots=True)
class _FamilyParts:
    state: FamilyState
    renderer: Renderer
    writer: Writer
    verifier: FamilyVerifier


class Forwarding:
    """The maps of every family, and what they hold."""

    def __init__(self, tables: Tables, settings: EbpfSettings) -> None:
        """Bind to open maps; raises LayoutMismatch when they are not what Python packs."""
        self._tables = tables
        self._slots = RangePool("slots", tables.slots.max_entries, grace_s=GRACE_S)
        options = MaglevOptions(
            settings.maglev_slots_per_backend,
            settings.maglev_seed,
            TableCache(fill=NativeFill(settings.cache_dir)),
        )
        self._families: dict[Family, _FamilyParts] = {}
        for family, of_family in tables.family.items():
            state = FamilyState(
                family, codec=Codec(family, of_family), tables=of_family, slots=self._slots
            )
            renderer = Renderer(state, tables.slots, use_maglev=settings.maglev, options=options)
            self._families[family] = _FamilyParts(
                state,
                renderer,
                Writer(state, tables.slots),
                FamilyVerifier(state, renderer, tables.slots),
            )
        self._plans: Mapping[PlanKey, ServicePlan] = {}
        self._incomplete: set[PlanKey] = set()
        self._is_damaged = False

    @property
    def states(self) -> Mapping[Family, FamilyState]:
        """The actual state of each family."""
        return {family: parts.state for family, parts in self._families.items()}

    def adopt(self) -> None:
        """Take over what the pinned maps hold; call it once, before the first apply."""
        for parts in self._families.values():
            parts.state.adopt()
            self._is_damaged |= bool(parts.state.damage)

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Write what differs from the state applied last.

        A plan that cannot be written is in the report, and is tried again with the next apply.

        Args:
            desired: the whole state.
            resync: first read all maps and put right what others changed.

        Raises:
            OSError: a map cannot be read or written at all.
        """
        before = self._tables.writes_by_table()
        self._recycle()
        repaired = self._verify() if resync else []
        changed, failed = 0, []
        for family, plans in self._changed(desired.plans).items():
            done, errors = self._put(self._families[family], plans)
            changed += done
            failed += errors
        self._plans = desired.plans
        for parts in self._families.values():
            for service, orphan in parts.state.orphans.items():
                if not orphan.is_wound_up:
                    parts.writer.wind_up(service, orphan)
                    changed += 1
        if self._is_damaged:  # now that every service has its plan again
            repaired += self._verify()
            self._is_damaged = False
        details = {
            name: writes - before.get(name, 0)
            for name, writes in self._tables.writes_by_table().items()
            if writes != before.get(name, 0)
        }
        return ApplyReport(
            writes=sum(details.values()),
            changed=changed,
            failed=tuple(failed),
            repaired=tuple(repaired),
            details=details,
        )

    def _verify(self) -> list[str]:
        return [
            sentence for parts in self._families.values() for sentence in parts.verifier.verify()
        ]

    def _put(
        self, parts: _FamilyParts, plans: Sequence[ServicePlan]
    ) -> tuple[int, list[ApplyError]]:
        """Write plans of one family; how many changed anything, and those that failed."""
        changed, failed, dropping = 0, [], []
        for start in range(0, len(plans), _CHUNK):
            changes = []
            for plan in plans[start : start + _CHUNK]:
                try:
                    changes.append(parts.renderer.render(plan))
                except DataplaneError as error:
                    failed.append(_apply_error(plan, error))
            parts.writer.put(changes)
            parts.renderer.written()
            changed += sum(change.writes_anything for change in changes)
            failed += [_apply_error(each.plan, each.error) for each in changes if each.error]
            dropping += [change for change in changes if change.drops_anything]
            self._incomplete.difference_update(change.plan.key for change in changes)
        self._incomplete.update(key for key, _ in failed)
        parts.writer.drop(dropping)
        return changed, [error for _, error in failed]

    def read(self) -> dict[FrontendKey, FrontendView]:
        """What the kernel holds, from the kernel alone."""
        views: dict[FrontendKey, FrontendView] = {}
        for parts in self._families.values():
            views |= readback.read_family(parts.state.codec, parts.state.tables)
        return views

    def _recycle(self) -> None:
        now_s = time.monotonic()
        self._slots.recycle(now_s)
        for parts in self._families.values():
            parts.state.recycle(now_s)

    def _changed(self, plans: Mapping[PlanKey, ServicePlan]) -> dict[Family, list[ServicePlan]]:
        """The plans that are not, by identity, what is applied; abandons those that are gone."""
        found = {key: plans[key] for key in self._incomplete & plans.keys()}
        for key in differences(self._plans, plans):
            plan = plans.get(key)
            if plan is None:
                self._abandon(key)
            else:
                found[key] = plan
        by_family: dict[Family, list[ServicePlan]] = {}
        for plan in found.values():
            by_family.setdefault(plan.key.family, []).append(plan)
        return by_family

    def _abandon(self, key: PlanKey) -> None:
        self._incomplete.discard(key)
        state = self._families[key.family].state
        if key in state.records:  # it may never have been written
            state.abandon(key)


def _apply_error(plan: ServicePlan, cause: Exception) -> tuple[PlanKey, ApplyError]:
    error = ApplyError(str(plan.key), str(cause))
    error.__cause__ = cause
    return plan.key, error
