"""Turn a plan and the ids given to it into the values the maps hold, and back.

Pure: no kernel, no ids of its own, no bytes. Values carry the field names of bpf/lib/types.h; the
codec turns them into bytes. Loops here run once per endpoint of the cluster when an agent starts:
they are written to be short rather than general.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from ebpf_svc.dataplane.ebpf import maglev
from ebpf_svc.dataplane.ebpf.constants import (
    FRONTEND_KIND_MASK,
    FRONTEND_KIND_SHIFT,
    MASQUERADE_SHIFT,
    BackendFlag,
    FrontendFlag,
)
from ebpf_svc.model.desired import Backend, Frontend, FrontendKey, FrontendKind, ServicePlan
from ebpf_svc.model.net import Sources

# An IntFlag's own operators cost a microsecond each.
_REJECT = int(FrontendFlag.REJECT)
_MAGLEV = int(FrontendFlag.MAGLEV)
_SOURCE_RANGES = int(FrontendFlag.SOURCE_RANGES)
_DRAINING = int(FrontendFlag.DRAINING)
_SERVING = int(BackendFlag.SERVING)
_IN_CLUSTER = int(BackendFlag.IN_CLUSTER)
_IN_LOCAL = int(BackendFlag.IN_LOCAL)
_ALL = int(Sources.ALL)
_KINDS = tuple(FrontendKind)


ALLOWED = 1
"""Value of a source range; only that it is there counts."""


class ListName(IntEnum):
    """The slot lists a service port may own; its frontends share them."""

    CLUSTER = 0
    LOCAL = 1
    MAGLEV_CLUSTER = 2
    MAGLEV_LOCAL = 3


class SlotRange(NamedTuple):
    """Where a list lies in the slots array."""

    first: int
    length: int


NO_SLOTS = SlotRange(0, 0)


class FrontendValue(NamedTuple):
    """`struct frontend_value`."""

    service: int
    flags: int
    cluster_first: int
    cluster_count: int
    local_first: int
    local_count: int
    affinity_s: int
    ranges: int


class MaglevOptions(NamedTuple):
    """What every node of a cluster must agree on to build the same tables."""

    slots_per_backend: int
    seed: str
    cache: maglev.TableCache


def backend_flags(backend: Backend) -> int:
    """`backend_value.flags` of an endpoint that is in the plan."""
    return (
        _SERVING
        | (_IN_CLUSTER if backend.in_cluster else 0)
        | (_IN_LOCAL if backend.in_local else 0)
    )


def backend_from(address: str, port: int, flags: int) -> Backend:
    """The endpoint a backend entry stands for; `flags` are not 0."""
    return Backend(address, port, bool(flags & _IN_CLUSTER), bool(flags & _IN_LOCAL))


def needed_lists(plan: ServicePlan, *, use_maglev: bool) -> dict[ListName, Sequence[int]]:
    """Name the lists that some client of some frontend is sent to.

    Returns:
        members as positions in `plan.backends`, ascending; empty lists are left out.
    """
    if not plan.has_endpoints:
        return {}
    cluster: Sequence[int] | None = None
    local: Sequence[int] | None = None
    lists: dict[ListName, Sequence[int]] = {}
    for frontend in plan.frontends:
        tables = 2 if use_maglev and frontend.kind else 0
        sources = int(frontend.local_for)
        if sources != _ALL:
            if cluster is None:
                cluster = [i for i, backend in enumerate(plan.backends) if backend.in_cluster]
            if cluster:
                lists[_LIST_NAMES[tables]] = cluster
        if sources:
            if local is None:
                local = [i for i, backend in enumerate(plan.backends) if backend.in_local]
            if local:
                lists[_LIST_NAMES[tables + 1]] = local
    return lists


_LIST_NAMES = tuple(ListName)


def slots_of(
    name: ListName,
    members: Sequence[int],
    *,
    backends: Sequence[Backend],
    ids: Sequence[int],
    options: MaglevOptions,
) -> array[int]:
    """Lay out one list as backend ids, one a slot.

    A Maglev table is built from the endpoints' addresses and ports, which are the same on every
    node, and then filled with this node's ids; a table of one endpoint needs one slot.

    Args:
        members: positions in `backends` and `ids`.
    """
    member_ids = array("I", [ids[i] for i in members])
    if name < ListName.MAGLEV_CLUSTER or len(members) == 1:
        return member_ids
    names = [f"{backends[i].address}:{backends[i].port}" for i in members]
    size = maglev.table_size(len(names), options.slots_per_backend)
    return array("I", [member_ids[i] for i in options.cache.table(names, size, options.seed)])


def frontend_value(
    plan: ServicePlan,
    frontend: Frontend,
    *,
    service: int,
    lists: Mapping[ListName, SlotRange],
    ranges: int,
    use_maglev: bool,
) -> FrontendValue:
    """Say what the hooks do with packets to a frontend.

    Args:
        lists: where the lists of `needed_lists` lie.
        ranges: id of the frontend's set of source ranges, 0 when it has no filter.
    """
    kind = int(frontend.kind)
    local_for = int(frontend.local_for)
    flags = local_for | int(frontend.masquerade_for) << MASQUERADE_SHIFT
    flags |= kind << FRONTEND_KIND_SHIFT
    tables = 0
    if use_maglev and kind:
        flags |= _MAGLEV
        tables = 2
    if not plan.has_endpoints:
        flags |= _REJECT
    if frontend.source_ranges is not None:
        flags |= _SOURCE_RANGES
    # A list no client of this frontend is sent to stays out, or two frontends of one service
    # would differ by what a third one needs.
    cluster = lists.get(_LIST_NAMES[tables], NO_SLOTS) if local_for != _ALL else NO_SLOTS
    local = lists.get(_LIST_NAMES[tables + 1], NO_SLOTS) if local_for else NO_SLOTS
    return FrontendValue(service, flags, *cluster, *local, plan.affinity_s, ranges)


def draining_value(service: int, flags: int) -> FrontendValue:
    """What stands for a frontend that is gone while its connections may live on (P12).

    Args:
        flags: of the value it had; the masquerade bits still serve those connections.
    """
    return FrontendValue(service, flags & ~_SOURCE_RANGES | _DRAINING, 0, 0, 0, 0, 0, 0)


def is_draining(flags: int) -> bool:
    """Whether a frontend's value only serves connections of the past."""
    return bool(flags & _DRAINING)


def frontend_from(
    key: FrontendKey, flags: int, source_ranges: tuple[str, ...] | None
) -> tuple[Frontend, bool]:
    """Read a frontend back from its flags.

    Args:
        source_ranges: the prefixes of the set the value names; ignored when it has no filter.

    Returns:
        the frontend, and whether its service port has endpoints anywhere.
    """
    frontend = Frontend(
        key,
        _KINDS[flags >> FRONTEND_KIND_SHIFT & FRONTEND_KIND_MASK],
        Sources(flags & _ALL),
        Sources(flags >> MASQUERADE_SHIFT & _ALL),
        source_ranges if flags & _SOURCE_RANGES else None,
    )
    return frontend, not flags & _REJECT


def lists_of_value(value: FrontendValue) -> dict[ListName, SlotRange]:
    """Where the lists lie that a frontend's value points at."""
    tables = 2 if value.flags & _MAGLEV else 0
    found = {
        _LIST_NAMES[tables]: SlotRange(value.cluster_first, value.cluster_count),
        _LIST_NAMES[tables + 1]: SlotRange(value.local_first, value.local_count),
    }
    return {name: slots for name, slots in found.items() if slots.length}
