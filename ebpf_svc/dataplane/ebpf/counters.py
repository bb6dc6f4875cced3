"""What metrics ask of the maps: drops by reason, how full each is, flows and traffic by
service port.

Called by the metrics server's thread beside the sync loop, so it takes no lock and holds nothing
up: what the loop changes meanwhile is counted before or after. Whole tables are read at most once
in `FRESH_S`, however many collect.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ebpf_svc.dataplane.ebpf.constants import Drop
from ebpf_svc.dataplane.ebpf.flows import idle_limit_s
from ebpf_svc.dataplane.ebpf.state import FamilyState
from ebpf_svc.dataplane.ebpf.table import HashTable
from ebpf_svc.dataplane.ebpf.tables import FamilyTables, Tables
from ebpf_svc.dataplane.inspect import FlowCounts, MapFill, Traffic
from ebpf_svc.model.desired import PlanKey
from ebpf_svc.model.net import Family, Protocol

FRESH_S = 10.0
"""Reading a full table of flows takes a tenth of a second of one CPU."""

NO_FLOWS = FlowCounts({}, {})

_UDP = Protocol.UDP.number
_UDP_LIMIT_S = idle_limit_s(_UDP, 0)
_LIMITS_S = [idle_limit_s(Protocol.TCP.number, state) for state in range(256)]
"""By state, of TCP and SCTP."""


@dataclass(frozen=True, slots=True)
class _Scan:
    """One look at the tables that only the programs write."""

    fill: tuple[MapFill, ...]
    alive: Mapping[Family, Mapping[int, int]]
    """Flows that are alive by service id."""


class StepTimes:
    """How long the steps of a start took, in seconds."""

    def __init__(self) -> None:
        self.taken_s: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, step: str) -> None:
        """Note that a step is over; the next begins."""
        now = time.monotonic()
        self.taken_s[step], self._last = now - self._last, now


class Counters:
    """Counts what the open maps hold."""

    def __init__(self, tables: Tables, states: Mapping[Family, FamilyState]) -> None:
        """Bind to open maps and what the agent knows it has put there."""
        self._tables, self._states = tables, states
        self._scan = _Scan((), {})
        self._scanned_at = float("-inf")

    def drops(self) -> dict[str, int]:
        """Packets not forwarded, by reason; the kernel counts on while no agent runs."""
        counts = self._tables.drops.sums()
        return {drop.name.lower(): counts[drop] for drop in Drop if drop < len(counts)}

    def fill(self) -> list[MapFill]:
        """How full every map is that can be."""
        return [*self._written_by_agent(), *self._look().fill]

    def flow_counts(self) -> FlowCounts:
        """Flows that are alive, by service port."""
        by_port: dict[PlanKey, int] = {}
        draining: dict[Family, int] = {}
        for family, alive in self._look().alive.items():
            # One call of C that runs no Python: the loop cannot add records in between.
            records = list(self._states[family].records.items())
            found = 0
            for key, record in records:
                count = alive.get(record.service)
                if count:
                    by_port[key] = count
                    found += count
            draining[family] = sum(alive.values()) - found
        return FlowCounts(by_port, draining)

    def traffic(self) -> dict[PlanKey, Traffic]:
        """What each service port got; the kernel counts on while no agent runs."""
        by_port: dict[PlanKey, Traffic] = {}
        for state in self._states.values():
            records = list(state.records.items())
            totals = state.tables.service_counters.totals([each.service for _, each in records])
            for key, record in records:
                if record.service in totals:
                    by_port[key] = Traffic(*totals[record.service])
        return by_port

    def _written_by_agent(self) -> Iterator[MapFill]:
        """Maps of which the agent knows the content without a look."""
        for state in self._states.values():
            tables = state.tables
            for table, entries in (
                (tables.frontends, len(state.frontends)),
                (tables.backends, len(state.backends)),
                (tables.source_ranges, sum(map(len, list(state.range_sets.content.values())))),
            ):
                yield MapFill(table.name, entries, table.max_entries, evicts=False)
        slots = next(iter(self._states.values())).slots
        yield MapFill("slots", len(slots), self._tables.slots.max_entries, evicts=False)

    def _look(self) -> _Scan:
        if time.monotonic() - self._scanned_at >= FRESH_S:
            alive: dict[Family, Mapping[int, int]] = {}
            fill = [_fill(self._tables.udp_sockets)]
            for family, tables in self._tables.family.items():
                alive[family], entries = _count_flows(tables)
                fill.append(MapFill(tables.flows.name, entries, tables.flows.max_entries, True))
                fill += [_fill(tables.affinity), _fill(tables.fragments)]
            self._scan = _Scan(tuple(fill), alive)
            self._scanned_at = time.monotonic()
        return self._scan


def _fill(table: HashTable) -> MapFill:
    entries = sum(count for _, _, count in table.chunks())
    return MapFill(table.name, entries, table.max_entries, evicts=True)


def _count_flows(tables: FamilyTables) -> tuple[Counter[int], int]:
    """Flows that are alive by service id, and all entries, dead ones included."""
    key, value = tables.flows.key, tables.flows.value
    service_at, proto_at = key.offset("service") // 4, key.offset("proto")
    seen_at, state_at = value.offset("seen_s") // 4, value.offset("state")
    alive: Counter[int] = Counter()
    entries = 0
    for keys, values, count in tables.flows.chunks():
        entries += count
        now_s = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000_000
        columns = zip(
            memoryview(keys).cast("I")[service_at :: key.size // 4],
            keys[proto_at :: key.size],
            values[state_at :: value.size],
            memoryview(values).cast("I")[seen_at :: value.size // 4],
            strict=True,
        )
        alive.update(
            service
            for service, protocol, state, seen_s in columns
            if now_s - seen_s <= (_UDP_LIMIT_S if protocol == _UDP else _LIMITS_S[state])
        )
    return alive, entries
