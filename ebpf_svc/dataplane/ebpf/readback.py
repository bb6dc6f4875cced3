"""Read the frontends of one family back from the kernel, in the words of the model.

From the maps alone: nothing the agent remembers is used, so this judges the agent as well.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_svc.dataplane.ebpf import entries
from ebpf_svc.dataplane.ebpf.codec import Codec, number
from ebpf_svc.dataplane.ebpf.constants import NO_BACKEND
from ebpf_svc.dataplane.ebpf.tables import FamilyTables
from ebpf_svc.model.desired import Backend, FrontendKey, FrontendView


def read_family(codec: Codec, tables: FamilyTables) -> dict[FrontendKey, FrontendView]:
    """Every frontend that takes new connections; draining ones are left out.

    Raises:
        OSError: a map cannot be read.
    """
    backends = _backends_by_service(codec, tables)
    ranges = _source_ranges(codec, tables)
    views: dict[FrontendKey, FrontendView] = {}
    for at, data in tables.frontends.items():
        value = codec.frontend_value(data)
        if entries.is_draining(value.flags):
            continue
        key = codec.frontend_key(at)
        frontend, has_endpoints = entries.frontend_from(
            key, value.flags, ranges.get(value.ranges, ())
        )
        views[key] = FrontendView(
            frontend, backends.get(value.service, ()), has_endpoints, value.affinity_s
        )
    return views


def chain(codec: Codec, tables: FamilyTables, head: int) -> Iterator[tuple[int, int, int]]:
    """Walk the backends from a head of the index on: (id, service, flags) of each."""
    table, stride = tables.backends, tables.backends.stride
    for _ in range(table.max_entries):  # it may bite its tail
        if not NO_BACKEND < head < table.max_entries:
            return
        service, following, flags = codec.backend_words(table.view(head + 1), head * stride)
        yield head, service, flags
        head = following


def _backends_by_service(codec: Codec, tables: FamilyTables) -> dict[int, tuple[Backend, ...]]:
    found: dict[int, list[Backend]] = {}
    for at, head in tables.backend_index.items():
        endpoint = codec.endpoint(at)
        for _, service, flags in chain(codec, tables, number(head)):
            if flags:
                found.setdefault(service, []).append(entries.backend_from(*endpoint, flags))
    return {
        service: tuple(sorted(backends, key=lambda each: (each.address, each.port)))
        for service, backends in found.items()
    }


def _source_ranges(codec: Codec, tables: FamilyTables) -> dict[int, tuple[str, ...]]:
    found: dict[int, list[str]] = {}
    for key, _ in tables.source_ranges.items():
        set_id, prefix = codec.prefix(key)
        found.setdefault(set_id, []).append(prefix)
    return {set_id: tuple(sorted(prefixes)) for set_id, prefixes in found.items()}
