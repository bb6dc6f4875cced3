"""Compile units in a short-lived process, so that LLVM never lives in the agent.

`obtain` gives artifacts from the cache or compiles what is missing, families side by side.
`python -m ebpf_svc.dataplane.ebpf.compiler FAMILY OUT` is that process; it alone imports bcc, and
needs nothing outside the standard library besides, so the distribution's own interpreter can run
it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebpf_svc.dataplane.ebpf import artifact, constants, source
from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape
from ebpf_svc.errors import CompileError, UnsupportedHost
from ebpf_svc.host import toolchain
from ebpf_svc.host.bpf import MapType
from ebpf_svc.model.net import Family

COMPILER_VERSION = 1
"""Raise it when this module would give other output for the same sources."""
KEPT_ARTIFACTS = 16
"""Of each family, 100 KiB each: enough for the settings a node goes through, and for a testbed."""
STAND_INS = {"sockets": MapType.SK_STORAGE}
"""What maps are that the C declares as another type, because the kernel gives BCC no such map when
there is no debug information.
"""


def obtain(
    families: Sequence[Family],
    cache_dir: Path,
    *,
    extra_defines: Mapping[Family, Mapping[str, str]] | None = None,
    text: str | None = None,
) -> dict[Family, Artifact]:
    """Give the artifact of each family, compiled now only when the cache has none that fits.

    Without bcc on this machine an artifact that another machine's bcc made of the same sources
    and constants is taken, so that a node without compiler or headers can be supplied.

    Args:
        families: which to give.
        cache_dir: where artifacts are kept; created.
        extra_defines: by family, this node's settings, besides `constants.defines`.
        text: another unit than ours, for tests and benchmarks.

    Raises:
        CompileError: with clang's messages.
        UnsupportedHost: no bcc or no headers, and nothing in the cache.
    """
    unit = source.unit_text() if text is None else text
    found, missing = _look_up(families, cache_dir, extra_defines or {}, unit)
    if missing:
        with _turn(cache_dir):
            # Another process may have compiled the same while this one waited.
            found, missing = _look_up(families, cache_dir, extra_defines or {}, unit)
            if missing:
                found |= _compile_all(unit, missing, cache_dir)
    return found


@contextlib.contextmanager
def _turn(cache_dir: Path) -> Iterator[None]:
    """Let one process at a time compile for a cache."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_cached(
    families: Sequence[Family],
    cache_dir: Path,
    *,
    extra_defines: Mapping[Family, Mapping[str, str]] | None = None,
) -> bool:
    """Whether `obtain` would need no compiler for our own unit."""
    _, missing = _look_up(families, cache_dir, extra_defines or {}, source.unit_text())
    return not missing


def _look_up(
    families: Sequence[Family],
    cache_dir: Path,
    extra_defines: Mapping[Family, Mapping[str, str]],
    unit: str,
) -> tuple[dict[Family, Artifact], dict[Family, tuple[Path, dict[str, str]]]]:
    """Artifacts the cache has, and for the others where they will be and their defines."""
    found: dict[Family, Artifact] = {}
    missing: dict[Family, tuple[Path, dict[str, str]]] = {}
    bcc = toolchain.bcc_version()
    for family in families:
        defines = {**constants.defines(family), **extra_defines.get(family, {})}
        stem = f"ipv{int(family)}-{artifact.source_key(unit, defines)[:32]}"
        for path in _candidates(cache_dir, stem, bcc):
            cached = artifact.read(path)
            if cached is not None:
                with contextlib.suppress(OSError):  # a cache may be read-only
                    os.utime(path)
                found[family] = cached
                break
        else:
            missing[family] = (_path(cache_dir, stem, bcc or "none"), defines)
    return found, missing


def _path(cache_dir: Path, stem: str, bcc: str) -> Path:
    return cache_dir / f"{stem}-{os.uname().machine}-bcc{bcc}-{COMPILER_VERSION}.artifact"


def _candidates(cache_dir: Path, stem: str, bcc: str | None) -> list[Path]:
    exact = _path(cache_dir, stem, bcc or "none")
    return [exact] if bcc else sorted(cache_dir.glob(f"{stem}-{os.uname().machine}-*.artifact"))


def _compile_all(
    unit: str, wanted: Mapping[Family, tuple[Path, dict[str, str]]], cache_dir: Path
) -> dict[Family, Artifact]:
    tree = toolchain.find_headers()
    lacking = []
    if toolchain.bcc_version() is None:
        lacking.append(f"bcc for Python: not installed ({toolchain.MEND_BCC})")
    if tree is None:
        lacking.append(f"kernel headers: none found ({toolchain.MEND_HEADERS})")
    if lacking or tree is None:
        raise UnsupportedHost(lacking)
    package_root = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ,
        **toolchain.environment(tree, cache_dir),
        "PYTHONPATH": package_root,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    running = {
        family: subprocess.Popen(
            [
                toolchain.compiler_python(),
                "-m",
                __name__,
                str(int(family)),
                str(path),
                "--source",
                "-",
            ]
            + [f"--define={name}={value}" for name, value in defines.items()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for family, (path, defines) in wanted.items()
    }
    # Both start at once: each reads all of its source before it compiles.
    for process in running.values():
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # one that died says why on stderr
            process.stdin.write(unit)
            process.stdin.close()
        process.stdin = None
    results: dict[Family, Artifact] = {}
    failures: list[CompileError] = []
    for family, process in running.items():
        _, log = process.communicate()
        result = artifact.read(wanted[family][0]) if process.returncode == 0 else None
        if result is None:
            reason = log.strip() or f"the compiler exited with {process.returncode}, saying nothing"
            failures.append(CompileError(f"the IPv{int(family)} unit", reason))
        else:
            results[family] = result
    if failures:
        raise failures[0]
    _prune(cache_dir)
    return results


def _prune(cache_dir: Path) -> None:
    """Forget artifacts of old sources and settings, the longest unused first."""
    for family in Family:
        by_age = sorted(
            cache_dir.glob(f"ipv{int(family)}-*.artifact"),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        for path in by_age[KEPT_ARTIFACTS:]:
            path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile one unit and store its artifact; messages of the compiler go to stderr."""
    parser = argparse.ArgumentParser(description="Compile the unit of one family with BCC.")
    parser.add_argument("family", type=int, choices=[4, 6])
    parser.add_argument("out", type=Path)
    parser.add_argument("--define", action="append", default=[], metavar="K=V")
    parser.add_argument("--source", help="file to compile, - for stdin; default: our sources")
    arguments = parser.parse_args(argv)
    if arguments.source == "-":
        text = sys.stdin.read()
    elif arguments.source:
        path = Path(arguments.source)
        text = source.join([path], path.parent)
    else:
        text = source.unit_text()
    defines = constants.defines(Family(arguments.family))
    defines |= dict(pair.partition("=")[::2] for pair in arguments.define)
    try:
        compiled = compile_unit(text, defines)
    except Exception as error:  # bcc raises nothing narrower; clang has said why on stderr
        print(error, file=sys.stderr)
        return 1
    artifact.write(compiled, arguments.out)
    return 0


def compile_unit(text: str, defines: Mapping[str, str]) -> Artifact:
    """Compile in this process, which holds LLVM from then on; needs root, as BCC creates maps."""
    import bcc  # noqa: PLC0415 - only this process may pay for it

    flags = [f"-D{name}={value}" for name, value in defines.items()]
    flags += ["-Wno-duplicate-decl-specifier", "-Wno-unknown-attributes"]
    # BCC asks for debug information, which is a quarter of the time and changes no instruction.
    flags.append("-g0")
    module = bcc.BPF(text=text, cflags=flags)
    shapes, names = _maps_of(bcc.lib, module.module)
    count = bcc.lib.bpf_num_functions(module.module)
    programs = {}
    for index in range(count):
        name = bcc.lib.bpf_function_name(module.module, index)
        programs[name.decode()] = artifact.strip_descriptors(module.dump_func(name), names)
    return Artifact(programs, shapes)


def _maps_of(lib: Any, module: int) -> tuple[dict[str, MapShape], dict[int, str]]:
    """Read every map of a compiled module: shapes by name, and names by descriptor."""

    def ask(name: str, result: Any, *arguments: int) -> Any:
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t][: len(arguments)]
        return function(*arguments)

    shapes, names = {}, {}
    for i in range(ask("bpf_num_tables", ctypes.c_size_t, module)):
        name = ask("bpf_table_name", ctypes.c_char_p, module, i).decode()
        names[ask("bpf_table_fd_id", ctypes.c_int, module, i)] = name
        shapes[name] = MapShape(
            type=STAND_INS.get(name) or ask("bpf_table_type_id", ctypes.c_int, module, i),
            flags=ask("bpf_table_flags_id", ctypes.c_int, module, i),
            key_size=ask("bpf_table_key_size_id", ctypes.c_size_t, module, i),
            value_size=ask("bpf_table_leaf_size_id", ctypes.c_size_t, module, i),
            key_desc=ask("bpf_table_key_desc_id", ctypes.c_char_p, module, i).decode(),
            value_desc=ask("bpf_table_leaf_desc_id", ctypes.c_char_p, module, i).decode(),
            max_entries=ask("bpf_table_max_entries_id", ctypes.c_size_t, module, i),
        )
    return shapes, names


if __name__ == "__main__":
    sys.exit(main())
