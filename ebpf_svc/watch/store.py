"""What is known about the outside world, and the one place that builds Snapshots of it.

Sources put values in, from any thread; the sync loop takes Snapshots out. A value that equals the
one before it is dropped for the old one, so that whoever compares by identity sees what changed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.service import Service, ServiceName
from ebpf_svc.model.snapshot import NodeFacts, Problem, Snapshot

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Store:
    """The current state of the outside world; thread-safe."""

    def __init__(self, node_name: str) -> None:
        self.node_name = node_name
        self.changed = threading.Event()
        """Set after every change; whoever waits clears it before taking the snapshot."""
        self._lock = threading.Lock()
        self._current = Snapshot(NodeFacts(node_name))
        self._has_services = self._has_slices = False

    def snapshot(self) -> Snapshot | None:
        """The latest state; None until services and slices have been given once (M4)."""
        with self._lock:
            return self._current if self._has_services and self._has_slices else None

    def replace(
        self,
        *,
        services: Mapping[ServiceName, Service] | None = None,
        slices: Mapping[ServiceName, tuple[EndpointSlice, ...]] | None = None,
        problems: tuple[Problem, ...] | None = None,
        node: NodeFacts | None = None,
    ) -> None:
        """Replace whole collections in one step; what is not given stays.

        Args:
            services: all of them.
            slices: all of them, by the Service they belong to; each tuple in a stable order.
            problems: all of them.
            node: this node as the API describes it; its `local_addresses` are ignored.
        """
        with self._lock:
            old = self._current
            in_sync = self._has_services and self._has_slices
            self._has_services |= services is not None
            self._has_slices |= slices is not None
            new = replace(
                old,
                node=old.node if node is None else _node(node, old.node.local_addresses, old.node),
                services=old.services if services is None else _merge(old.services, services),
                slices=old.slices if slices is None else _merge_slices(old.slices, slices),
                problems=old.problems if problems in (None, old.problems) else problems or (),
            )
            self._advance(new, first=not in_sync and self._has_services and self._has_slices)

    def set_local_addresses(self, addresses: tuple[str, ...]) -> None:
        """Replace the addresses of this node's interfaces.

        Called once before `replace`, it spares node ports a moment without any address.
        """
        with self._lock:
            old = self._current
            node = _node(old.node, tuple(sorted(addresses)), old.node)
            self._advance(replace(old, node=node), first=False)

    def _advance(self, new: Snapshot, *, first: bool) -> None:
        old = self._current
        if (
            first
            or new.node is not old.node
            or new.services is not old.services
            or new.slices is not old.slices
            or new.problems is not old.problems
        ):
            self._current = replace(new, revision=old.revision + 1)
            if self._has_services and self._has_slices:
                self.changed.set()


def _node(node: NodeFacts, local_addresses: tuple[str, ...], old: NodeFacts) -> NodeFacts:
    new = replace(node, local_addresses=local_addresses)
    return old if new == old else new


def _merge(old: Mapping[_Key, _Value], new: Mapping[_Key, _Value]) -> Mapping[_Key, _Value]:
    """The new mapping with old values where they are equal; the old mapping if nothing changed."""
    merged = {}
    same = len(old) == len(new)
    for key, value in new.items():
        before = old.get(key)
        if before is not value:
            if before == value and before is not None:
                value = before  # noqa: PLW2901 # this is the point
            else:
                same = False
        merged[key] = value
    return old if same else merged


def _merge_slices(
    old: Mapping[ServiceName, tuple[EndpointSlice, ...]],
    new: Mapping[ServiceName, tuple[EndpointSlice, ...]],
) -> Mapping[ServiceName, tuple[EndpointSlice, ...]]:
    """As `_merge`; slices that did not change stay the same also where their neighbours did."""
    merged = _merge(old, new)
    if merged is old:
        return old
    result = dict(merged)
    for name, slices in merged.items():
        before = old.get(name)
        if before is not None and before is not slices:
            known = {each.name: each for each in before}
            kept = (
                was if (was := known.get(each.name)) is not None and was == each else each
                for each in slices
            )
            result[name] = tuple(kept)
    return result
