"""Follow one kind of objects: list them, then watch from where the list ended, for ever.

Whatever goes wrong, the store keeps what it has. A watch that breaks is resumed from the last
version seen; when that is too old, everything is listed again and compared with what is there, so
that deletions nobody saw are noticed.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from ebpf_svc.config import KubernetesSettings
from ebpf_svc.errors import WatchError
from ebpf_svc.log import get_logger
from ebpf_svc.watch.kube import collector, wire
from ebpf_svc.watch.kube.connection import Answer, ApiServer
from ebpf_svc.watch.kube.decode import (
    Key,
    Line,
    Problems,
    Reading,
    Resource,
    read_line,
    read_page,
)
from ebpf_svc.watch.kube.failures import Broken, Expired, Refused, Silent, Unreachable
from ebpf_svc.watch.kube.ledger import Ledger
from ebpf_svc.watch.kube.outage import JITTER, Outage
from ebpf_svc.watch.kube.sinks import Sink

log = get_logger(__name__)

WATCH_S = (300, 600)
"""The server ends a watch after a time from this range, so that not all end at once."""
SHORT_WATCH_S = 1.0
"""A watch that ends sooner and without a word counts as broken."""
FIRST_BREAK_S = 0.05
"""Pause after a watch broke; it doubles with each that breaks before anything was said."""
FIRST_REFUSAL_S, LONGEST_REFUSAL_S = 0.5, 10.0
"""Pauses after an error about this kind alone, such as a missing permission; they double."""
ABSENT_S = 600.0
"""Pause before an optional kind is asked for again: the server may have been upgraded."""
_RESUMABLE = frozenset({401, 403, 429, 500, 502, 503})
"""Errors that say nothing about the version asked for; after others, everything is listed anew."""

_UNKNOWN_FIELD = re.compile("not a known field selector|field label not supported")

ItemT = TypeVar("ItemT", bound=wire.Object)
ValueT = TypeVar("ValueT")


@dataclass
class Progress:
    """How the following of a kind goes, for health and metrics; written by one thread."""

    is_listed: bool = False
    """All objects were seen once."""
    is_watching: bool = False
    lists: int = 0
    events: int = 0
    heard_s: float = 0.0
    """When the server last said anything, by the monotonic clock; 0 = never."""


class _Found(Generic[ValueT]):
    """A list as it grows; the sink gets it when it is complete."""

    def __init__(self) -> None:
        self.values: dict[Key, ValueT] = {}
        self.problems: dict[Key, Problems] = {}
        self.started_s = time.monotonic()


@dataclass(frozen=True)
class Shared:
    """What those who follow one API server have in common."""

    server: ApiServer
    outage: Outage
    ledger: Ledger
    settings: KubernetesSettings


class Reflector(Generic[ItemT, ValueT]):
    """Keeps a sink in line with the API server, from a thread of its own."""

    def __init__(
        self, resource: Resource[ItemT, ValueT], sink: Sink[ValueT], shared: Shared
    ) -> None:
        self._resource, self._sink = resource, sink
        self._server, self._outage = shared.server, shared.outage
        self._ledger, self._settings = shared.ledger, shared.settings
        self.progress = Progress()
        self._stopping = threading.Event()
        self._answer: Answer | None = None
        self._version = ""
        """Everything up to here is in the sink; empty = list."""
        self._streams = shared.settings.streaming_lists and not resource.is_small
        self._page_size = shared.settings.page_size
        self._selectors = dict(resource.selectors)
        """What the server filters by; it may know less than we would like."""
        self._failures = 0
        """In a row, of this kind alone."""
        name = f"watch-{resource.kind}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to end; the sink keeps what it has."""
        self._stopping.set()
        self._outage.wake()
        if answer := self._answer:
            answer.interrupt()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._outage.wait_turn(self._stopping)
            if self._stopping.is_set():
                return
            try:
                self._follow()
            except Silent as error:
                log.debug("watch.silent", source=self._resource.kind, reason=str(error))
            except Expired as error:
                log.info("watch.expired", source=self._resource.kind, reason=str(error))
                # Should even a fresh list expire between two pages, the next comes in one piece.
                self._page_size = self._page_size if self._version else 0
                self._version = ""
            except Broken as error:
                self._pause("watch.broken", error, FIRST_BREAK_S, self._settings.retry_max_s)
            except Unreachable as error:
                self._lost(error)
            except Refused as error:
                self._refused(error)
            finally:
                self.progress.is_watching = False

    def _follow(self) -> None:
        """List if need be, then watch until the server ends it."""
        if self._outage.is_on:
            self._server.probe()
        if self._version:
            self._watch(None)
            return
        with ExitStack() as stack:
            stack.enter_context(collector.paused())
            if self._streams:
                self._watch(_Found(), stack.close)
                return
            self._list()
        self._watch(None)

    def _list(self) -> None:
        """List page by page; the sink changes once, when all is there."""
        found = _Found[ValueT]()
        token = ""
        # Version 0 = what the server has at hand. Not so after it was too old once.
        at_hand = self._resource.is_small and not self.progress.lists
        while not self._stopping.is_set():
            query = {
                "limit": str(self._page_size or ""),
                "continue": token,
                "resourceVersion": "0" if at_hand and not token else "",
            }
            meta, readings = read_page(self._resource, self._ask(query, packed=True).read())
            for reading in readings:
                self._find(reading, found)
            self.progress.heard_s = time.monotonic()
            token = meta.get("continue") or ""
            if not token:
                self._listed(found, meta.get("resourceVersion") or "")
                return

    def _watch(
        self, found: _Found[ValueT] | None, on_listed: Callable[[], object] = lambda: None
    ) -> None:
        """Take events until the server ends the watch.

        Args:
            found: takes the objects that are there, to begin with; None = they are known.
            on_listed: called when all of them were sent.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(*WATCH_S)),
        }
        if found is not None:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        answer = self._ask(query, silence_s=self._settings.silence_s)
        started_s, heard_s = time.monotonic(), self.progress.heard_s
        self.progress.is_watching = True
        try:
            for text in answer.lines():
                self.progress.heard_s = time.monotonic()
                line = read_line(self._resource, text)
                self._failures = 0
                if found is None:
                    self._take(line)
                elif line.ends_list:
                    self._listed(found, line.version)
                    found = None
                    on_listed()
                elif line.verb == "DELETED":
                    found.values.pop(line.reading.key, None)
                elif line.verb != "BOOKMARK":
                    self._find(line.reading, found)
        finally:
            self._answer = None
            answer.close()
        if time.monotonic() - started_s < SHORT_WATCH_S and heard_s == self.progress.heard_s:
            raise Broken("it ended at once")

    def _ask(
        self, query: Mapping[str, str], *, packed: bool = False, silence_s: float | None = None
    ) -> Answer:
        """Send a request, and let all who wait know when the server is there."""
        try:
            answer = self._server.get(
                self._resource.path,
                {**self._selectors, **query},
                packed=packed,
                silence_s=silence_s,
            )
        except Refused as error:
            if not error.is_outage:
                self._answered()
            raise
        except Expired:
            self._answered()
            raise
        self._answered()
        self._answer = answer
        if self._stopping.is_set():
            answer.interrupt()
        return answer

    def _answered(self) -> None:
        away_s = self._outage.over()
        if away_s is not None:
            log.info("watch.restored", source=self._resource.kind, took_ms=round(away_s * 1000))

    # -- objects -----------------------------------------------------------------------------------

    def _find(self, reading: Reading[ValueT], found: _Found[ValueT]) -> None:
        """Add an object to a list."""
        key, value = reading.key, reading.value
        if reading.problems:
            found.problems[key] = reading.problems
        if reading.is_broken:
            # Its last good state is a better guess than its absence.
            value = self._sink.get(key)
        if value is not None:
            found.values[key] = value

    def _listed(self, found: _Found[ValueT], version: str) -> None:
        self._sink.replace(found.values)
        self._ledger.replace(self._resource.kind, found.problems)
        self._version, self._failures = version, 0
        self._page_size = self._settings.page_size
        self.progress.is_listed = True
        self.progress.lists += 1
        took_ms = round((time.monotonic() - found.started_s) * 1000)
        count = len(found.values)
        log.info("watch.listed", source=self._resource.kind, count=count, took_ms=took_ms)

    def _take(self, line: Line[ValueT]) -> None:
        """Take an event over into the sink."""
        reading = line.reading
        if line.verb != "BOOKMARK":
            self.progress.events += 1
            # The wrong shape leaves the last good state in force.
            if line.verb == "DELETED" or (reading.value is None and not reading.is_broken):
                self._sink.delete(reading.key)
            elif reading.value is not None:
                self._sink.put(reading.key, reading.value)
            gone = line.verb == "DELETED"
            self._ledger.put(self._resource.kind, reading.key, () if gone else reading.problems)
        self._version = line.version or self._version

    # -- failures ----------------------------------------------------------------------------------

    def _lost(self, error: Unreachable | Refused) -> None:
        if self._stopping.is_set():
            return
        retry_after_s = error.retry_after_s if isinstance(error, Refused) else None
        pause_s = self._outage.failed(retry_after_s)
        if pause_s is not None:
            # The first, second, fourth … failure: an hour without server is a dozen lines.
            write = log.warning if _is_power_of_2(self._outage.failures) else log.debug
            write(
                "watch.lost",
                source=self._resource.kind,
                address=self._server.url,
                error=str(error),
                count=self._outage.failures,
                retry_s=round(pause_s, 2),
            )

    def _refused(self, error: Refused) -> None:
        """Go on after an error the server answered with."""
        if error.status not in _RESUMABLE:
            self._version = ""
        if error.is_outage:
            self._lost(error)
            return
        kind = self._resource.kind
        if self._resource.is_optional and error.status in (403, 404):
            log.info("watch.absent", source=kind, reason=str(error), retry_s=ABSENT_S)
            self._listed(_Found(), "")
            self._stopping.wait(ABSENT_S)
        elif self._streams and not self._version and error.status in (400, 422):
            log.info("watch.streaming-refused", source=kind, reason=str(error))
            self._streams = False
        elif error.status == 400 and _UNKNOWN_FIELD.search(str(error)):
            # Servers before 1.32 select Services by no field of theirs. What comes without it is
            # read, and left out, all the same.
            log.info("watch.selector-refused", source=kind, reason=str(error))
            del self._selectors["fieldSelector"]
        else:
            self._pause("watch.refused", error, FIRST_REFUSAL_S, LONGEST_REFUSAL_S)

    def _pause(self, event: str, error: WatchError, first_s: float, longest_s: float) -> None:
        """Wait after a failure of this kind alone, longer each time."""
        if self._stopping.is_set():
            return
        pause_s = min(first_s * 2.0 ** min(self._failures, 20), longest_s)
        pause_s *= 1 - JITTER * random.random()
        if isinstance(error, Refused):
            pause_s = max(pause_s, error.retry_after_s or 0.0)
        self._failures += 1
        write = log.warning if _is_power_of_2(self._failures) else log.debug
        write(
            event,
            source=self._resource.kind,
            error=str(error),
            count=self._failures,
            retry_s=round(pause_s, 2),
        )
        self._stopping.wait(pause_s)


def _is_power_of_2(number: int) -> bool:
    return number & (number - 1) == 0
