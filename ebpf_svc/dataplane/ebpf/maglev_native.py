"""The loop that fills Maglev tables, as machine code: forty times as fast as in Python.

Compiled by the node's own C compiler when a table is large enough to matter, and kept beside the
programs under the content of its source. Without a compiler the loop runs in Python: the table is
the same. An image is given the code when it is built: `python -m
ebpf_svc.dataplane.ebpf.maglev_native DIR`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from array import array
from pathlib import Path

from ebpf_svc.dataplane.ebpf.maglev import Fill, fill_in_python
from ebpf_svc.log import get_logger

SOURCE = Path(__file__).with_name("maglev.c")
COMPILERS = ("cc", "gcc", "clang")
WORTH_IT_SLOTS = 4_000
"""Smaller tables take Python a millisecond: they alone are no reason to start a compiler."""
_COMPILE_S = 20.0

log = get_logger(__name__)


class NativeFill:
    """Fills tables by machine code that it gets when first needed; by Python where it cannot."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._fill: Fill | None = None

    def __call__(
        self, turns: array[int], current: array[int], skips: array[int], size: int
    ) -> array[int]:
        if self._fill is None:
            if size < WORTH_IT_SLOTS:
                return fill_in_python(turns, current, skips, size)
            self._fill = _native(self._cache_dir) or fill_in_python
        return self._fill(turns, current, skips, size)


def file_name() -> str:
    """What the code of this source and this kind of machine is called."""
    key = SOURCE.read_bytes() + f"{os.uname().machine} {sys.byteorder}".encode()
    return f"maglev-{hashlib.sha256(key).hexdigest()[:16]}.so"


def build(folder: Path) -> Path:
    """Compile into a folder.

    Raises:
        OSError: there is no compiler, or it failed, or the folder cannot be written.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"none of {', '.join(COMPILERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file_name()
    scratch = target.with_suffix(f".{os.getpid()}")
    try:
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", str(scratch), str(SOURCE)],
            check=True,
            capture_output=True,
            timeout=_COMPILE_S,
        )
        scratch.replace(target)
    except subprocess.SubprocessError as error:
        raise OSError(f"{compiler}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    return target


def _native(cache_dir: Path) -> Fill | None:
    """The function, from beside this module or from the cache, else compiled; None = Python's."""
    try:
        for folder in (SOURCE.parent, cache_dir):
            if _is_trusted(folder / file_name()):
                return _loaded(folder / file_name())
        return _loaded(build(cache_dir))
    except OSError as error:
        log.info("maglev.in-python", reason=str(error))
        return None


def _is_trusted(path: Path) -> bool:
    """It is there, and nobody else could have written it."""
    try:
        facts = [each.stat() for each in (path, path.parent)]
    except FileNotFoundError:
        return False
    return all(fact.st_uid in (0, os.geteuid()) and not fact.st_mode & 0o022 for fact in facts)


def _loaded(path: Path) -> Fill:
    function = ctypes.CDLL(str(path)).maglev_fill
    function.restype = None

    def fill(turns: array[int], current: array[int], skips: array[int], size: int) -> array[int]:
        owner = array("I", bytes(4 * size))
        count = ctypes.c_uint32(len(turns))
        pointers = [_pointer(each) for each in (turns, current, skips)]
        function(*pointers, count, _pointer(owner), ctypes.c_uint32(size))
        return owner

    return fill


def _pointer(numbers: array[int]) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE.parent))
