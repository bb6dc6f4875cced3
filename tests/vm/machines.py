"""The two machines a kernel is tried on, and how each gets it: once, then from the cache."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.vm import emulated, usermode
from tests.vm.archive import NotInArchive
from tests.vm.kernels import CACHE, USER_MODE, Kernel, NoKernel, Wanted
from tests.vm.setup import Setup


class Machine(Protocol):
    """How to get a kernel, and to boot it."""

    @property
    def BOOT_S(self) -> float:  # noqa: N802  # modules have constants
        """A guest that has not begun by then never will."""

    def cached(self, name: str) -> Kernel | None:
        """The kernel of that name, if it was had before."""

    def fetch(self, row: Wanted) -> Kernel:
        """Get it anew; raises NoKernel, NotInArchive or CalledProcessError."""

    def prepare(self, out: Path) -> Setup:
        """Put what a guest needs into its folder, and say what it has to do first."""

    def argv(self, kernel: Kernel, out: Path, *, cpus: int, memory: str) -> list[str]:
        """The command that boots a guest which was prepared."""


def of(name: str) -> Machine:
    """The machine for a kernel of that name."""
    return usermode if name.endswith(USER_MODE) else emulated


def obtain(row: Wanted, *, update: bool = False) -> Kernel:
    """Give a kernel, fetched or built now when the cache has none.

    Args:
        row: which.
        update: ask the archive for a newer one though the cache has one.

    Raises:
        NoKernel: there is no such kernel for this machine, or it cannot be fetched or built.
    """
    machine = of(row.name)
    with _turn(row.name.removesuffix(USER_MODE)):
        have = machine.cached(row.name)
        if have is not None and not update:
            return have
        try:
            return machine.fetch(row)
        except NotInArchive as error:
            raise NoKernel(str(error)) from error
        except subprocess.CalledProcessError as error:
            words = (error.stderr or error.stdout or "").strip().splitlines()
            complaints = [line for line in words if line.startswith(("E:", "W:"))] or words[-1:]
            raise NoKernel("; ".join(complaints) or str(error)) from error


@contextmanager
def _turn(name: str) -> Iterator[None]:
    """Let one process at a time fetch a kernel."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
