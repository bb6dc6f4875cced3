"""What compiling takes: bcc, an interpreter that sees it, and a kernel header tree.

The programs use the UAPI only, so any recent tree serves when the running kernel has none of its
own. Never writes below /lib/modules: what BCC cannot find by itself is merged or unpacked into the
cache directory and named to it through the environment. Imports no bcc.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEND_HEADERS = (
    "apt-get install linux-headers-$(uname -r) (or linux-headers-$(dpkg --print-architecture))"
)
MEND_BCC = "apt-get install python3-bpfcc"
SYSTEM_PYTHON = "/usr/bin/python3"
"""The interpreter distributions build bcc for."""
_SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")

_ARCHES = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv", "s390x": "s390"}


def bcc_version() -> str | None:
    """The version of the bcc a compile would use, without importing it; None = no bcc."""
    spec = importlib.util.find_spec("bcc")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    for place in [*places, _SYSTEM_PACKAGES / "bcc"]:
        # PyPI has another package of this name, which has no libbcc.
        if (place / "libbcc.py").is_file() and (place / "version.py").is_file():
            found = re.search(r"['\"]([\d.]+[^'\"]*)['\"]", (place / "version.py").read_text())
            if found:
                return found[1]
    return None


def compiler_python() -> str:
    """The interpreter that sees bcc: ours, else the distribution's."""
    return sys.executable if importlib.util.find_spec("bcc") else SYSTEM_PYTHON


@dataclass(frozen=True, slots=True)
class Headers:
    """Where headers were found, before anything is prepared."""

    origin: str
    """In words, for reports."""
    trees: tuple[Path, ...] = ()
    """Trees to merge; the first wins. Empty: BCC finds them by itself."""
    archive: Path | None = None
    """A kheaders archive to unpack."""


def find_headers(root: Path = Path("/"), release: str | None = None) -> Headers | None:
    """Look for headers: the running kernel's, its built-in archive, then any installed tree.

    Args:
        root: where to look, for tests.
        release: the kernel's release; None = the running one's.
    """
    release = release or platform.release()
    own = root / "lib/modules" / release / "build"
    if (own / "include").is_dir():
        return Headers(origin=str(own))
    archive = root / "sys/kernel/kheaders.tar.xz"
    if archive.exists():
        return Headers(origin=str(archive), archive=archive)
    # An image of ours brings a tree in the second place: the first is the node's, mounted.
    for sources in (root / "usr/src", root / "usr/local/src"):
        built = [
            tree
            for tree in sources.glob("linux-headers-*")
            if (tree / "include/generated/autoconf.h").is_file()
        ]
        if built:
            return _split_tree(sources, max(built, key=lambda tree: _version(tree.name)))
    return None


def _split_tree(sources: Path, newest: Path) -> Headers:
    """A tree with the part that its distribution keeps apart."""
    # Debian splits a tree in -amd64 and -common, Ubuntu in -generic and a plain version.
    stem = re.sub(r"(?<=\d)-[a-z][\w-]*$", "", newest.name)
    commons = [sources / f"{stem}-common", sources / stem]
    trees = (newest, *(tree for tree in commons if tree.is_dir() and tree != newest))
    return Headers(origin=str(newest), trees=trees)


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def environment(headers: Headers, cache_dir: Path) -> dict[str, str]:
    """Prepare the tree in `cache_dir` if it takes preparing; what to add to BCC's environment."""
    if (archive := headers.archive) is not None:
        tree = cache_dir / f"kheaders-{platform.release()}"
        if not tree.is_dir():
            _build(tree, lambda target: _unpack(archive, target))
        return {"BCC_KERNEL_SOURCE": str(tree)}
    if headers.trees:
        tree = cache_dir / f"headers-{headers.trees[0].name.removeprefix('linux-headers-')}"
        if not tree.is_dir():
            _build(tree, lambda target: _merge_trees(headers.trees, target))
        return {"BCC_KERNEL_SOURCE": str(tree)}
    return {}


def _build(tree: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary directory and move it to `tree`, so that nobody sees half a tree."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".headers-", dir=tree.parent))
    try:
        fill(work)
        work.chmod(0o755)
        try:
            work.rename(tree)
        except OSError:
            if not tree.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(target)


def _merge_trees(trees: tuple[Path, ...], target: Path) -> None:
    arch = _ARCHES.get(platform.machine(), platform.machine())
    for part in ("include", f"arch/{arch}"):
        _merge([tree / part for tree in trees if (tree / part).is_dir()], target / part)


def _merge(sources: list[Path], target: Path) -> None:
    """Lay directories over each other with links; what several have becomes a directory."""
    target.mkdir(parents=True)
    for name in sorted({entry.name for source in sources for entry in os.scandir(source)}):
        have = [source / name for source in sources if (source / name).exists()]
        if len(have) > 1 and all(path.is_dir() for path in have):
            _merge(have, target / name)
        else:
            (target / name).symlink_to(have[0])
