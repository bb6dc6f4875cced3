"""The vm ring: what runs on which kernel, two machines side by side, and the table of outcomes."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.lib.matrix import Results
from tests.lib.variants import VARIANTS
from tests.vm import artifacts, guest, kernels
from tests.vm.guest import GuestFailed
from tests.vm.kernels import Kernel, NoKernel, Wanted

LOGS = Path("test-logs/vm")
RESULTS = "results/results.json"
"""Below a job's test-logs; `make behaviours` looks for them."""
DEADLINE_S = 2400.0
MEMORY = "3G"
PYTEST = (
    *(".venv/bin/python", "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"),
    *("--timeout", "600", "--durations", "15", "--results", f"test-logs/{RESULTS}"),
)
PROGRAMS = ("test_option_sets", "test_features", "test_netns", "test_attach")
"""Of the packet ring, what kernels can differ in most; the oldest is asked all of it."""
EBPF_VARIANTS = ("ebpf", "ebpf-fast")
"""Every program is in one of them. The oldest kernel is asked the first alone: docs/kernels.md says
what becomes of the fast path there."""
BETWEEN = (("ebpf", "ipvs", "nftables"), ("ebpf-fast", "iptables", "userspace"))
"""Variants tried on kernels between the oldest and the newest, by turns."""
WHOLE_OF = {"6.1": "ipvs"}
"""Modes this machine's kernel may lack, and a kernel that has them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One command on one kernel."""

    kernel: str
    what: str
    command: tuple[str, ...]

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
        names: of kernels, oldest first.
        only: the parts wanted; none = all.
        whole: every packet and mode on every kernel, and the behaviour suite of `WHOLE_OF`: hours.
    """
    modes = [each.name for each in VARIANTS.values() if each.mode != "ebpf"]
    made = []
    for name in names:
        if whole and name in WHOLE_OF:
            mode = WHOLE_OF[name]
            command = (*PYTEST, "tests/behaviour", "--dataplane", mode)
            made.append(Job(name, f"behaviour-{mode}", command))
        marks = ("-m", "not compiles" if whole else "not compiles and not verifies")
        if whole or name == names[0]:
            made.append(Job(name, "packet", (*PYTEST, "tests/packet", *marks)))
        else:
            modules = [f"tests/packet/{module}.py" for module in PROGRAMS]
            made.append(Job(name, "programs", (*PYTEST, *modules, *marks)))
        is_end = name in (names[0], names[-1])
        ebpf = EBPF_VARIANTS[:1] if name == names[0] and len(names) > 1 else EBPF_VARIANTS
        turn = BETWEEN[(names.index(name) - 1) % len(BETWEEN)]
        variants = (*ebpf, *modes) if whole or is_end else turn
        chosen = [word for variant in variants for word in ("--dataplane", variant)]
        made.append(Job(name, "smoke", (*PYTEST, "tests/behaviour", "-m", "smoke", *chosen)))
    order = ("behaviour", "packet", "smoke", "programs")
    made.sort(key=lambda job: order.index(job.what.split("-")[0]))
    return [job for job in made if not only or job.what in only]


def run(
    wanted: Sequence[Wanted],
    *,
    only: Sequence[str],
    whole: bool,
    machines: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Run the ring; returns its table."""
    rows: list[Row] = []
    have: dict[str, Kernel] = {}
    for row in wanted:
        begun = time.monotonic()
        try:
            have[row.name] = kernel = kernels.obtain(row)
            artifacts.prepare(kernel)
        except NoKernel as error:
            rows.append(Row(row.name, "kernel", f"cannot be had: {error}", not row.required))
            say(f"{row.name}: cannot be had: {error}")
        else:
            taken_s = time.monotonic() - begun
            rows.append(Row(row.name, "kernel", kernel.release, True, taken_s))
    if have:
        guest.python_image()
    with ThreadPoolExecutor(machines) as pool:
        todo = jobs(list(have), only=only, whole=whole)
        rows += pool.map(lambda job: _run(job, have[job.kernel], say), todo)
    return rows


_saying = threading.Lock()


def _run(job: Job, kernel: Kernel, say: Callable[[str], None]) -> Row:
    shutil.rmtree(job.out, ignore_errors=True)
    begun = time.monotonic()
    try:
        # Not by a clock that counts instructions: that takes twice as long.
        outcome = guest.run(kernel, job.command, job.out, memory=MEMORY, deadline_s=DEADLINE_S)
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


def machines_here() -> int:
    """How many machines of one processor this one can emulate side by side."""
    return max(1, os.cpu_count() or 1)
