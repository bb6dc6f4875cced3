"""Take on changed settings while running: those that can, and say which cannot.

A file that is wrong changes nothing; the agent goes on as it is, and says what is wrong.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from ebpf_svc.config import Settings
from ebpf_svc.config.given import spelt
from ebpf_svc.config.live import changes, take_live
from ebpf_svc.errors import ConfigError, WatchError
from ebpf_svc.log import configure, get_logger
from ebpf_svc.watch.inotify import Changes, FolderWatch

QUIET_S = 0.1
"""Files are read when nothing happened to them for so long: some are written in steps."""
PATIENCE_S = 2.0
"""A file somebody has begun to write is not read before so long."""
RETRY_S = 1.0
"""A folder that went is looked for so often."""
_MOUNTED = "..data"
"""What is replaced when a mounted ConfigMap changes; the files are links through it."""

log = get_logger(__name__)


class Reloader:
    """Reads the settings anew and has the changes applied; thread-safe."""

    def __init__(
        self,
        loaded: Settings,
        in_force: Settings,
        load: Callable[[], Settings],
        apply: Callable[[Settings], None],
    ) -> None:
        """Remember where we stand.

        Args:
            loaded: what `load` gave at the start.
            in_force: the same, with what was found out since, such as the node's name.
            load: reads the settings; raises ConfigError.
            apply: takes the settings now in force.
        """
        self._loaded, self._in_force = loaded, in_force
        self._load, self._apply = load, apply
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Read the settings and take on what changed."""
        with self._lock:
            try:
                new = self._load()
            except ConfigError as error:
                notes = getattr(error, "__notes__", [])
                log.error("config.refused", error=str(error), details=notes)
                return
            live, restart_needed = changes(self._loaded, new)
            if restart_needed:
                log.warning("config.restart-needed", field=[*map(spelt, restart_needed)])
            if not live:
                return
            self._loaded = take_live(self._loaded, new)
            self._in_force = take_live(self._in_force, new)
            configure(style=new.log.format, level=new.log.level)
            log.info("config.changed", field=[*map(spelt, live)])
            self._apply(self._in_force)


class ConfigWatch:
    """Calls back when the content of a file is another, from a thread of its own.

    Folders are watched, not files: editors and config map mounts put another file in the place of
    the old one.
    """

    def __init__(self, paths: Iterable[Path], on_change: Callable[[], None]) -> None:
        """Prepare; nothing is watched yet."""
        self._paths, self._on_change = tuple(path.absolute() for path in paths), on_change
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="config", daemon=True)

    def start(self) -> None:
        """Begin; what changes from here on is noticed."""
        self._contents = self._read()
        if self._paths:
            self._thread.start()

    def stop(self) -> None:
        """End; no call is under way afterwards, unless it is this one."""
        os.close(self._stop_write)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        os.close(self._stop_read)

    def _read(self) -> list[bytes | None]:
        return [_content(path) for path in self._paths]

    def _run(self) -> None:
        while self._follow():
            pass

    def _follow(self) -> bool:
        """Watch until a folder is lost; returns False when stopping."""
        with ExitStack() as stack:
            watches: list[FolderWatch] = []
            try:
                for folder in {path.parent for path in self._paths}:
                    watches.append(FolderWatch(folder))
                    stack.callback(watches[-1].close)
            except WatchError:
                # A file that is there by now may be half a file: it is read once watched.
                if not any(path.exists() for path in self._paths):
                    self._compare()
                return not self._stopping(RETRY_S)
            names = {_MOUNTED, *(path.name for path in self._paths)}
            seen, fds = Changes(), [self._stop_read, *(each.fileno() for each in watches)]
            # What happened before there was a watch is found by a look at the content.
            due_s: float | None = time.monotonic() + QUIET_S
            while not seen.lost:
                pause_s = None if due_s is None else max(0.0, due_s - time.monotonic())
                ready, _, _ = select.select(fds, [], [], pause_s)
                if self._stop_read in ready:
                    return False
                seen, now_s = Changes(), time.monotonic()
                for watch in watches:
                    watch.read(seen)
                busy = set().union(*(watch.busy(now_s, PATIENCE_S) for watch in watches))
                # Others may write beside them all the time, such as our own log.
                if (seen.names | busy) & names:
                    due_s = now_s + QUIET_S
                elif due_s is not None and now_s >= due_s:
                    self._compare()
                    due_s = None
            self._compare()
        return not self._stopping(QUIET_S)

    def _stopping(self, timeout_s: float) -> bool:
        return bool(select.select([self._stop_read], [], [], timeout_s)[0])

    def _compare(self) -> None:
        contents = self._read()
        if contents != self._contents:
            self._contents = contents
            self._on_change()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
