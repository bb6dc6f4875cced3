"""From what a dataplane tells to what a person reads: names of services, clients and devices."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ebpf_svc.dataplane.inspect import FlowEvent, Happening
from ebpf_svc.host.callers import Namespace
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, family_of
from ebpf_svc.monitor.words import reason_in_words
from ebpf_svc.status import STATE, NamedFrontend, read_names

LOOK_AGAIN_S = 1.0
"""How often, at most, a namespace or a name that is not known is looked for."""
NO_NAME = "?"
BAD = (Happening.REFUSED, Happening.DROPPED)

Record = dict[str, Any]
"""One event as `--json` prints it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events to show; the default is all."""

    service: str = ""
    """`namespace/name`, or with `:port` one port of it."""
    client: str = ""
    """Canonical address."""
    only_drops: bool = False
    """Refusals count as such."""

    def admits(self, event: FlowEvent, record: Record) -> bool:
        """Whether to show an event."""
        if self.only_drops and event.what not in BAD:
            return False
        if self.service and record["service"] != self.service:
            whole = record["service"].partition(":")[0]
            if ":" in self.service or whole != self.service:
                return False
        return not self.client or self.client in (event.client, *record["client_addresses"])


@dataclass(slots=True)
class Names:
    """Names of frontends as the agent last wrote them down; read again when it wrote anew."""

    run_dir: Path
    _names: Mapping[FrontendKey, NamedFrontend] = field(default_factory=dict)
    _written: tuple[int, int] | None = None
    _looked_s: float = float("-inf")

    def service(self, key: FrontendKey) -> str:
        """`namespace/name:port`, or `?`."""
        found = self._names.get(key)
        if found is None or time.monotonic() - self._looked_s >= LOOK_AGAIN_S:
            self._refresh()
            found = self._names.get(key)
        if found is None:
            return NO_NAME
        return f"{found.namespace}/{found.name}" + (f":{found.port}" if found.port else "")

    def _refresh(self) -> None:
        self._looked_s = time.monotonic()
        try:
            status = (self.run_dir / STATE).stat()
        except FileNotFoundError:
            return
        written = (status.st_ino, status.st_mtime_ns)
        if written != self._written:
            self._names, self._written = read_names(self.run_dir), written


class Clients:
    """Who calls from a network namespace, as far as it still exists."""

    def __init__(self, host: int, look: Callable[[], Mapping[int, Namespace]]) -> None:
        """Know the node only.

        Args:
            host: cookie of the node's namespace.
            look: finds all namespaces; costs milliseconds.
        """
        self._host, self._look = host, look
        self._found: Mapping[int, Namespace] = {}
        self._looked_s = float("-inf")

    def is_node(self, cookie: int) -> bool:
        return cookie == self._host

    def addresses(self, cookie: int, family: Family) -> tuple[str, ...]:
        """Addresses of a namespace in that family; none when it is gone."""
        if cookie not in self._found and time.monotonic() - self._looked_s >= LOOK_AGAIN_S:
            self._found, self._looked_s = self._look(), time.monotonic()
        known = self._found.get(cookie)
        return tuple(a for a in known.addresses if family_of(a) is family) if known else ()


class View:
    """Turns events into records and lines."""

    def __init__(self, names: Names, clients: Clients) -> None:
        self._names, self._clients = names, clients
        self._widths = [9, 12, 21]
        self._devices: dict[int, str] = {}

    def record(self, event: FlowEvent) -> Record:
        """An event with its names."""
        client, addresses = self._client(event)
        return {
            "time": datetime.fromtimestamp(event.time_s, UTC).isoformat(timespec="microseconds"),
            "event": event.what.value,
            "service": self._names.service(event.frontend),
            "client": client,
            "client_addresses": list(addresses),
            "at": "socket" if event.netns else "packet",
            "frontend": str(event.frontend),
            "backend": at(*event.backend) if event.backend else None,
            "device": self._device(event.device),
            "masquerade": event.masquerade,
            "hairpin": event.hairpin,
            "reason": event.reason,
            "why": reason_in_words(event.reason),
        }

    def line(self, event: FlowEvent, record: Record) -> str:
        """A record for people; columns widen with what they have held."""
        clock = datetime.fromtimestamp(event.time_s).strftime("%H:%M:%S.%f")[:-3]
        cells = [record["event"], record["service"], record["client"]]
        self._widths = [max(a, len(b)) for a, b in zip(self._widths, cells, strict=True)]
        what, service, client = (
            cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True)
        )
        way = record["frontend"] + (f" -> {record['backend']}" if record["backend"] else "")
        notes = [record["why"]] if record["why"] else []
        notes += ["masqueraded"] if event.masquerade else []
        notes += ["to itself"] if event.hairpin else []
        notes += ["at connect"] if event.netns and event.what is Happening.OPENED else []
        tail = f"  ({', '.join(notes)})" if notes else ""
        return f"{clock}  {what}  {service}  {client}  {way}{tail}"

    def _client(self, event: FlowEvent) -> tuple[str, tuple[str, ...]]:
        """The client in words, and its addresses."""
        if not event.netns:
            return at(event.client, event.client_port), (event.client,)
        if self._clients.is_node(event.netns):
            family = family_of(event.frontend.address)
            return "node", self._clients.addresses(event.netns, family)
        found = self._clients.addresses(event.netns, family_of(event.frontend.address))
        return (found[0] if found else f"namespace {event.netns}"), found

    def _device(self, index: int) -> str:
        if index and index not in self._devices:
            try:
                self._devices[index] = socket.if_indextoname(index)
            except OSError:
                return str(index)
        return self._devices.get(index, "")


def at(address: str, port: int) -> str:
    """Address and port as one word."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
