"""Kubernetes Events: what an operator must know of, on the object it is about.

`EventRecorder` decides what is worth sending and how often; a sink sends it. Until there is an API
server the log is the sink. Recording never waits for the network: a sink queues or drops.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from ebpf_svc.log import get_logger

REPEAT_S = 300.0
"""The same reason on the same object is told again after this long, with how often it came."""
BURST = 25
"""Events that may come at once."""
REFILL_S = 10.0
"""A further one each so many seconds: an agent in trouble must not flood the API server."""
REMEMBERED = 1024

log = get_logger(__name__)


class EventType(StrEnum):
    """Kubernetes' two kinds."""

    NORMAL = "Normal"
    WARNING = "Warning"


class ObjectRef(NamedTuple):
    """What an Event is about."""

    kind: str
    namespace: str
    """Empty for objects without one, such as Nodes."""
    name: str

    def __str__(self) -> str:
        name = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind} {name}"


@dataclass(frozen=True, slots=True)
class Event:
    """One Event as a sink gets it."""

    regarding: ObjectRef
    type: EventType
    reason: str
    """A word in CamelCase, e.g. `FailedToStartServiceHealthcheck` (HS9)."""
    note: str
    action: str
    """What was tried, e.g. `StartServiceHealthcheck`."""
    count: int = 1
    """How often it came since it was told last, this time included."""


class EventSink(Protocol):
    """Where Events go; must return at once and not raise."""

    def send(self, event: Event) -> None:
        """Pass an Event on."""


class LogSink:
    """Events as log lines: what there is without an API server."""

    def send(self, event: Event) -> None:
        write = log.warning if event.type is EventType.WARNING else log.info
        write(
            "event",
            object=str(event.regarding),
            reason=event.reason,
            details=event.note,
            count=event.count,
        )


class EventRecorder:
    """Passes Events on, each reason on each object once in a while; thread-safe."""

    def __init__(
        self,
        sink: EventSink | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        repeat_s: float = REPEAT_S,
    ) -> None:
        """Take a sink (None: the log) and a monotonic clock."""
        self._sink = sink or LogSink()
        self._clock, self._repeat_s = clock, repeat_s
        self._lock = threading.Lock()
        self._told: OrderedDict[tuple[ObjectRef, str], _Told] = OrderedDict()
        self._tokens, self._filled_at = float(BURST), clock()

    def warn(self, regarding: ObjectRef, reason: str, note: str, *, action: str) -> None:
        """Record that something is wrong."""
        self.record(Event(regarding, EventType.WARNING, reason, note, action))

    def note(self, regarding: ObjectRef, reason: str, note: str, *, action: str) -> None:
        """Record that something happened."""
        self.record(Event(regarding, EventType.NORMAL, reason, note, action))

    def record(self, event: Event) -> None:
        """Pass the Event on, unless its like was told lately or too many were: then count it."""
        with self._lock:
            now, key = self._clock(), (event.regarding, event.reason)
            told = self._told.pop(key, None) or _Told()
            self._told[key] = told
            if len(self._told) > REMEMBERED:
                self._told.popitem(last=False)
            told.count += 1
            if now < told.again_at or not self._take_token(now):
                return
            told.again_at = now + self._repeat_s
            event = Event(
                event.regarding, event.type, event.reason, event.note, event.action, told.count
            )
            told.count = 0
        self._sink.send(event)

    def _take_token(self, now: float) -> bool:
        self._tokens = min(BURST, self._tokens + (now - self._filled_at) / REFILL_S)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class _Told:
    """How one reason on one object fares."""

    __slots__ = ("again_at", "count")

    def __init__(self) -> None:
        self.count = 0
        self.again_at = float("-inf")
