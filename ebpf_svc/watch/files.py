"""The source of standalone mode: a folder of manifests, followed as it changes."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ebpf_svc.config import Settings
from ebpf_svc.errors import ConfigError, WatchError
from ebpf_svc.log import get_logger
from ebpf_svc.model.service import ServiceName
from ebpf_svc.model.snapshot import Problem
from ebpf_svc.watch import state
from ebpf_svc.watch.allocate import Allocator, Holding
from ebpf_svc.watch.controlplane import ControlPlane
from ebpf_svc.watch.folder import RETRY_S, Folder
from ebpf_svc.watch.inotify import Changes, FolderWatch
from ebpf_svc.watch.store import Store

log = get_logger(__name__)

QUIET_S = 0.005
"""Changes this close together are read together: an editor's write, rename and chmod, say."""
PATIENCE_S = 0.05
"""No change waits longer than this for quiet."""
LOOK_S = 2.0
"""How often the folder is looked at unasked: inotify does not see what a link's target does."""
BUSY_S = 1.0
"""A file that was begun and not closed is read when nothing was written to it for so long."""


class FileSource:
    """Keeps a Store in line with a folder of manifests, from a thread of its own."""

    def __init__(self, settings: Settings, store: Store) -> None:
        """Prepare; reads nothing but the record of allocations.

        Raises:
            ConfigError: the folder, or a range to allocate from, makes no sense.
        """
        if settings.manifests is None or not settings.manifests.is_dir():
            raise ConfigError("manifests", got=str(settings.manifests), expected="a folder")
        self._store = store
        self._path = settings.manifests
        self._folder = Folder(self._path)
        self._state_path = settings.state_dir / state.FILE_NAME
        self._allocator = Allocator(settings.service_cidrs, settings.node_port_range)
        self._allocator.holdings = _load_state(self._state_path)
        self._saved = self._allocator.holdings
        self._control = ControlPlane(store.node_name, self._allocator)
        self._unreadable: tuple[Problem, ...] = ()
        self._reported: frozenset[Problem] = frozenset()
        self._watch: FolderWatch | None = None
        self._watched_inode: tuple[int, int] | None = None
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="manifests", daemon=True)

    def start(self) -> None:
        """Load the folder into the store, then follow it.

        Raises:
            WatchError: the folder cannot be read.
        """
        # Watched before it is read, so that nothing falls between the two.
        self._rewatch()
        self._folder.refresh(time.monotonic())
        self._publish()
        ignored = sum(each.ignored_count for _, found in self._folder.files() for each in found)
        log.debug("manifests.other-kinds", count=ignored)
        self._thread.start()

    def stop(self) -> None:
        """Stop following; the store keeps what it has."""
        os.write(self._stop_write, b"x")
        if self._thread.is_alive():
            self._thread.join()
        if self._watch is not None:
            self._watch.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _run(self) -> None:
        look_at_s = time.monotonic() + LOOK_S
        while (changes := self._wait(look_at_s)) is not None:
            now_s = time.monotonic()
            due = now_s >= look_at_s
            if due:
                look_at_s = now_s + LOOK_S
            try:
                if changes.lost or (due and self._watched_inode != _inode(self._path)):
                    self._rewatch()
                elif not (due or changes.any or self._folder.retrying(now_s)):
                    continue
                busy = self._watch.busy(now_s, BUSY_S) if self._watch else ()
                changed = self._folder.refresh(now_s, touched=changes.touched, busy=busy)
            except WatchError as error:
                # What was known stays in force; the next look may find the folder back.
                log.warning("manifests.unreadable", error=str(error), retry_s=LOOK_S)
                continue
            if changed or self._folder.problems(now_s) != self._unreadable:
                self._publish()

    def _wait(self, until_s: float) -> Changes | None:
        """Wait for changes, and then for quiet; None = stop."""
        now_s = time.monotonic()
        timeout_s = RETRY_S if self._folder.retrying(now_s) else max(0.0, until_s - now_s)
        changes = Changes()
        poll = select.poll()
        poll.register(self._stop_read, select.POLLIN)
        if self._watch is not None:
            poll.register(self._watch.fileno(), select.POLLIN)
        patience_ends_s = 0.0
        while ready := dict(poll.poll(timeout_s * 1000)):
            if self._stop_read in ready:
                return None
            if self._watch is not None:
                self._watch.read(changes)
            now_s = time.monotonic()
            patience_ends_s = patience_ends_s or now_s + PATIENCE_S
            timeout_s = min(QUIET_S, patience_ends_s - now_s)
            if timeout_s <= 0:
                break
        return changes

    def _rewatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        inode = _inode(self._path)
        self._watch = FolderWatch(self._path)
        self._watched_inode = inode

    def _publish(self) -> None:
        started_s = time.monotonic()
        result = self._control.reconcile(self._folder.files(), complete=self._folder.complete)
        self._save()
        self._unreadable = self._folder.problems(started_s)
        problems = (*self._unreadable, *result.problems)
        self._store.replace(
            services=result.services, slices=result.slices, problems=problems, node=result.node
        )
        for problem in problems:
            if problem not in self._reported:
                log.warning(
                    "manifests.problem",
                    source=problem.source,
                    object=problem.object_ref,
                    field=problem.field,
                    reason=problem.message,
                )
        self._reported = frozenset(problems)
        log.info(
            "manifests.read",
            services=len(result.services),
            problems=len(problems),
            took_ms=round((time.monotonic() - started_s) * 1000, 1),
        )

    def _save(self) -> None:
        """Write down new allocations before anyone acts on them."""
        holdings = self._allocator.holdings
        if holdings == self._saved:
            return
        try:
            state.save(self._state_path, holdings)
        except WatchError as error:
            # Serving goes on; the choice is a function of names, so a restart mostly repeats it.
            log.error("manifests.allocations-not-saved", error=str(error))
            return
        self._saved = holdings


def _load_state(path: Path) -> Mapping[ServiceName, Holding]:
    try:
        return state.load(path)
    except WatchError as error:
        aside = path.with_suffix(".damaged")
        log.error("manifests.allocations-unreadable", error=str(error), path=str(aside))
        with suppress(OSError):
            path.replace(aside)
        return {}


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
