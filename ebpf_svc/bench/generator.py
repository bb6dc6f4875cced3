"""The load generator: a small C program of ours, compiled at first use and kept by its content.

One program makes and answers every kind of traffic, so that all figures share its cost, its
pinning and its account of CPU time, also inside a virtual machine without packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebpf_svc.errors import CommandError, EbpfSvcError, UnsupportedHost
from ebpf_svc.testbed.host import Host

SOURCE = Path(__file__).with_name("load.c")
MISSING_COMPILER = "compiler: the load generator needs one (apt-get install gcc libc6-dev)"
COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O2", "-Wall")
_MARGIN_S = 20.0
_ACCOUNT = Path("/proc/self/schedstat")
_TICKS = os.sysconf("SC_CLK_TCK")


class GeneratorError(EbpfSvcError):
    """The load generator failed: no figure came of it."""


def program(cache_dir: Path) -> Path:
    """The compiled generator, from the cache or built into it.

    Raises:
        UnsupportedHost: this machine has no C compiler.
    """
    text = SOURCE.read_bytes()
    built = cache_dir / f"load-{hashlib.sha256(text).hexdigest()[:16]}"
    if built.exists():
        return built
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise UnsupportedHost([MISSING_COMPILER])
    cache_dir.mkdir(parents=True, exist_ok=True)
    scratch = built.with_suffix(f".{os.getpid()}")
    argv = [compiler, *_FLAGS, "-o", str(scratch), str(SOURCE)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandError(argv, done.returncode, done.stderr)
    scratch.replace(built)
    return built


@dataclass(frozen=True, slots=True)
class Order:
    """What a client shall do."""

    what: str
    """connect, request, bulk, udp-request, udp-first or udp-rate."""
    address: str
    port: int
    sockets: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of a client came to; times in nanoseconds."""

    done: int
    errors: int
    bytes: int
    elapsed_ns: int
    cpu_ns: int
    """Of client, server and agent together, the kernel's work on their behalf included; where that
    is not known (`accounts_exactly`), what all exchanges take if they are like the median one.
    """
    user_ns: int
    """The client's own instructions, by the kernel's coarse account."""
    p50_ns: int
    p99_ns: int
    p999_ns: int
    histogram: tuple[tuple[int, int], ...]
    """Pairs of least value and count."""


def accounts_exactly() -> bool:
    """Whether this kernel counts CPU time by nanoseconds; one that runs as a process counts ticks,
    which a sample is too short for.
    """
    return _ACCOUNT.exists()


def cpu_ns_of(pid: int) -> int:
    """CPU time of a process's threads so far, the kernel's work on their behalf included."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has ended
            total += int((thread / "schedstat").read_text().split()[0])
    return total


class Server:
    """The answering side on a host, on two ports: one echoes, one counts; TCP and UDP on each."""

    def __init__(self, host: Host, binary: Path, *, echo: int, sink: int, cpu: int) -> None:
        argv = [str(binary), "serve", str(echo), str(sink), str(cpu)]
        self._process = host.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            assert self._process.stderr is not None
            raise GeneratorError(f"{host.name} cannot serve: {self._process.stderr.read()}")

    def cpu_ns(self) -> int:
        """CPU time so far, the kernel's on its behalf included."""
        return cpu_ns_of(self._process.pid)

    def user_ns(self) -> int:
        """Its own instructions so far, counted in ticks."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) * 1_000_000_000 // _TICKS

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def run(
    host: Host,
    binary: Path,
    order: Order,
    *,
    ms: int,
    cpu: int,
    others_cpu_ns: Callable[[], int],
) -> Outcome:
    """Let a client on a host do what is ordered, for so many milliseconds.

    Args:
        others_cpu_ns: CPU time so far of whoever else works on it: servers, agents.

    Raises:
        GeneratorError: it failed, or too many exchanges did.
    """
    argv = [str(binary), order.what, order.address, str(order.port), str(ms), str(cpu)]
    before_ns = others_cpu_ns() if accounts_exactly() else None
    pipe = subprocess.PIPE
    with host.popen([*argv, str(order.sockets)], stdout=pipe, stderr=pipe) as process:
        try:
            stdout, stderr = process.communicate(timeout=ms / 1000 + _MARGIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise GeneratorError(f"{order} from {host.name} does not end") from None
    others_ns = others_cpu_ns() - before_ns if before_ns is not None else None
    if process.returncode:
        raise GeneratorError(f"{order} from {host.name}: {stderr.strip()}")
    return outcome(json.loads(stdout), others_ns)


def outcome(said: dict[str, Any], others_ns: int | None) -> Outcome:
    """What a client printed, with the others' CPU time added; None = nobody's is known.

    Raises:
        GeneratorError: nothing was done, or one exchange in a hundred failed.
    """
    if not said["done"] or said["errors"] * 100 > said["done"]:
        raise GeneratorError(f"{said['errors']} failed exchanges beside {said['done']} good ones")
    return Outcome(
        done=said["done"],
        errors=said["errors"],
        bytes=said["bytes"],
        elapsed_ns=said["elapsed_ns"],
        cpu_ns=_undisturbed_ns(said) if others_ns is None else said["cpu_ns"] + others_ns,
        user_ns=said["user_ns"],
        p50_ns=said["p50_ns"],
        p99_ns=said["p99_ns"],
        p999_ns=said["p999_ns"],
        histogram=tuple((least, count) for least, count in said["histogram"]),
    )


def _undisturbed_ns(said: dict[str, Any]) -> int:
    """How long a client took without those exchanges in which others had the CPU."""
    return int(said["done"] * said["p50_ns"] or said["elapsed_ns"])
