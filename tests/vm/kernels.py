"""Where the kernels of the vm ring come from: Debian's archive, through the mirror apt uses here.

apt itself looks up, fetches and verifies, with lists and sources of its own below the cache: the
machine's own apt state is never touched. What was once unpacked is used until asked to update.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CACHE = Path(os.environ.get("EBPF_SVC_VM_CACHE", "/var/lib/ebpf-svc-vm"))
DATA = Path(__file__).with_name("kernels.toml")


class NoKernel(Exception):
    """A kernel cannot be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A row of kernels.toml."""

    name: str
    suites: tuple[str, ...]
    required: bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted."""

    name: str
    """As in kernels.toml."""
    release: str
    """What `uname -r` says in it."""
    image: Path
    """Its modules are in ../lib/modules, seen from here."""

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor."""
        major, minor = re.findall(r"\d+", self.release)[:2]
        return int(major), int(minor)


def wanted() -> tuple[Wanted, ...]:
    """The kernels of the ring, oldest first."""
    rows = tomllib.loads(DATA.read_text())["kernel"]
    return tuple(Wanted(row["name"], tuple(row["suites"]), row["required"]) for row in rows)


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


def obtain(row: Wanted, *, update: bool = False) -> Kernel:
    """Give a kernel, fetched now when the cache has none.

    Args:
        row: which.
        update: ask the archive for a newer one though the cache has one.

    Raises:
        NoKernel: there is no such kernel for this machine, or it cannot be fetched.
    """
    with _turn(row.name):
        have = _cached(row.name)
        if have is not None and not update:
            return have
        try:
            return _fetch(row)
        except subprocess.CalledProcessError as error:
            words = (error.stderr or error.stdout or "").strip().splitlines()
            complaints = [line for line in words if line.startswith(("E:", "W:"))] or words[-1:]
            raise NoKernel("; ".join(complaints) or str(error)) from error


def _cached(name: str) -> Kernel | None:
    for image in sorted((CACHE / "kernels" / name).glob("boot/vmlinuz-*")):
        return Kernel(name, image.name.removeprefix("vmlinuz-"), image)
    return None


def _fetch(row: Wanted) -> Kernel:
    architecture = _run(["dpkg", "--print-architecture"]).strip()
    if architecture != "amd64":
        raise NoKernel(f"the ring emulates amd64 machines only, and this one is {architecture}")
    apt = _Apt(CACHE / "apt" / row.name, row.suites)
    apt.update()
    packages = apt.parts_of(f"linux-image-{architecture}")
    (CACHE / "kernels").mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".unpack-", dir=CACHE / "kernels"))
    try:
        tree = work / "tree"
        for package in apt.download(packages, work):
            _run(["dpkg", "-x", str(package), str(tree)])
        if not (tree / "lib").exists():  # since 13, Debian's packages name the merged /usr
            (tree / "lib").symlink_to("usr/lib")
        for image in tree.glob("usr/lib/modules/*/vmlinuz"):  # since 14
            (tree / "boot").mkdir(exist_ok=True)
            image.rename(tree / "boot" / f"vmlinuz-{image.parent.name}")
        (image,) = tree.glob("boot/vmlinuz-*")
        release = image.name.removeprefix("vmlinuz-")
        _run(["depmod", "-b", str(tree), release])
        target = CACHE / "kernels" / row.name
        if target.exists():
            target.rename(work / "old")
        tree.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Kernel(row.name, release, CACHE / "kernels" / row.name / "boot" / image.name)


class _Apt:
    """apt with sources, lists and caches of its own."""

    def __init__(self, root: Path, suites: Sequence[str]) -> None:
        self._root = root
        for folder in ("lists/partial", "cache/archives/partial", "state"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        (root / "debian.sources").write_text("\n".join(_sources(suites)))
        self._options = [
            f"Dir::Etc::sourcelist={root}/debian.sources",
            "Dir::Etc::sourceparts=/dev/null",
            "Dir::Etc::preferences=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null",
            f"Dir::State={root}/state",
            f"Dir::State::lists={root}/lists",
            f"Dir::State::status={root}/status",
            f"Dir::Cache={root}/cache",
            "APT::Sandbox::User=root",
            "APT::Default-Release=",
            "Acquire::Languages=none",
            "Acquire::Retries=3",
        ]

    def update(self) -> None:
        """Fetch the lists; raises CalledProcessError when any cannot be had."""
        self._apt("apt-get", "update", "-qq", "--error-on=any")

    def parts_of(self, meta: str) -> list[str]:
        """The packages a metapackage stands for: since 14, an image's parts have their own."""
        images = self._depends(meta, r"linux-image-\d\S*")
        if not images:
            raise NoKernel(f"{meta} is not in the archive")
        return [images[0], *self._depends(images[0], r"linux-(?:binary|modules)-\d\S*")]

    def _depends(self, package: str, pattern: str) -> list[str]:
        said = self._apt("apt-cache", "depends", "-i", package)
        return re.findall(rf"^  Depends: ({pattern})$", said, re.MULTILINE)

    def download(self, packages: Sequence[str], folder: Path) -> list[Path]:
        """Fetch packages, verified against the signed lists."""
        self._apt("apt-get", "download", "-qq", *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def _apt(self, command: str, *words: str, cwd: Path | None = None) -> str:
        options = [word for option in self._options for word in ("-o", option)]
        return _run([command, *options, *words], cwd=cwd)


def _sources(suites: Sequence[str]) -> Iterator[str]:
    """Entries of a deb822 file: the archives are those the machine's own apt has."""
    archives = _archives()
    for suite in suites:
        label = "Debian-Security" if suite.endswith("-security") else "Debian"
        if label not in archives:
            raise NoKernel(f"apt has no source of {label} here: add one to /etc/apt/sources.list.d")
        yield from ("Types: deb", f"URIs: {archives[label]}", f"Suites: {suite}")
        yield "Components: main"
        if KEYRING.exists():  # else apt's trusted keys
            yield f"Signed-By: {KEYRING}"
        yield ""


def _archives() -> dict[str, str]:
    """By label of the archive: where apt gets it from."""
    ask = ["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)"]
    ask += ["Created-By: Packages"]
    lines = _run(ask).splitlines()
    if not any(line.startswith("Debian|") for line in lines):
        _run(["apt-get", "update", "-qq"])  # labels are known from the lists only
        lines = _run(ask).splitlines()
    return dict(line.split("|") for line in lines)


def _run(argv: Sequence[str], cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, cwd=cwd, env=environment
    ).stdout


@contextmanager
def _turn(name: str) -> Iterator[None]:
    """Let one process at a time fetch a kernel."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
