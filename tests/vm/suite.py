"""The vm ring: what runs on which kernel, two machines side by side, and the table of outcomes."""

from __future__ import annotations

import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc.bench import vm
from ebpf_svc.modes import MODES
from tests.lib.matrix import Results
from tests.lib.variants import VARIANTS
from tests.vm import artifacts, guest, machines
from tests.vm.guest import GuestFailed
from tests.vm.kernels import USER_MODE, Kernel, NoKernel, Wanted

LOGS = Path("test-logs/vm")
RESULTS = "results/results.json"
"""Below a job's test-logs; `make behaviours` looks for them."""
DEADLINE_S = 2400.0
MEMORY = "3G"
_PYTEST = (".venv/bin/python", "-m", "pytest", "-q", "--no-header", "--timeout", "600")
_NOTED = ("--durations", "15", "--results", f"test-logs/{RESULTS}")
PYTEST = (*_PYTEST, "-p", "no:cacheprovider", *_NOTED)
PROGRAMS = ("tests/packet/test_option_sets.py", "tests/packet/test_features.py")
"""Of the packet ring, what machine code and type information (BTF) can matter to: emulated kernels
are asked no more, and one that counts instructions not even that, as it runs the programs there.
"""
STOCK_ON = "6.12"
"""Where it is asked what only a kernel with all its modules has."""
STOCK = (
    "tests/packet/test_modules.py",
    "tests/behaviour/test_nics.py",
    "tests/behaviour/test_kernel_clients.py",
)
"""Which modules every mode loads; VLANs and bonds; clients inside the kernel (NFS)."""
EXPLAIN = ("--ignore-glob", "*/test_explain*.py")
"""Half the time of the packet ring: the same on every kernel, as are the maps it reads, but for
which way a packet takes.
"""
EXPLAINED_ON = "5.10-um"
EXPLAIN_WAY = tuple(
    word
    for name in ("test_explain.py", "test_explain_port.py")
    for word in ("--ignore-glob", f"*/{name}")
)
"""Of that what depends on the kernel shows on the oldest."""
VARIED_ON = ("5.10-um", "newest-um")
"""Where eBPF is tried with every option, on the oldest and the newest; in between every mode is."""
REQUESTS_ON = vm.KERNEL
"""Where instructions per request are counted."""
REQUESTS = (
    f"modprobe -a {' '.join(vm.MODULES)} && "
    ".venv/bin/python -m ebpf_svc.bench.path --json test-logs/path.json --services 1 --rounds 3 "
    "--ms 10 --variants direct ebpf ebpf-tc ebpf-fast ipvs --measures connect udp && "
    ".venv/bin/python -m tests.vm.requests test-logs/path.json tests/vm/requests.json"
)
WHOLE_OF = {"6.12-um": "ipvs"}
"""Modes this machine's kernel may lack, and a kernel that has them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One command on one kernel."""

    kernel: str
    what: str
    command: tuple[str, ...]
    count_instructions: bool = False
    """By the guest's clock."""

    @property
    def out(self) -> Path:
        """Where the guest writes."""
        return LOGS / self.kernel / self.what


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a job, as the table shows it."""

    kernel: str
    what: str
    outcome: str
    ok: bool
    seconds: float = 0.0


def jobs(names: Sequence[str], *, only: Sequence[str] = (), whole: bool = False) -> list[Job]:
    """What to run on these kernels, the longest first.

    Args:
        names: of kernels.
        only: the parts wanted; none = all.
        whole: every packet and mode on emulated kernels, too, and nothing left out: hours.
    """
    made = []
    for name in names:
        if name in WHOLE_OF:
            mode = WHOLE_OF[name]
            made.append(Job(name, f"behaviour-{mode}", ("sh", "-c", _behaviour(mode))))
            switching = (*PYTEST, "tests/behaviour/test_switch.py", "--dataplane", mode)
            made.append(Job(name, f"switch-{mode}", switching))
        if name == REQUESTS_ON:
            made.append(Job(name, "requests", ("sh", "-c", REQUESTS), count_instructions=True))
        is_process = name.endswith(USER_MODE)
        if is_process or whole:
            choice = EXPLAIN_WAY if name == EXPLAINED_ON else EXPLAIN
            choice = () if whole else choice
            made.append(Job(name, "packet", (*PYTEST, "tests/packet", *choice, *_WITHOUT_LLVM)))
            varied = VARIANTS if whole or name in VARIED_ON else MODES
            chosen = [word for variant in varied for word in ("--dataplane", variant)]
            made.append(Job(name, "smoke", (*PYTEST, "tests/behaviour", "-m", "smoke", *chosen)))
        elif name != REQUESTS_ON:
            modules = (*PROGRAMS, *STOCK) if name == STOCK_ON else PROGRAMS
            made.append(Job(name, "programs", (*PYTEST, *modules, *_LIGHT)))
    order = ("behaviour", "switch", "requests", "programs", "packet", "smoke")
    made.sort(key=lambda job: order.index(job.what.split("-")[0]))
    return [job for job in made if not only or job.what in only]


def _behaviour(mode: str) -> str:
    """The behaviour suite of a mode, and what failed once more and alone, as `make behaviour`."""
    # What is no variant's was tried on this machine's kernel.
    chosen = ["tests/behaviour", "--dataplane", mode, "-k", mode]
    again = ["--last-failed", "--last-failed-no-failures", "none"]
    first, second = (shlex.join([*_PYTEST, *rest, *chosen]) for rest in (_NOTED, again))
    return f"{first} || {{ echo '== what failed, once more and alone'; {second}; }}"


_WITHOUT_LLVM = ("-m", "not compiles")
"""The compiler is the same for every kernel, and was tried on this machine's."""
_LIGHT = ("-m", "not compiles and not verifies")
"""Without what takes an emulated machine long."""


def run(
    wanted: Sequence[Wanted],
    *,
    only: Sequence[str],
    whole: bool,
    abreast: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Run the ring; returns its table."""
    rows: list[Row] = []
    have: dict[str, Kernel] = {}
    for row in wanted:
        begun = time.monotonic()
        try:
            have[row.name] = kernel = machines.obtain(row)
            artifacts.prepare(kernel)
        except NoKernel as error:
            rows.append(Row(row.name, "kernel", f"cannot be had: {error}", not row.required))
            say(f"{row.name}: cannot be had: {error}")
        else:
            taken_s = time.monotonic() - begun
            rows.append(Row(row.name, "kernel", kernel.release, True, taken_s))
    with ThreadPoolExecutor(abreast) as pool:
        todo = jobs(list(have), only=only, whole=whole)
        rows += pool.map(lambda job: _run(job, have[job.kernel], say), todo)
    return rows


_saying = threading.Lock()


def _run(job: Job, kernel: Kernel, say: Callable[[str], None]) -> Row:
    shutil.rmtree(job.out, ignore_errors=True)
    begun = time.monotonic()
    try:
        outcome = guest.run(
            kernel,
            job.command,
            job.out,
            memory=MEMORY,
            deadline_s=DEADLINE_S,
            count_instructions=job.count_instructions,
        )
        status, failure = outcome.status, ""
    except GuestFailed as error:
        status, failure = 125, str(error)
    seconds = time.monotonic() - begun
    with _saying:
        if status:
            say(f"== Linux {kernel.release}, {job.what}: {failure or f'exit {status}'}")
            say(_tail(job.out / "output"))
        else:
            say(f"== Linux {kernel.release}, {job.what}: passed in {seconds:.0f} s")
    return Row(job.kernel, job.what, _summary(job, status, failure), status == 0, seconds)


def _summary(job: Job, status: int, failure: str) -> str:
    """In a line: pytest's own last one, and what every variant could not run."""
    if failure:
        return f"FAILED: {failure}"
    lines = (job.out / "output").read_text(errors="replace").strip().splitlines()
    last = next((line.strip("= ") for line in reversed(lines) if " in " in line), "")
    results = job.out / "test-logs" / RESULTS
    idle = set()
    if results.exists():
        ran: dict[str, set[str]] = {}
        for record in Results.read(results).records:
            ran.setdefault(record.variant, set()).add(record.outcome)
        idle = {variant for variant, outcomes in ran.items() if outcomes == {"skipped"}}
    note = f"; cannot run: {', '.join(sorted(idle))}" if idle else ""
    return f"{'FAILED: ' if status else ''}{last}{note}"


def _tail(path: Path, lines: int = 60) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def table(rows: Sequence[Row]) -> str:
    """Kernel, what, outcome and seconds, in columns."""
    cells = [("kernel", "what", "seconds", "outcome")]
    cells += [(row.kernel, row.what, f"{row.seconds:.0f}", row.outcome) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        f"{kernel:{widths[0]}}  {what:{widths[1]}}  {seconds:>{widths[2]}}  {outcome}".rstrip()
        for kernel, what, seconds, outcome in cells
    )


def abreast_here() -> int:
    """How many machines of one processor this one has room for side by side: they spend some of
    their time waiting for answers that do not come.
    """
    return (os.cpu_count() or 1) + 1
