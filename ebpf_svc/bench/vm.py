"""A benchmark inside a virtual machine whose kernel has every mode and whose clock counts
instructions: one a nanosecond, whatever else the machine underneath does.

The runner is the tests' own, so this needs a checkout of the repository.
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
GUEST = "EBPF_SVC_BENCH_GUEST"
"""Set inside: a name for the machine, told in reports."""
MODULES = ("ip_vs", "ip_vs_rr", "dummy", "nf_conntrack", "nf_tables", "ip_tables", "sch_ingress")
DEADLINE_S = 3_600
_ROOT = Path(__file__).resolve().parents[2]
_RESULT = Path("test-logs/bench.json")


class GuestFailed(EbpfSvcError):
    """The benchmark in the virtual machine did not end well."""


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
        f"modprobe -a {' '.join(MODULES)};",
        f"{GUEST}='Linux {kernel} in an emulator, time = instructions'",
        f".venv/bin/python -m ebpf_svc.bench.{benchmark} --json",
        str(_RESULT),
        *words,
    ]
    with tempfile.TemporaryDirectory(prefix="ebpf-svc-bench-vm-") as scratch:
        argv = [sys.executable, "-m", "tests.vm", "run", kernel, "--count-instructions"]
        argv += ["--memory", "4G", "--deadline", str(DEADLINE_S), "--out", scratch]
        done = subprocess.run([*argv, "--", "sh", "-c", " ".join(inner)], cwd=_ROOT, check=False)
        found = Path(scratch) / _RESULT
        if done.returncode or not found.exists():
            raise GuestFailed(f"the benchmark under Linux {kernel} ended with {done.returncode}")
        kept = Path(tempfile.mkstemp(prefix="ebpf-svc-bench-", suffix=".json")[1])
        shutil.copyfile(found, kept)
    return kept
