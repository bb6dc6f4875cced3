"""Wait for changes in one folder, without polling and without reading half a file.

The kernel says when a writer closes a file; between its first write and that moment the file is
`busy`, and what stands in it is nobody's business. (Wrappers that report every write the same way
cannot tell the two apart, which is why this speaks to inotify itself.)
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from ebpf_svc.errors import WatchError

_IN_MODIFY = 0x2
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_UNMOUNT = 0x2000
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ONLYDIR = 0x1000000

_CONTENT = _IN_MODIFY | _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE
_GONE = _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT | _IN_IGNORED
_EVENT = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Changes:
    """What happened in the folder since the last call."""

    touched: set[str] = field(default_factory=set)
    """Files written and closed, or moved in: their contents are new, whatever stat says."""
    names: set[str] = field(default_factory=set, compare=False)
    """Whatever appeared, went, or was written and closed."""
    any: bool = False
    """Something happened that a look at the folder will show."""
    lost: bool = False
    """The folder is gone or is another one now: watch again."""


class FolderWatch:
    """An inotify watch on a folder. Close it when done."""

    def __init__(self, folder: Path) -> None:
        """Start watching: whatever changes from here on is reported.

        Raises:
            WatchError: there is no such folder, or the kernel has no watch left.
        """
        self._fd: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise WatchError(f"inotify: {os.strerror(ctypes.get_errno())}")
        mask = _CONTENT | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ONLYDIR
        if _libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
            reason = os.strerror(ctypes.get_errno())
            self.close()
            raise WatchError(f"{folder}: {reason}")
        self._busy: dict[str, float] = {}

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def busy(self, now_s: float, patience_s: float) -> set[str]:
        """Files somebody is writing, but for those nothing was written to for `patience_s`."""
        return {name for name, last_s in self._busy.items() if now_s - last_s < patience_s}

    def read(self, changes: Changes) -> None:
        """Take the events that are there, without waiting."""
        while True:
            try:
                buffer = os.read(self._fd, 65536)
            except BlockingIOError:
                return
            offset = 0
            while offset < len(buffer):
                _, mask, _, length = _EVENT.unpack_from(buffer, offset)
                offset += _EVENT.size
                name = os.fsdecode(buffer[offset : offset + length].rstrip(b"\0"))
                offset += length
                self._take(name, mask, changes)

    def _take(self, name: str, mask: int, changes: Changes) -> None:
        if mask & _IN_MODIFY:
            self._busy[name] = time.monotonic()
            return
        self._busy.pop(name, None)
        changes.names.add(name)
        if mask & (_IN_CLOSE_WRITE | _IN_MOVED_TO):
            changes.touched.add(name)
        changes.lost |= bool(mask & _GONE)
        # An overflow lost events, maybe the closing of a busy file.
        if mask & _IN_Q_OVERFLOW:
            changes.touched |= self._busy.keys()
            self._busy.clear()
        changes.any = True
