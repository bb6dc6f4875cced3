"""Which dataplane serves: the one asked for, or the first of several that this machine can run.

Preference is `modes.MODES`. Whether one can run is found out by opening it: probing each beforehand
would cost the first choice, nearly always the right one, a second of its start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from ebpf_svc.config import Mode, Settings
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.dataplane.inspect import ShowsParts
from ebpf_svc.errors import DataplaneError, EbpfSvcError, UnsupportedHost
from ebpf_svc.host.lock import DirectoryLock
from ebpf_svc.log import get_logger
from ebpf_svc.modes import MODES, make_dataplane
from ebpf_svc.prepare import mount_bpffs, set_oom_score, set_up_conntrack

LAST_RESORT = "userspace"
"""Relays every byte itself: the fallback when there is no other, whatever was asked for."""

Make = Callable[[str, Settings], Dataplane]

log = get_logger(__name__)


def candidates(settings: Settings, modes: Sequence[str] = MODES) -> tuple[str, ...]:
    """The modes to try, in this order.

    A mode asked for by name is alone, or with `fallback` followed by those of less preference and
    then those of more: kube-proxy's ipvs fell back to iptables, too.
    """
    if settings.mode is Mode.AUTO:
        return tuple(modes)
    named = settings.mode.value
    if not settings.fallback or named not in modes:
        return (named,)
    at = modes.index(named)
    others = [*modes[at + 1 :], *modes[:at]]
    return (named, *sorted(others, key=LAST_RESORT.__eq__))


class Choice(NamedTuple):
    """A dataplane that is open, and those that were preferred."""

    dataplane: Dataplane
    refused: Mapping[str, str]
    """Mode -> why it cannot run here."""


class Site:
    """This node as dataplanes find it: makes them, opens them, holds what they need besides."""

    def __init__(self, settings: Settings, make: Make = make_dataplane) -> None:
        """Bind to the settings; nothing is touched yet."""
        self.settings, self._make = settings, make
        self._bpffs_lock: DirectoryLock | None = None

    def prepare(self, modes: Sequence[str]) -> None:
        """Make the machine ready for any of these modes; needs to be done once.

        Raises:
            UnsupportedHost: another agent uses the BPF file system, or connection tracking cannot
                be set up. (What a single mode lacks, opening it tells.)
        """
        if set(modes) <= {Mode.FAKE.value}:
            return
        set_up_conntrack(self.settings, strict=False)
        if "ebpf" in modes:
            try:
                mount_bpffs(self.settings)
            except UnsupportedHost:
                pass
            else:
                self._claim_bpffs()
        set_oom_score(self.settings.oom_score_adj)

    def make(self, mode: str) -> Dataplane:
        """A dataplane, not open; raises ConfigError when there is no such mode."""
        return self._make(mode, self.settings)

    def open(self, dataplane: Dataplane) -> None:
        """Open it.

        Raises:
            UnsupportedHost: this machine cannot run it, with what is missing.
            DataplaneError, OSError: it does not open.
        """
        if dataplane.name == "ebpf":
            mount_bpffs(self.settings)
            self._claim_bpffs()
        dataplane.open()

    def open_first(self, modes: Sequence[str]) -> Choice:
        """Open the first of these modes that can run here; a warning tells each that cannot.

        Raises:
            UnsupportedHost: none can.
            DataplaneError: the only one does not open.
        """
        refused: dict[str, str] = {}
        for mode in modes:
            dataplane = self.make(mode)
            try:
                self.open(dataplane)
            except (UnsupportedHost, DataplaneError, OSError) as error:
                if len(modes) == 1:
                    raise
                close_quietly(dataplane)
                refused[mode] = str(error)
                log.warning("mode.refused", mode=mode, reason=str(error))
                continue
            return Choice(dataplane, refused)
        raise UnsupportedHost([f"mode {mode}: {reason}" for mode, reason in refused.items()])

    def leftovers(self, but: Sequence[str]) -> list[Dataplane]:
        """Dataplanes of other modes that have something in this kernel, ours by its signs.

        Args:
            but: modes that serve, or are looked after already.
        """
        found = []
        for mode in MODES:
            if mode in but:
                continue
            dataplane = self.make(mode)
            try:
                if not holds_anything(dataplane):
                    continue
                if mode == "ebpf":
                    self._claim_bpffs()
            except (EbpfSvcError, OSError) as error:
                log.info("mode.unknown", mode=mode, error=str(error))
                continue
            found.append(dataplane)
        return found

    def release(self) -> None:
        """Give up what is held; the dataplanes are closed by then."""
        if self._bpffs_lock is not None:
            self._bpffs_lock.release()
            self._bpffs_lock = None

    def _claim_bpffs(self) -> None:
        """Keep other agents from our maps; raises UnsupportedHost when one uses them."""
        if self._bpffs_lock is None:
            # Mounted first: the lock must lie on what every agent will find there.
            self._bpffs_lock = DirectoryLock(self.settings.ebpf.bpffs)


def holds_anything(dataplane: Dataplane) -> bool:
    """Whether this kernel has anything of that dataplane's, open or not.

    Raises:
        DataplaneError, OSError: the kernel does not tell.
    """
    if isinstance(dataplane, ShowsParts):
        return any(True for _ in dataplane.parts())
    return bool(dataplane.read())


def close_quietly(dataplane: Dataplane) -> None:
    """Close one that may be half open."""
    with suppress(DataplaneError, OSError):
        dataplane.close()
