"""Logs: a short fixed event, the rest as keys from one list.

`log.info("sync.applied", revision=41, writes=4, took_ms=12)`. JSON lines where a machine reads, a
coloured line where a person does; always on stderr, so that standard output stays free for what
was asked.

A key that is not in `KEYS` raises while a test runs and passes in production: a misspelt key must
not stop an agent.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, TextIO


@contextmanager
def _without_rich() -> Iterator[None]:
    """Hide rich from structlog: half of its import time, for tracebacks an agent does not print."""
    if "rich" in sys.modules:
        yield
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # the import system's word for "is not there"
    try:
        yield
    finally:
        del sys.modules["rich"]


with _without_rich():
    import structlog
    from structlog.typing import FilteringBoundLogger, Processor

_WHOSE = ("event", "level", "timestamp", "module", "exception", "pid", "node", "mode", "version")
_OBJECTS = (
    *("service", "services", "frontend", "frontends", "backend", "backends", "endpoints", "slices"),
    *("object", "field", "source", "path", "family", "problems"),
)
_WORK = (
    *("revision", "changed", "writes", "puts", "deletes", "failed", "repaired", "count", "details"),
    *("reason", "error", "signal", "took_ms", "retry_s"),
)
_KERNEL = (
    *("device", "ifindex", "hook", "program", "programs", "table", "netns", "address", "addresses"),
    *("sockets", "flows", "command", "cgroup"),
)
KEYS = frozenset((*_WHOSE, *_OBJECTS, *_WORK, *_KERNEL))
"""Every key a log line may carry."""


class LogFormat(StrEnum):
    """How a line looks."""

    AUTO = "auto"
    """Console on a terminal, else JSON."""
    JSON = "json"
    CONSOLE = "console"


def check_keys(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Refuse a key nobody declared, but only while a test runs (pytest tells its children too).

    Raises:
        ValueError: a key is not in `KEYS`.
    """
    if "PYTEST_CURRENT_TEST" in os.environ and not event.keys() <= KEYS:
        raise ValueError(
            f"{event.get('event')}: keys not in log.KEYS: {sorted(event.keys() - KEYS)}"
        )
    return event


def configure(
    *, style: LogFormat = LogFormat.AUTO, level: str = "info", stream: TextIO | None = None
) -> None:
    """Set the process's log output; may be called again.

    Args:
        style: JSON lines, or text for a terminal.
        level: the least severe level printed, one of debug, info, warning, error.
        stream: where lines go; None = whatever stderr is when a line is written.
    """
    on_terminal = (stream or sys.stderr).isatty()
    if style is LogFormat.AUTO:
        style = LogFormat.CONSOLE if on_terminal else LogFormat.JSON
    last: list[Processor]
    if style is LogFormat.JSON:
        last = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        last = [
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
            structlog.dev.ConsoleRenderer(colors=on_terminal, pad_event_to=24),
        ]
    structlog.configure(
        processors=[structlog.processors.add_log_level, check_keys, *last],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        # Not bound to today's stderr: whoever captures it, as a test does, closes it afterwards.
        logger_factory=lambda *_: structlog.WriteLogger(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of a module; `name` is what `__name__` says there."""
    logger: FilteringBoundLogger = structlog.get_logger(module=name.removeprefix("ebpf_svc."))
    return logger


if not structlog.is_configured():
    configure()
