"""What the programs tell while somebody listens: a ring a family, read in time order.

Listening is a lease of some seconds that the listener renews: one who is killed stops costing by
itself. A ring has one reader, so a lock on the pins lets one listen at a time.
"""

from __future__ import annotations

import ipaddress
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ebpf_svc.dataplane.ebpf.constants import Drop, EventKind, FlowFlag, FlowState
from ebpf_svc.dataplane.ebpf.layout import Layout, wire_port
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.dataplane.inspect import FlowEvent, Happening
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.host.lock import DirectoryLock, lock_holder
from ebpf_svc.host.ringbuf import RingBuffer
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol

LEASE_S = 4
RENEW_S = 1.0

_BOTH_FINS = FlowState.CLIENT_FIN | FlowState.BACKEND_FIN
_ENDS = {
    FlowState.CLIENT_FIN: "client_fin",
    FlowState.BACKEND_FIN: "backend_fin",
    FlowState.RESET: "reset",
}
REFUSING = Drop.NO_ENDPOINT


class RingEvents:
    """Listens to every family of one agent; closes the tables it was given."""

    def __init__(self, tables: Tables, directory: Path) -> None:
        """Begin to listen; what is in the rings from before is thrown away.

        Raises:
            UnsupportedHost: somebody else listens.
        """
        self._monitor, self._directory = tables.monitor, directory
        self._until_at = tables.monitor.value.offset("until_s")
        self._undo = ExitStack()
        try:
            self._undo.enter_context(_lock(directory))
            self._rings: dict[int, tuple[Family, RingBuffer, Layout]] = {}
            self._poll = select.poll()
            for family, of_family in tables.family.items():
                ring = RingBuffer(of_family.events.fd, of_family.events.max_entries)
                self._undo.callback(ring.close)
                ring.skip()
                self._rings[of_family.events.fd] = (family, ring, of_family.events.value)
                self._poll.register(of_family.events.fd, select.POLLIN)
        except BaseException:
            self._undo.close()
            raise
        self._undo.callback(tables.close)
        self._lost_before = self._lost()
        self._renewed_s = 0.0
        self._renew()

    @property
    def lost(self) -> int:
        """Events there was no room for, since this one listens."""
        return self._lost() - self._lost_before

    def wait(self, timeout_s: float) -> Sequence[FlowEvent]:
        """Events since the last call, oldest first; none when time is over.

        Raises:
            DataplaneError: the maps were taken away, e.g. by `cleanup`: nothing more will come.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._renew()
            left_s = deadline - time.monotonic()
            if self._poll.poll(max(0.0, min(left_s, RENEW_S)) * 1000):
                return self._read()
            if left_s <= RENEW_S:
                return []

    def close(self) -> None:
        """End the lease and give everything back."""
        if self._monitor.fd >= 0:
            self._monitor.write_word(0, self._until_at, 0)
            self._undo.close()

    def _read(self) -> list[FlowEvent]:
        found: list[tuple[int, FlowEvent]] = []
        offset_s = time.time() - time.monotonic()
        for family, ring, layout in self._rings.values():
            for record in ring.read():
                raw = layout.unpack(record)
                found.append((raw.time_ns, event_from(family, raw, offset_s)))
        return [event for _, event in sorted(found, key=lambda pair: pair[0])]

    def _renew(self) -> None:
        now_s = time.monotonic()
        if now_s - self._renewed_s >= RENEW_S:
            if not self._directory.is_dir():
                raise DataplaneError(f"{self._directory} is gone: nothing of ours serves here")
            # The programs compare with its coarse sister.
            self._monitor.write_word(0, self._until_at, int(now_s) + LEASE_S & 0xFFFFFFFF)
            self._renewed_s = now_s

    def _lost(self) -> int:
        return int(self._monitor.value.unpack(self._monitor.read(0, 1)).lost)


def _lock(directory: Path) -> DirectoryLock:
    try:
        return DirectoryLock(directory)
    except UnsupportedHost as error:
        pid = lock_holder(directory)
        who = f"pid {pid}" if pid else "another process"
        raise UnsupportedHost([f"{who} monitors already, and there is one ring: end it"]) from error


def event_from(family: Family, raw: Any, offset_s: float) -> FlowEvent:
    """Read one record.

    Args:
        family: of the ring it came from.
        raw: `struct event`.
        offset_s: what to add to the monotonic clock.
    """
    kind, drop = EventKind(raw.kind), raw.detail
    if kind is EventKind.DROPPED:
        what = Happening.REFUSED if drop == REFUSING else Happening.DROPPED
        reason = Drop(drop).name.lower()
    elif kind is EventKind.ENDING:
        closed = raw.state & FlowState.RESET or raw.state & _BOTH_FINS == _BOTH_FINS
        what = Happening.CLOSED if closed else Happening.ENDING
        reason = _ENDS[FlowState(raw.detail)]
    else:
        what, reason = Happening.OPENED, ""
    return FlowEvent(
        time_s=raw.time_ns / 1e9 + offset_s,
        what=what,
        client="" if raw.netns else _text(raw.client_addr),
        client_port=wire_port(raw.client_port),
        netns=raw.netns,
        frontend=FrontendKey(
            _text(raw.frontend_addr),
            wire_port(raw.frontend_port),
            Protocol.from_number(raw.frontend_proto),
        ),
        backend=(
            (_text(raw.backend_addr), wire_port(raw.backend_port)) if raw.backend_proto else None
        ),
        reason=reason,
        device=raw.ifindex,
        masquerade=bool(raw.flags & (FlowFlag.MASQUERADE | FlowFlag.SNAT)),
        hairpin=bool(raw.flags & FlowFlag.HAIRPIN),
    )


def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))
