"""Free what was kept only for flows, once no flow needs it.

A backend that left stays as a tombstone, linked where replies find it, and a TCP frontend that is
gone drains. A sweep looks at the flows while nothing is locked, and then, with the lock held for
short, frees what no flow of those it saw refers to. What became a tombstone only since the last
sweep waits for the next: a program may be about to store a flow to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from ebpf_svc.dataplane.ebpf.flows import FlowReader, is_alive
from ebpf_svc.dataplane.ebpf.state import FamilyState
from ebpf_svc.model.net import Protocol

_UDP = Protocol.UDP.number
_SLICE = 512
"""Tombstones freed before the lock is let go, for an apply that waits."""


@dataclass(slots=True)
class _Found:
    """What a look at the flows told."""

    live_ids: set[int] = field(default_factory=set)
    live_frontends: set[bytes] = field(default_factory=set)
    stale: dict[int, list[bytes]] = field(default_factory=dict)
    """Tombstone -> keys of flows to it that are over."""


class FamilySweep:
    """Sweeps one family; called by one thread at a time."""

    def __init__(self, state: FamilyState, lock: AbstractContextManager[object]) -> None:
        """Bind to a state that only changes with the lock held."""
        self._state, self._tables, self._lock = state, state.tables, lock
        self._reader = FlowReader(state.codec, state.tables)

    def sweep(self, now_s: float) -> int:
        """Free what no flow refers to.

        Args:
            now_s: a monotonic clock.

        Returns:
            how many tombstones, draining frontends and services were freed.
        """
        state = self._state
        with self._lock:
            self._drop_range_sets(now_s)
            dead = {
                backend: service
                for service, backends in state.dead.items()
                for backend in backends
                if backend not in state.fresh_dead
            }
            draining = state.draining - state.fresh_draining
            services = {state.service_of(state.frontends[key]) for key in draining}
            state.fresh_dead.clear()
            state.fresh_draining.clear()
        found = _Found()
        if dead or draining:
            found = self._look(dead.keys(), services)
        idle = [backend for backend in dead if backend not in found.live_ids]
        freed = 0
        for start in range(0, len(idle), _SLICE):
            with self._lock:
                by_service: dict[int, list[int]] = {}
                for backend in idle[start : start + _SLICE]:
                    by_service.setdefault(dead[backend], []).append(backend)
                for service, backends in by_service.items():
                    freed += self._free_backends(service, backends, found)
        with self._lock:
            freed += self._free_frontends(draining - found.live_frontends)
            freed += self._free_services()
        return freed

    def _look(self, dead: Iterable[int], services: set[int]) -> _Found:
        wanted, found = frozenset(dead), _Found()
        for chunk in self._reader.chunks():
            ids, of_services = chunk.backend_ids(), chunk.services()
            if wanted.isdisjoint(ids) and services.isdisjoint(of_services):
                continue
            for i, (backend, service) in enumerate(zip(ids, of_services, strict=True)):
                if backend not in wanted and service not in services:
                    continue
                flow = chunk.flow(i)
                # UDP moves on from a backend that left, so it never needs a tombstone (C5).
                if is_alive(flow) and (flow.protocol != _UDP or backend not in wanted):
                    found.live_ids.add(backend)
                    found.live_frontends.add(flow.frontend)
                elif backend in wanted:
                    found.stale.setdefault(backend, []).append(chunk.key(i))
        return found

    def _free_backends(self, service: int, backends: Sequence[int], found: _Found) -> int:
        state = self._state
        # Some may serve again by now, or have done so and died again.
        still = set(state.dead.get(service, ())) - state.fresh_dead
        done = [backend for backend in backends if backend in still]
        self._tables.flows.delete([key for each in done for key in found.stale.get(each, ())])
        state.exhume(service, done)
        return len(done)

    def _free_frontends(self, keys: Iterable[bytes]) -> int:
        state = self._state
        still = [key for key in keys if key in state.draining and key not in state.fresh_draining]
        self._tables.frontends.delete(still)
        for key in still:
            state.remove_frontend(key)
        return len(still)

    def _free_services(self) -> int:
        """Release the ids of services without a plan, tombstones and frontends."""
        state = self._state
        needed = {state.service_of(state.frontends[key]) for key in state.draining}
        done = [
            service
            for service, orphan in state.orphans.items()
            if orphan.is_wound_up and service not in state.dead and service not in needed
        ]
        for service in done:
            del state.orphans[service]
            state.services.release(service)
        return len(done)

    def _drop_range_sets(self, now_s: float) -> None:
        state = self._state
        for set_id in state.range_sets.unused(now_s):
            prefixes = state.range_sets.content[set_id]
            self._tables.source_ranges.delete(
                [state.codec.range_key(set_id, prefix) for prefix in prefixes]
            )
            state.range_sets.forget(set_id)
