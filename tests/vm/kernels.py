"""The kernels of the vm ring, and where what they need is kept."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from tests.vm.archive import Apt

CACHE = Path(os.environ.get("EBPF_SVC_VM_CACHE", "/var/lib/ebpf-svc-vm"))
DATA = Path(__file__).with_name("kernels.toml")
USER_MODE = "-um"
"""What ends the name of a kernel that runs as a process."""


class NoKernel(Exception):
    """A kernel cannot be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row of kernels.toml, as one of the machines it is tried on."""

    name: str
    suites: tuple[str, ...]
    required: bool

    @property
    def is_user_mode(self) -> bool:
        """Whether it is built to run as a process, not booted in an emulator as Debian built it."""
        return self.name.endswith(USER_MODE)

    @property
    def apt(self) -> Apt:
        """Its suites of the archive."""
        return Apt(CACHE / "apt" / self.name.removesuffix(USER_MODE), self.suites)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted."""

    name: str
    """As `Wanted.name`."""
    release: str
    """What `uname -r` says in it."""
    image: Path
    """A stock one's modules are in ../lib/modules, seen from here."""

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor."""
        return version_of(self.release)


def version_of(text: str) -> tuple[int, int]:
    """Major and minor number of a release, or of a package's name."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def wanted() -> tuple[Wanted, ...]:
    """The kernels of the ring, oldest first, each as the machines it is tried on."""
    rows = tomllib.loads(DATA.read_text())["kernel"]
    return tuple(
        Wanted(row["name"] + machine, tuple(row["suites"]), row["required"])
        for row in rows
        for machine in ("", USER_MODE)
        if not machine or row.get("user_mode")
    )


def find(name: str) -> Wanted:
    """The row of that name.

    Raises:
        NoKernel: there is none.
    """
    for row in wanted():
        if row.name == name:
            return row
    names = ", ".join(row.name for row in wanted())
    raise NoKernel(f"kernels.toml has no kernel {name}: it has {names}")
