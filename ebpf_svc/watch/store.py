"""What is known about the outside world, and the one place that builds Snapshots of it.

Sources put values in, from any thread; the sync loop takes Snapshots out. A value that equals the
one before it is dropped for the old one, so that whoever compares by identity sees what changed.

A change of one object costs microseconds: the collections are copied at the first change after a
Snapshot was taken, not with every change.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import TypeVar

from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.service import Service, ServiceName
from ebpf_svc.model.snapshot import NodeFacts, Problem, Snapshot

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_SERVICES, _SLICES, _NODE = "services", "slices", "node"

SliceName = tuple[str, str]
"""Namespace and name of an EndpointSlice."""

_slice_name = attrgetter("name")


class Store:
    """The current state of the outside world; thread-safe."""

    def __init__(self, node_name: str, *, primary_address: str = "") -> None:
        """Know nothing yet.

        Args:
            node_name: this node's, as its Node and endpoints spell it.
            primary_address: stands before the addresses of the Node object (N2).
        """
        self.node_name = node_name
        self._primary = (primary_address,) if primary_address else ()
        self.changed = threading.Event()
        """Set after every change; whoever waits clears it before taking the snapshot."""
        self._lock = threading.Lock()
        self._current = Snapshot(NodeFacts(node_name, self._primary))
        self._missing = {_SERVICES, _SLICES}
        """What must be given before the first snapshot."""
        self._private: dict[ServiceName, Service] | None = None
        """The services of `_current` while they may still be changed in place; None = shared."""
        self._private_slices: dict[ServiceName, tuple[EndpointSlice, ...]] | None = None
        self._owners: dict[SliceName, ServiceName] | None = None
        """Which Service each slice belongs to; None until asked for."""
        self._is_taken = False
        """Whoever applies has taken `_current`: the next change is one it lacks."""

    def snapshot(self) -> Snapshot | None:
        """The latest state; None until services and slices have been given once (M4)."""
        with self._lock:
            if self._missing:
                return None
            self._private = self._private_slices = None
            self._is_taken = True
            return self._current

    def node(self) -> NodeFacts:
        """What is known about this node, which may be before `snapshot` gives anything."""
        with self._lock:
            return self._current.node

    def await_node(self) -> None:
        """Give no snapshot before this node's addresses are known, or nobody waits for them any
        more (N3)."""
        with self._lock:
            self._missing.add(_NODE)

    def give_up_on_node(self) -> bool:
        """Go on without this node's addresses; returns whether they were still missing."""
        with self._lock:
            missing = _NODE in self._missing
            if self._arrived({_NODE}):
                self._advance(self._current)
            return missing

    def replace(
        self,
        *,
        services: Mapping[ServiceName, Service] | None = None,
        slices: Mapping[ServiceName, tuple[EndpointSlice, ...]] | None = None,
        problems: tuple[Problem, ...] | None = None,
        node: NodeFacts | None = None,
        service_cidrs: tuple[str, ...] | None = None,
    ) -> None:
        """Replace whole collections in one step; what is not given stays.

        Args:
            services: all of them.
            slices: all of them, by the Service they belong to; each tuple in a stable order.
            problems: all of them.
            node: this node as the API describes it; its `local_addresses` are ignored.
            service_cidrs: all of them, in a stable order.
        """
        with self._lock:
            old = self._current
            new = old
            if services is not None and (merged := _merge(old.services, services)) is not (
                old.services
            ):
                new, self._private = replace(new, services=merged), None
            if slices is not None and (by_service := _merge_slices(old.slices, slices)) is not (
                old.slices
            ):
                new = replace(new, slices=by_service)
                self._private_slices = self._owners = None
            if problems is not None and problems != old.problems:
                new = replace(new, problems=problems)
            if service_cidrs is not None and service_cidrs != old.service_cidrs:
                new = replace(new, service_cidrs=service_cidrs)
            has_addresses = node is not None and bool(node.addresses)
            if node is not None:
                others = (each for each in node.addresses if each not in self._primary)
                node = replace(node, addresses=(*self._primary, *others))
                node = _node(node, old.node.local_addresses, old.node)
                new = new if node is old.node else replace(new, node=node)
            given = {
                name
                for name, is_given in (
                    (_SERVICES, services is not None),
                    (_SLICES, slices is not None),
                    (_NODE, has_addresses),
                )
                if is_given
            }
            if self._arrived(given) or new is not old:
                self._advance(new)

    def put_service(self, service: Service) -> None:
        """Add a Service, or replace the one of its name."""
        with self._lock:
            if self._current.services.get(service.name) != service:
                self._own_services()[service.name] = service
                self._advance(self._current)

    def delete_service(self, name: ServiceName) -> None:
        """Forget a Service; unknown ones are none."""
        with self._lock:
            if name in self._current.services:
                del self._own_services()[name]
                self._advance(self._current)

    def put_slice(self, slice_: EndpointSlice) -> None:
        """Add a slice, or replace the one of its name, whichever Service that belonged to."""
        name, owner = (slice_.namespace, slice_.name), slice_.service_name
        with self._lock:
            owners = self._slice_owners()
            before = owners.get(name)
            if before is not None and before != owner:
                self._drop_slice(before, slice_.name)
            old = self._current.slices.get(owner, ())
            if slice_ in old:
                return
            new = [each for each in old if each.name != slice_.name]
            insort(new, slice_, key=_slice_name)
            self._own_slices()[owner] = tuple(new)
            owners[name] = owner
            self._advance(self._current)

    def delete_slice(self, namespace: str, name: str) -> None:
        """Forget a slice; unknown ones are none (M6)."""
        with self._lock:
            owner = self._slice_owners().pop((namespace, name), None)
            if owner is not None:
                self._drop_slice(owner, name)
                self._advance(self._current)

    def find_slice(self, namespace: str, name: str) -> EndpointSlice | None:
        """The slice of that name, whichever Service it belongs to."""
        with self._lock:
            owner = self._slice_owners().get((namespace, name))
            of_service = () if owner is None else self._current.slices[owner]
            return next((each for each in of_service if each.name == name), None)

    def find_service(self, name: ServiceName) -> Service | None:
        """The Service of that name."""
        with self._lock:
            return self._current.services.get(name)

    def set_local_addresses(self, addresses: tuple[str, ...]) -> None:
        """Replace the addresses of this node's interfaces.

        Called once before `replace`, it spares node ports a moment without any address.
        """
        with self._lock:
            old = self._current
            node = _node(old.node, tuple(sorted(addresses)), old.node)
            if node is not old.node:
                self._advance(replace(old, node=node))

    def _arrived(self, names: set[str]) -> bool:
        """Strike what was awaited; returns whether that was the last of it."""
        awaited = bool(self._missing)
        self._missing -= names
        # An empty cluster is news too.
        return awaited and not self._missing

    def _advance(self, new: Snapshot) -> None:
        is_first = self._is_taken or not self._current.revision
        since_s = time.monotonic() if is_first else self._current.since_s
        self._current = replace(new, revision=self._current.revision + 1, since_s=since_s)
        self._is_taken = False
        if not self._missing:
            self.changed.set()

    def _own_services(self) -> dict[ServiceName, Service]:
        """The current services, to be changed in place: nobody else has seen the mapping."""
        if self._private is None:
            self._private = dict(self._current.services)
            self._current = replace(self._current, services=self._private)
        return self._private

    def _own_slices(self) -> dict[ServiceName, tuple[EndpointSlice, ...]]:
        if self._private_slices is None:
            self._private_slices = dict(self._current.slices)
            self._current = replace(self._current, slices=self._private_slices)
        return self._private_slices

    def _slice_owners(self) -> dict[SliceName, ServiceName]:
        if self._owners is None:
            self._owners = {
                (each.namespace, each.name): owner
                for owner, of_service in self._current.slices.items()
                for each in of_service
            }
        return self._owners

    def _drop_slice(self, owner: ServiceName, name: str) -> None:
        slices = self._own_slices()
        left = tuple(each for each in slices[owner] if each.name != name)
        if left:
            slices[owner] = left
        else:
            del slices[owner]


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
