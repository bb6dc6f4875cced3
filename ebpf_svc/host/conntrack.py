"""Set the kernel's connection tracking up for masquerading: limits and timeouts (S1-S6).

Every setting is written only where it differs. The size of the table is one for all network
namespaces, and only the initial one may set it: elsewhere, as in a testbed, it is left alone.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ebpf_svc.config import ConntrackSettings
from ebpf_svc.errors import CommandError
from ebpf_svc.host import sysctl
from ebpf_svc.host.command import run

MAX = "net/netfilter/nf_conntrack_max"
HASHSIZE = Path("/sys/module/nf_conntrack/parameters/hashsize")
ENTRIES_PER_BUCKET = 4
HIGHEST_COMPUTED = 1_048_576
"""More than so many are never asked for because of the number of CPUs (S1)."""


class Failure(NamedTuple):
    """A setting that could not be written."""

    setting: str
    reason: str
    mend: str
    fatal: bool
    """The agent must not start without it (S10)."""

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason} ({self.mend})"


def wanted_max(settings: ConntrackSettings, cpu_count: int) -> int | None:
    """How many entries there shall be; None = leave the kernel's number alone (S1)."""
    if settings.max_per_core <= 0:
        return None
    return max(settings.min, min(settings.max_per_core * cpu_count, HIGHEST_COMPUTED))


def set_up(settings: ConntrackSettings) -> tuple[Failure, ...]:
    """Write what the settings ask for; returns what could not be written."""
    _load_module()
    failures: list[Failure] = []
    # Those we may run on, as a cpuset leaves them (Q6).
    limit = wanted_max(settings, len(os.sched_getaffinity(0)))
    if limit is not None and owns_limits():
        failures += _write(MAX, limit, "conntrack.maxPerCore: 0 leaves it alone")
        failures += _raise_hashsize(limit // ENTRIES_PER_BUCKET)
    for name, field, value in _timeouts(settings):
        failures += _write(name, value, f"conntrack.{field}: 0 leaves it alone")
    if settings.tcp_be_liberal:
        mend = "conntrack.tcpBeLiberal: false leaves it alone"
        failures += _write("net/netfilter/nf_conntrack_tcp_be_liberal", 1, mend)
    return tuple(failures)


def owns_limits() -> bool:
    """Whether this network namespace is the initial one, which sets limits for all.

    The kernel says so by showing the others a read-only file.
    """
    try:
        return bool((sysctl.ROOT / MAX).stat().st_mode & stat.S_IWUSR)
    except FileNotFoundError:
        # Without connection tracking nobody knows; writing will tell.
        return True


def _timeouts(settings: ConntrackSettings) -> Iterator[tuple[str, str, int]]:
    for name, field, seconds in (
        (
            "tcp_timeout_established",
            "tcpEstablishedTimeout",
            settings.tcp_established_timeout_s,
        ),
        ("tcp_timeout_close_wait", "tcpCloseWaitTimeout", settings.tcp_close_wait_timeout_s),
        ("udp_timeout", "udpTimeout", settings.udp_timeout_s),
        ("udp_timeout_stream", "udpStreamTimeout", settings.udp_stream_timeout_s),
    ):
        if seconds > 0:
            # The kernel counts whole seconds; 0 of them would end every connection.
            yield f"net/netfilter/nf_conntrack_{name}", field, max(int(seconds), 1)


def _load_module() -> None:
    """Load connection tracking; where it cannot be, the settings are missing, and that is told."""
    if not (sysctl.ROOT / MAX).exists() and shutil.which("modprobe"):
        with suppress(CommandError):
            run(["modprobe", "nf_conntrack"])


def _write(name: str, value: int, mend: str) -> Iterator[Failure]:
    try:
        sysctl.write(name, str(value))
    except OSError as error:
        yield Failure(f"{name} = {value}", error.strerror or str(error), mend, owns_limits())


def _raise_hashsize(buckets: int) -> Iterator[Failure]:
    """Give the table as many buckets, unless it has more (S2); slower, not wrong, without."""
    try:
        if int(HASHSIZE.read_text()) < buckets:
            HASHSIZE.write_text(str(buckets))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        mend = f"set it on the node: echo {buckets} > {HASHSIZE}"
        yield Failure(f"{HASHSIZE} = {buckets}", reason, mend, fatal=False)
