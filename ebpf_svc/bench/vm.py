"""A benchmark under another kernel, one that has every mode.

In an emulator the clock counts instructions: one a nanosecond, whatever else the machine underneath
does. A kernel that runs as a process is nearly as fast as the machine and has its clock; it holds
sizes that would take an emulator hours. The runner is the tests' own, so this needs a checkout of
the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ebpf_svc.bench import generator
from ebpf_svc.config import EbpfSettings
from ebpf_svc.errors import EbpfSvcError, UnsupportedHost

KERNEL = "6.1"
_AS_PROCESS = "-um"
"""Ends the names of kernels that run as a process."""
GUEST = "EBPF_SVC_BENCH_GUEST"
"""Set inside: a name for the machine, told in reports."""
MODULES = ("ip_vs", "ip_vs_rr", "dummy", "nf_conntrack", "nf_tables", "ip_tables", "sch_ingress")
MEMORY, MEMORY_OF_PROCESS = "4G", "10G"
"""The emulator takes it at once, a process as it needs it."""
DEADLINE_S = 3_600
_ROOT = Path(__file__).resolve().parents[2]
_RESULT = Path("test-logs/bench.json")


class GuestFailed(EbpfSvcError):
    """The benchmark in the virtual machine did not end well."""


def is_process(kernel: str) -> bool:
    """Whether a kernel of that name runs as a process: in real time."""
    return kernel.endswith(_AS_PROCESS)


def title(kernel: str) -> str:
    """What reports call it."""
    version = kernel.removesuffix(_AS_PROCESS)
    if is_process(kernel):
        return f"Linux {version} as a process"
    return f"Linux {version} in an emulator, time = instructions"


def run(kernel: str, benchmark: str, words: Sequence[str]) -> Path:
    """Run a benchmark with these words under a kernel of tests/vm; returns its JSON, a copy.

    Raises:
        UnsupportedHost: this is no checkout with tests/vm.
        GuestFailed: the guest, or the benchmark in it, failed; what it said was printed.
    """
    if not (_ROOT / "tests/vm/__main__.py").exists():
        raise UnsupportedHost(["vm: the runner is in tests/vm of the repository, not here"])
    # The guest sees this machine's files: compiled here, found there.
    generator.program(EbpfSettings().cache_dir)
    inner = [
        "" if is_process(kernel) else f"modprobe -a {' '.join(MODULES)};",
        f"{GUEST}='{title(kernel)}'",
        f".venv/bin/python -m ebpf_svc.bench.{benchmark} --json",
        str(_RESULT),
        *words,
    ]
    with tempfile.TemporaryDirectory(prefix="ebpf-svc-bench-vm-") as scratch:
        argv = [sys.executable, "-m", "tests.vm", "run", kernel]
        if is_process(kernel):
            argv += ["--memory", MEMORY_OF_PROCESS]
        else:
            argv += ["--memory", MEMORY, "--count-instructions"]
        argv += ["--deadline", str(DEADLINE_S), "--out", scratch]
        done = subprocess.run([*argv, "--", "sh", "-c", " ".join(inner)], cwd=_ROOT, check=False)
        found = Path(scratch) / _RESULT
        if done.returncode or not found.exists():
            raise GuestFailed(f"the benchmark under Linux {kernel} ended with {done.returncode}")
        kept = Path(tempfile.mkstemp(prefix="ebpf-svc-bench-", suffix=".json")[1])
        shutil.copyfile(found, kept)
    return kept
