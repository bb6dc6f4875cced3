"""Debian's archive, through the mirror apt uses here.

apt itself looks up, fetches and verifies, with lists and sources of its own below the cache: the
machine's own apt state is never touched.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class NotInArchive(Exception):
    """What is wanted is not there; the text says why."""


class Apt:
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

    def depends(self, package: str, pattern: str) -> list[str]:
        """What a package depends on and matches a pattern, in order."""
        said = self._apt("apt-cache", "depends", "-i", package)
        return re.findall(rf"^  Depends: ({pattern})$", said, re.MULTILINE)

    def behind(self, meta: str, pattern: str) -> str:
        """The package a metapackage stands for; raises NotInArchive."""
        found = self.depends(meta, pattern)
        if not found:
            raise NotInArchive(f"{meta} is not in the archive")
        return found[0]

    def download(self, packages: Sequence[str], folder: Path) -> list[Path]:
        """Fetch packages, verified against the signed lists."""
        self._apt("apt-get", "download", "-qq", *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))

    def _apt(self, command: str, *words: str, cwd: Path | None = None) -> str:
        options = [word for option in self._options for word in ("-o", option)]
        return run([command, *options, *words], cwd=cwd)


def _sources(suites: Sequence[str]) -> Iterator[str]:
    """Entries of a deb822 file: the archives are those the machine's own apt has."""
    archives = _archives()
    for suite in suites:
        label = "Debian-Security" if suite.endswith("-security") else "Debian"
        if label not in archives:
            said = f"apt has no source of {label} here: add one to /etc/apt/sources.list.d"
            raise NotInArchive(said)
        yield from ("Types: deb", f"URIs: {archives[label]}", f"Suites: {suite}")
        yield "Components: main"
        if KEYRING.exists():  # else apt's trusted keys
            yield f"Signed-By: {KEYRING}"
        yield ""


def _archives() -> dict[str, str]:
    """By label of the archive: where apt gets it from."""
    ask = ["apt-get", "indextargets", "--format", "$(LABEL)|$(REPO_URI)"]
    ask += ["Created-By: Packages"]
    lines = run(ask).splitlines()
    if not any(line.startswith("Debian|") for line in lines):
        run(["apt-get", "update", "-qq"])  # labels are known from the lists only
        lines = run(ask).splitlines()
    return dict(line.split("|") for line in lines)


def run(argv: Sequence[str], cwd: Path | None = None) -> str:
    """What a command prints; raises CalledProcessError with what it complained of."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, cwd=cwd, env=environment
    ).stdout
