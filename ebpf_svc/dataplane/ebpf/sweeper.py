"""The thread that sweeps: frees what flows no longer need, ends sockets that lost their peer."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from ebpf_svc.dataplane.ebpf.state import FamilyState
from ebpf_svc.dataplane.ebpf.sweep import FamilySweep
from ebpf_svc.dataplane.ebpf.table import HashTable
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host.sockets import Peer, destroy_below
from ebpf_svc.log import get_logger
from ebpf_svc.model.net import Family

PERIOD_S = 10.0
"""Pause between sweeps while there is something to free; without, the thread sleeps."""
LINGER_S = 1.0
"""How long a connected UDP socket may wait for an answer of a backend that left: what was asked
before is mostly answered. kube-proxy looks at changes once a second, too (minSyncPeriod)."""

log = get_logger(__name__)


class Sweeper:
    """Sweeps every family in a thread of its own."""

    def __init__(
        self,
        states: Mapping[Family, FamilyState],
        udp_sockets: HashTable,
        lock: threading.RLock,
        *,
        cgroup: Path | None,
    ) -> None:
        """Bind to states that only change with the lock held.

        Args:
            states: by family.
            udp_sockets: which backend a connected UDP socket was given, by its cookie.
            lock: the maps' lock.
            cgroup: whose processes' sockets are ended; None = no socket is translated.
        """
        self._states, self._udp_sockets, self._lock = states, udp_sockets, lock
        self._cgroup = cgroup
        self._sweeps = [FamilySweep(state, lock) for state in states.values()]
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something may have been removed: end sockets soon, and sweep when the period is over."""
        if self._has_work():
            self._wake.set()

    def stop(self) -> None:
        """End the thread; a sweep under way is finished first."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def sweep(self) -> int:
        """Free what flows no longer need; returns how many entries were freed."""
        now_s = time.monotonic()
        with self._lock:
            for state in self._states.values():
                state.recycle(now_s)
        return sum(sweep.sweep(now_s) for sweep in self._sweeps)

    def end_sockets(self) -> int:
        """Destroy connected UDP sockets whose backend left a while ago; returns how many.

        Nothing else would tell them: their packets pass no hook that could choose anew.
        """
        before_s = time.monotonic() - LINGER_S
        with self._lock:
            lost = {
                (family, *state.codec.endpoint(state.at_of(backend))): backend
                for family, state in self._states.items()
                for backend in state.take_lost(before_s)
            }
        if not lost or self._cgroup is None:
            return 0
        pack = self._udp_sockets.value.pack
        given = {pack(backend_id=each, family=int(at[0])) for at, each in lost.items()}
        sockets = {
            int.from_bytes(key, sys.byteorder): key
            for key, value in self._udp_sockets.items()
            if value in given
        }
        if not sockets:
            return 0

        def has_lost(peer: Peer) -> bool:
            return peer.cookie in sockets and (peer.family, peer.address, peer.port) in lost

        count = destroy_below(self._cgroup, has_lost)
        self._udp_sockets.delete(list(sockets.values()))
        log.info("sweep.sockets", sockets=count, backends=len(lost))
        return count

    def _run(self) -> None:
        sweep_at: float | None = None
        while True:
            times = [at for at in (sweep_at, self._sockets_end_at()) if at is not None]
            self._wake.wait(max(0.0, min(times) - time.monotonic()) if times else None)
            self._wake.clear()
            if self._stopping:
                return
            is_due = sweep_at is not None and sweep_at <= time.monotonic()
            try:
                self.end_sockets()
                if is_due and (freed := self.sweep()):
                    log.debug("sweep.done", count=freed)
            except (OSError, DataplaneError) as error:
                log.warning("sweep.failed", error=str(error), retry_s=PERIOD_S)
            if is_due or sweep_at is None:
                sweep_at = time.monotonic() + PERIOD_S if self._has_work() else None

    def _sockets_end_at(self) -> float | None:
        with self._lock:
            died = [state.lost_udp[0][0] for state in self._states.values() if state.lost_udp]
        return min(died) + LINGER_S if died else None

    def _has_work(self) -> bool:
        with self._lock:
            return any(
                state.dead or state.draining or state.orphans or state.range_sets.idle
                for state in self._states.values()
            )
