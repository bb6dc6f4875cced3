"""Whether this node's proxy is healthy: kube-proxy's rules HS2-HS6 and N6.

Pure but for the lock: whoever makes one gives the clocks. Fed by the sync loop, asked by servers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ebpf_svc.model.net import Family

NEVER_S = -62_135_596_800.0
"""Year 1, what Go prints for a time that was never set."""


@dataclass(frozen=True, slots=True)
class FamilyHealth:
    """One family that has synced at least once."""

    last_updated_s: float
    """Seconds since the epoch of its last sync."""
    healthy: bool


@dataclass(frozen=True, slots=True)
class Health:
    """What `/healthz` and `/livez` tell."""

    healthy: bool
    """No family waits too long for a sync; says nothing of the node (HS6)."""
    node_eligible: bool
    """The node is neither going away nor unknown (N6)."""
    last_updated_s: float
    current_s: float
    families: Mapping[Family, FamilyHealth]

    def body(self, *, with_node: bool) -> dict[str, Any]:
        """The JSON kube-proxy writes (HS2); `with_node` as in `/healthz`."""
        node = {"nodeEligible": self.node_eligible} if with_node else {}
        return {
            "lastUpdated": timestamp(self.last_updated_s),
            "currentTime": timestamp(self.current_s),
            **node,
            "healthy": self.healthy,
            "status": {
                family.label: {
                    "lastUpdated": timestamp(of_family.last_updated_s),
                    "healthy": of_family.healthy,
                }
                for family, of_family in self.families.items()
            },
        }

    def as_answered(self, *, ok: bool) -> Health:
        """With `last_updated_s` as kube-proxy answers it: now, when all is well (HS5)."""
        return replace(self, last_updated_s=self.current_s) if ok else self


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC, of seconds since the epoch."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat()
    return text.replace("+00:00", "Z")


class HealthState:
    """Which families wait for a sync, and since when. Thread-safe.

    A family is unhealthy once the oldest change it has not carried out is `timeout_s` old (HS3),
    and until a sync of its own succeeds (HS4). Idle, it stays healthy for ever.
    """

    def __init__(
        self,
        families: Iterable[Family],
        *,
        timeout_s: float,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Start healthy: nothing waits.

        Args:
            families: those served.
            timeout_s: age of a change that makes its family unhealthy, twice the sync period (R5).
            monotonic: the clock that ages changes; a jump of the other must not.
            wall: the clock that is shown.
        """
        self.families = tuple(families)
        self._timeout_s, self._monotonic, self._wall = timeout_s, monotonic, wall
        self._lock = threading.Lock()
        self._queued: dict[Family, float] = {}
        """Monotonic time of the oldest change not synced."""
        self._updated: dict[Family, float] = {}
        """Time of the last sync, by the clock that is shown."""
        self._node_eligible = True

    def set_timeout(self, timeout_s: float) -> None:
        """Take another age at which a change makes its family unhealthy."""
        with self._lock:
            self._timeout_s = timeout_s

    def queued(self, family: Family) -> None:
        """A change waits; one that waits already is the older."""
        with self._lock:
            self._queued.setdefault(family, self._monotonic())

    def updated(self, family: Family) -> None:
        """Everything that waited in this family is done."""
        with self._lock:
            self._queued.pop(family, None)
            self._updated[family] = self._wall()

    def set_node_eligible(self, eligible: bool) -> None:
        """Take over what the Node object says (N6)."""
        with self._lock:
            self._node_eligible = eligible

    def is_healthy(self) -> bool:
        """Whether `/livez` would answer 200."""
        return self.health().healthy

    def health(self) -> Health:
        """Everything, at this moment."""
        with self._lock:
            now = self._monotonic()
            families = {
                family: FamilyHealth(
                    updated_s,
                    family not in self._queued or now - self._queued[family] < self._timeout_s,
                )
                for family, updated_s in sorted(self._updated.items())
            }
            return Health(
                healthy=all(each.healthy for each in families.values()),
                node_eligible=self._node_eligible,
                last_updated_s=max(self._updated.values(), default=NEVER_S),
                current_s=self._wall(),
                families=families,
            )
