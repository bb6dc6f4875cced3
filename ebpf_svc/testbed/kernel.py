"""The system calls the testbed needs and Python 3.11 has not: namespaces and mounts."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
MNT_DETACH = 2
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SHARED = 1 << 20

NETNS_DIR = Path("/run/netns")
_THREAD_NETNS = Path("/proc/thread-self/ns/net")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def mount(source: str, target: Path, kind: str, flags: int = 0) -> None:
    """mount(2); raises OSError naming the target."""
    _check(
        _libc.mount(source.encode(), str(target).encode(), kind.encode(), flags, None), str(target)
    )


def unmount(target: Path) -> None:
    """umount2(2), detached: what still uses the mount keeps it until it ends."""
    _check(_libc.umount2(str(target).encode(), MNT_DETACH), str(target))


def mounts_below(folder: Path) -> tuple[Path, ...]:
    """Mount points below a folder, innermost first."""
    prefix = f"{folder}/"
    with Path("/proc/self/mountinfo").open() as table:
        targets = [line.split()[4] for line in table]
    return tuple(Path(target) for target in reversed(targets) if target.startswith(prefix))


@contextmanager
def entered(netns_fd: int) -> Iterator[None]:
    """Let the calling thread, and the processes it starts, live in a network namespace."""
    home = os.open(_THREAD_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(netns_fd, CLONE_NEWNET), "setns")
        try:
            yield
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "setns")
    finally:
        os.close(home)


def create_netns(name: str) -> None:
    """Make a network namespace that `ip netns` sees under that name; raises FileExistsError."""
    NETNS_DIR.mkdir(exist_ok=True)
    _share_netns_dir()
    path = NETNS_DIR / name
    path.touch(mode=0o444, exist_ok=False)
    home = os.open(_THREAD_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        try:
            mount(str(_THREAD_NETNS), path, "none", MS_BIND)
        finally:
            _check(_libc.setns(home, CLONE_NEWNET), "setns")
    finally:
        os.close(home)


def remove_netns(name: str) -> None:
    """Take a namespace's name away; the kernel frees it when the last process in it ends."""
    path = NETNS_DIR / name
    try:
        unmount(path)
    except OSError:
        # A crash between the two steps of create_netns leaves a plain file.
        if path.is_mount():
            raise
    path.unlink(missing_ok=True)


def _share_netns_dir() -> None:
    """What `ip netns add` does first, so that both may be used side by side."""
    try:
        mount("", NETNS_DIR, "none", MS_SHARED | MS_REC)
    except OSError:
        mount(str(NETNS_DIR), NETNS_DIR, "none", MS_BIND | MS_REC)
        mount("", NETNS_DIR, "none", MS_SHARED | MS_REC)
