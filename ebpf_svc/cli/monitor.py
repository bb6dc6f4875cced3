"""`ebpf-svc monitor`: what happens to flows of services, as it happens."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import click

from ebpf_svc.cli.settings import PLACE, settings_from, settings_options
from ebpf_svc.config import Settings
from ebpf_svc.dataplane.inspect import EventStream, FlowEvent, Happening, ShowsEvents
from ebpf_svc.errors import ConfigError, UnsupportedHost
from ebpf_svc.migrate.agent import settings_of_agent
from ebpf_svc.model.net import canonical_address
from ebpf_svc.modes import make_dataplane
from ebpf_svc.monitor.view import Clients, Names, View, Wanted
from ebpf_svc.status import STATUS, read_json

POLL_S = 0.2
"""How long an end may be waited for, and at most the time until lost events are told."""
CONNTRACK_MODES = ("nftables", "ipvs", "iptables")
COLOURS = {
    Happening.OPENED: "green",
    Happening.ENDING: "bright_black",
    Happening.CLOSED: "bright_black",
    Happening.REFUSED: "yellow",
    Happening.DROPPED: "red",
}
_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@click.command(name="monitor")
@click.option("--service", metavar="NS/NAME", default="", help="Only of this service [:port].")
@click.option("--client", metavar="ADDRESS", default="", help="Only of this client.")
@click.option("--drops", is_flag=True, help="Only what is refused or dropped.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--count", type=click.IntRange(1), help="End after so many events.")
@click.option("--for", "duration", metavar="10s", help="End after that time: 10s, 5m, 1h.")
@settings_options(*PLACE)
def command(
    *,
    service: str,
    client: str,
    drops: bool,
    as_json: bool,
    count: int | None,
    duration: str | None,
    **options: Any,
) -> None:
    """Show what opens, ends, is refused and is dropped, while it happens.

    Listens beside a running agent, or without one. Packets of established flows are not told, and
    pay nothing for being watched; while nobody listens, nothing does. One may listen at a time.

    \b
    Events:
      opened    a client got an endpoint, by packet or at connect()
      ending    one side has closed a TCP connection
      closed    both have, or one has reset it
      refused   the service has no endpoint
      dropped   not forwarded, with the reason

    \b
    Example:
      ebpf-svc monitor --service shop/web
      ebpf-svc monitor --drops --json --for 1m | jq -r .why | sort | uniq -c

    Next: `ebpf-svc explain CLIENT FRONTEND` says why a flow goes where it goes.
    """
    seconds = _seconds(duration)
    wanted = Wanted(service, _address(client), drops)
    settings = settings_of_agent(settings_from(options))
    view = View(Names(settings.run_dir), _clients(settings))
    shown = _Shown(view, wanted, as_json=as_json)
    with closing(_stream(settings)) as stream:
        asked_to_end = _follow_signals()
        click.echo("Listening; end with Ctrl-C.", err=True)
        for event in _events(stream, seconds, asked_to_end):
            shown.take(event, stream.lost)
            if shown.count == count:
                break


def _follow_signals() -> threading.Event:
    """Set once the user wants it to end; what happened before is then still told."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    return asked


def _events(
    stream: EventStream, seconds: float | None, asked_to_end: threading.Event
) -> Iterator[FlowEvent | None]:
    """Events until time is over or it is to end; None after each look."""
    deadline = None if seconds is None else time.monotonic() + seconds
    is_last = False
    while not is_last:
        left_s = POLL_S if deadline is None else deadline - time.monotonic()
        is_last = left_s <= 0 or asked_to_end.is_set()
        yield from stream.wait(0 if is_last else min(POLL_S, left_s))
        yield None


class _Shown:
    """What has been printed."""

    def __init__(self, view: View, wanted: Wanted, *, as_json: bool) -> None:
        self._view, self._wanted, self._as_json = view, wanted, as_json
        self._lost = 0
        self.count = 0
        """Events printed."""

    def take(self, event: FlowEvent | None, lost: int) -> None:
        """Print an event if it is wanted; before it, how many were lost since the last."""
        if lost > self._lost:
            self._say_lost(lost - self._lost)
            self._lost = lost
        if event is None:
            return
        record = self._view.record(event)
        if not self._wanted.admits(event, record):
            return
        if self._as_json:
            click.echo(json.dumps(record))
        else:
            click.secho(self._view.line(event, record), fg=COLOURS[event.what])
        self.count += 1

    def _say_lost(self, count: int) -> None:
        if self._as_json:
            click.echo(json.dumps({"event": "lost", "count": count}))
        else:
            click.secho(f"{count} events lost: more happened than could be read", fg="red")


def _stream(settings: Settings) -> EventStream:
    """What the dataplane that serves here tells.

    Raises:
        UnsupportedHost: it tells nothing; says what to use instead.
    """
    status = read_json(settings.run_dir / STATUS) or {}
    mode = status.get("mode", "ebpf")
    dataplane = make_dataplane(mode, settings)
    if isinstance(dataplane, ShowsEvents):
        return dataplane.events()
    if mode in CONNTRACK_MODES:
        from ebpf_svc.dataplane.netfilter.events import ConntrackEvents  # noqa: PLC0415

        return ConntrackEvents()
    raise UnsupportedHost([f"mode {mode} tells nothing while it happens: see ss -tunp"])


def _clients(settings: Settings) -> Clients:
    from ebpf_svc.host import callers, cgroup  # noqa: PLC0415  # only who monitors pays for it

    root = settings.ebpf.cgroup_root or cgroup.find_root()
    return Clients(callers.own_cookie(), lambda: callers.namespaces(root) if root else {})


def _address(text: str) -> str:
    try:
        return canonical_address(text) if text else ""
    except ValueError as error:
        raise ConfigError("--client", got=text, expected="an IP address") from error


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|)", text.strip())
    if match is None:
        raise ConfigError("--for", got=text, expected="a time such as 10s, 5m or 1h")
    return float(match[1]) * _UNITS_S[match[2]]
