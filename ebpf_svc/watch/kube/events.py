"""Events, sent to the API server as objects of events.k8s.io/v1.

A thread of its own sends them one by one; while the API server is away the newest are kept. What it
does not take is dropped with a log line: an Event must never hold up, or end, anything else.
"""

from __future__ import annotations

import queue
import random
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ebpf_svc.errors import WatchError
from ebpf_svc.events import Event, ObjectRef
from ebpf_svc.log import get_logger
from ebpf_svc.watch.kube.connection import ApiServer
from ebpf_svc.watch.kube.failures import Refused, Unreachable

PATH = "/apis/events.k8s.io/v1/namespaces/{}/events"
CONTROLLER = "ebpf-svc.io/ebpf-svc"
"""Must be a qualified name; `kubectl get events` shows it as the source."""
CLUSTER_NAMESPACE = "default"
"""Where Events about objects without a namespace must be."""
NOTE_BYTES = 1024
"""Longer notes are refused."""
KEPT = 100
FIRST_RETRY_S, RETRY_MAX_S = 1.0, 30.0
STOP_S = 1.0
TOO_MANY = 429

log = get_logger(__name__)


class ApiSink:
    """Sends Events (`events.EventSink`); start it, and stop it before the server is closed."""

    def __init__(self, server: ApiServer, instance: str) -> None:
        """Prepare; sends nothing yet.

        Args:
            server: where to.
            instance: who says it, e.g. the node's name.
        """
        self._server, self._instance = server, instance
        self._waiting: queue.Queue[tuple[Event, datetime] | None] = queue.Queue(KEPT)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Begin to send what is recorded."""
        self._thread.start()

    def stop(self) -> None:
        """Send what waits if that takes no time, and end."""
        self._put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_S)
        self._stopping.set()

    def send(self, event: Event) -> None:
        """Take an Event over; returns at once."""
        self._put((event, datetime.now(UTC)))

    def _put(self, item: tuple[Event, datetime] | None) -> None:
        while True:
            try:
                self._waiting.put_nowait(item)
            except queue.Full:
                # What is old by the time somebody listens helps least.
                with suppress(queue.Empty):
                    self._waiting.get_nowait()
            else:
                return

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            event, when = item
            namespace = event.regarding.namespace or CLUSTER_NAMESPACE
            self._deliver(namespace, event_object(event, when, self._instance))

    def _deliver(self, namespace: str, item: Mapping[str, Any]) -> None:
        pause_s = FIRST_RETRY_S
        while not self._stopping.is_set():
            try:
                self._server.post(PATH.format(namespace), item)
                return
            except (Refused, Unreachable) as error:
                asked_s = 0.0
                if isinstance(error, Refused):
                    if not error.is_outage and error.status != TOO_MANY:
                        _say_dropped(item, error)
                        return
                    asked_s = error.retry_after_s or 0.0
                self._stopping.wait(max(pause_s * random.uniform(0.5, 1), asked_s))
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            except WatchError as error:
                _say_dropped(item, error)
                return


def event_object(event: Event, when: datetime, instance: str) -> dict[str, Any]:
    """The API object of an Event that happened then."""
    about = event.regarding
    micro_time = when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    item: dict[str, Any] = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "name": f"{about.name}.{secrets.token_hex(8)}",
            "namespace": about.namespace or CLUSTER_NAMESPACE,
        },
        "eventTime": micro_time,
        "reportingController": CONTROLLER,
        "reportingInstance": instance,
        "action": event.action,
        "reason": event.reason,
        "type": event.type.value,
        "note": _cut(event.note),
        "regarding": _reference(about),
    }
    if event.count > 1:
        item["series"] = {"count": event.count, "lastObservedTime": micro_time}
    return item


def _reference(about: ObjectRef) -> dict[str, str]:
    # kubectl describe looks for the UID; kube-proxy gives the name for one, as kubelet does for
    # nodes, and so the Events of all three stand together.
    name = f"{about.namespace}/{about.name}" if about.namespace else about.name
    group = "discovery.k8s.io/v1" if about.kind == "EndpointSlice" else "v1"
    reference = {"apiVersion": group, "kind": about.kind, "name": about.name, "uid": name}
    return {**reference, "namespace": about.namespace} if about.namespace else reference


def _cut(note: str) -> str:
    return note.encode()[:NOTE_BYTES].decode(errors="ignore")


def _say_dropped(item: Mapping[str, Any], error: Exception) -> None:
    log.warning(
        "event.dropped",
        object=f"{item['regarding']['kind']} {item['regarding']['uid']}",
        reason=item["reason"],
        details=item["note"],
        error=str(error),
    )
