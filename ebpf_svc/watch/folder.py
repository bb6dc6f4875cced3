"""The files of a manifest folder and what each held when it was last readable.

Reads plain files `*.yaml`, `*.yml` and `*.json`, in the order of their names; hidden files and
subfolders are not looked at, as with `kubectl apply -f`. Symbolic links are followed, so that a
mounted ConfigMap works.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc.errors import InvalidObject, WatchError
from ebpf_svc.model.snapshot import Problem
from ebpf_svc.watch.manifests import NOTHING, Contents, Parsed, read

SUFFIXES = (".yaml", ".yml", ".json")
GRACE_S = 1.0
"""A file may be unreadable for so long before anyone hears of it: somebody is still writing it."""
RETRY_S = 0.1
"""Pause before an unreadable file is read again."""

_Signature = tuple[int, ...]


@dataclass(slots=True)
class _File:
    signature: _Signature = ()
    contents: Contents = NOTHING
    """The last good ones."""
    fault: str = ""
    """Why the file as it is now cannot be read; empty = it can."""
    failing_since_s: float = 0.0
    ever_good: bool = False

    def retried(self, now_s: float) -> bool:
        return bool(self.fault) and now_s - self.failing_since_s < GRACE_S + 2 * RETRY_S


class Folder:
    """A folder of manifests, read again where it changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, _File] = {}

    @property
    def complete(self) -> bool:
        """Nothing is missing: every file could be read at least once since it came."""
        return all(file.ever_good for file in self._files.values())

    def retrying(self, now_s: float) -> bool:
        """Some file became unreadable so lately that looking again soon may help."""
        return any(file.retried(now_s) for file in self._files.values())

    def refresh(
        self, now_s: float, *, touched: Collection[str] = (), busy: Collection[str] = ()
    ) -> bool:
        """Read what is new; whether contents may have changed.

        Args:
            now_s: monotonic time.
            touched: files known to have changed, whatever their times and sizes say.
            busy: files that are being written: what they held before stays in force.

        Raises:
            WatchError: the folder itself cannot be read; everything stays as it was.
        """
        found = self._scan()
        changed = False
        for name in self._files.keys() - found.keys():
            del self._files[name]
            changed = True
        for name, signature in found.items():
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = _File()
            if name in busy:
                continue
            if signature != file.signature or name in touched or file.retried(now_s):
                changed |= self._read(name, file, now_s)
                file.signature = signature
        return changed

    def files(self) -> Iterator[tuple[str, list[Parsed]]]:
        """Name and contents of each file, in the order of names."""
        for name, file in sorted(self._files.items()):
            yield name, file.contents.parsed

    def problems(self, now_s: float) -> tuple[Problem, ...]:
        """Files that have been unreadable for longer than somebody may need to write them."""
        return tuple(
            Problem(name, "", "", file.fault)
            for name, file in sorted(self._files.items())
            if file.fault and now_s - file.failing_since_s >= GRACE_S
        )

    def _scan(self) -> dict[str, _Signature]:
        found: dict[str, _Signature] = {}
        try:
            names = sorted(os.listdir(self.path))  # noqa: PTH208 # names are wanted, not paths
        except OSError as error:
            raise WatchError(f"{self.path}: {error.strerror}") from error
        for name in names:
            if name.startswith(".") or not name.endswith(SUFFIXES):
                continue
            try:
                status = (self.path / name).stat()
            except OSError:
                # Gone since it was listed, or a link whose target is not there (yet).
                continue
            if stat.S_ISREG(status.st_mode):
                found[name] = (
                    *(status.st_dev, status.st_ino, status.st_size),
                    *(status.st_mtime_ns, status.st_ctime_ns),
                )
        return found

    def _read(self, name: str, file: _File, now_s: float) -> bool:
        """Read one file; whether it could be read."""
        fault = ""
        try:
            file.contents = read(name, (self.path / name).read_bytes(), file.contents)
        except InvalidObject as error:
            fault = error.message
        except OSError as error:
            fault = error.strerror or str(error)
        if fault and not file.fault:
            file.failing_since_s = now_s
        file.fault = fault
        file.ever_good |= not fault
        return not fault
