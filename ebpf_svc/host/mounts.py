"""Mounted file systems: which there are, and mounting BPF's where it is missing."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

SOURCE = "ebpf-svc"
"""What our mounts call their source, so that cleanup knows them without any state."""
_MARK = "ebpf-svc-mounted"
"""A symbolic link that says the same: Linux before 5.17 forgets the source of a BPF file system."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mounts."""

    source: str
    target: Path
    kind: str


def mounts() -> list[Mount]:
    """What this mount namespace has mounted, later ones on top of earlier ones."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, target, kind, *_ = line.split(" ")
        found.append(Mount(source, Path(_unescape(target)), kind))
    return found


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def mount_at(path: Path) -> Mount | None:
    """The topmost mount at exactly `path`, or None."""
    resolved = path.resolve()
    for mount in reversed(mounts()):
        if mount.target == resolved:
            return mount
    return None


def is_on_bpffs(path: Path) -> bool:
    """Whether `path`, or what of it exists, lies on a BPF file system."""
    resolved = path.resolve()
    best: Mount | None = None
    for mount in mounts():
        under = resolved == mount.target or mount.target in resolved.parents
        if under and (best is None or len(mount.target.parts) >= len(best.target.parts)):
            best = mount
    return best is not None and best.kind == "bpf"


def ensure_bpffs(path: Path) -> bool:
    """Mount a BPF file system at `path` unless it lies on one; True when mounted now.

    Raises:
        OSError: it cannot be made or mounted.
    """
    if is_on_bpffs(path):
        return False
    path.mkdir(parents=True, exist_ok=True)
    _call("mount", SOURCE.encode(), os.fsencode(path), b"bpf", 0, b"mode=0700", path=path)
    mount = mount_at(path)
    if mount is not None and mount.source != SOURCE:
        (path / _MARK).symlink_to(SOURCE)
    return True


def release_bpffs(path: Path) -> bool:
    """Unmount what `ensure_bpffs` mounted, once nothing of anybody is pinned there."""
    mount = mount_at(path)
    if mount is None or mount.kind != "bpf":
        return False
    mark = path / _MARK
    if mount.source != SOURCE and not mark.is_symlink():
        return False
    others = (entry for entry in path.iterdir() if entry != mark)
    if any(entry.is_dir() or not entry.name.endswith(".debug") for entry in others):
        return False
    mark.unlink(missing_ok=True)
    _call("umount2", os.fsencode(path), 0, path=path)
    return True


def _call(name: str, *arguments: object, path: Path) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
