"""Join the C sources into one text per unit.

BCC rewrites map calls in the main file only, so headers must become part of it; `#line` marks let
errors still name the header. Pure but for reading files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ENTRY_FILES = ("tc.c", "cgroup.c", "xdp.c")
"""What a unit consists of; everything else is reached through includes."""

_PROJECT_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')
_SYSTEM_INCLUDE = re.compile(r"^\s*#\s*include\s+<[^>]+>")
_CONDITION = re.compile(r"^\s*#\s*(if|ifdef|ifndef|endif)\b")
_PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\b")


def source_dir() -> Path:
    """Where the C lives: packaged beside the modules, or in the repository."""
    package = Path(__file__).resolve().parents[2]
    packaged = package / "_bpf"
    return packaged if packaged.is_dir() else package.parent / "bpf"


def join(entries: Sequence[Path], root: Path) -> str:
    """Join files and the project headers they include, each header once.

    Args:
        entries: C files, in the order they shall appear.
        root: includes are resolved against the including file's directory, then against this.

    Returns:
        the text: system includes first, then everything else under `#line` marks with names
        relative to `root`.

    Raises:
        FileNotFoundError: naming the include that leads nowhere.
    """
    joiner = _Joiner(root)
    for entry in entries:
        joiner.add(entry)
    return "\n".join([*joiner.system, *joiner.lines, ""])


def unit_text(root: Path | None = None) -> str:
    """The text of our unit; the same for both families, which differ in defines only."""
    root = root or source_dir()
    return join([root / name for name in ENTRY_FILES], root)


class _Joiner:
    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.system: list[str] = []
        self.lines: list[str] = []
        self._seen: set[Path] = set()

    def add(self, path: Path) -> None:
        path = path.resolve()
        if path in self._seen:
            return
        self._seen.add(path)
        name = path.relative_to(self.root) if path.is_relative_to(self.root) else path
        self.lines.append(f'#line 1 "{name}"')
        depth = 0
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            condition = _CONDITION.match(line)
            if condition:
                depth += -1 if condition[1] == "endif" else 1
            if _PRAGMA_ONCE.match(line):
                self.lines.append("")
            elif included := _PROJECT_INCLUDE.match(line):
                self.add(self._find(included[1], path, number))
                self.lines.append(f'#line {number + 1} "{name}"')
            elif depth == 0 and _SYSTEM_INCLUDE.match(line):
                # Hoisted, so that the order of our headers cannot matter to theirs.
                if line.strip() not in self.system:
                    self.system.append(line.strip())
                self.lines.append("")
            else:
                self.lines.append(line)

    def _find(self, name: str, includer: Path, number: int) -> Path:
        for base in (includer.parent, self.root):
            if (base / name).is_file():
                return base / name
        raise FileNotFoundError(f'{includer}:{number}: no file for #include "{name}"')
