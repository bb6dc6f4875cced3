"""Boot a kernel on this machine's own root file system and run one command in it.

The guest sees the host's files, and what it writes is gone with it, except below its `out` folder.
Output and exit code come back as files of `out`, which need no driver that a kernel might lack.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tests.vm import artifacts, machines
from tests.vm.kernels import Kernel
from tests.vm.setup import REPOSITORY

COUNTING = 5.0
"""How many times longer a guest may boot whose clock counts instructions."""
POWER_OFF_S = 10.0
POLL_S = 0.2


class GuestFailed(Exception):
    """The guest itself failed, not the command in it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a command in a guest."""

    status: int
    seconds: float


def run(
    kernel: Kernel,
    command: Sequence[str],
    out: Path,
    *,
    cpus: int = 1,
    memory: str = "2G",
    deadline_s: float = 900.0,
    echo: TextIO | None = None,
    count_instructions: bool = False,
) -> Outcome:
    """Run a command in a guest, in the root of the repository's copy.

    Args:
        kernel: what to boot.
        command: its words.
        out: the folder the guest may write to; holds `output`, `console` and `test-logs` after.
        cpus: processors of the guest.
        memory: as QEMU writes it.
        deadline_s: how long boot and command may take together.
        echo: where to copy the command's output to while it runs.
        count_instructions: let the guest's clock count them, one a nanosecond: a timing in it
            then hardly depends on what else this machine does. While the guest waits, its clock
            follows ours: files come from here, and waiting for them must not run into timeouts.
            Needs an emulator, and a single processor.

    Raises:
        GuestFailed: it did not boot, died, or ran into the deadline.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("begun", "output", "status"):
        (out / name).unlink(missing_ok=True)
    machine, programs = machines.of(kernel.name), artifacts.prepare(kernel)
    archive_repository(out / "repository.tar")
    script = machine.prepare(out).script(command, programs)
    (out / "guest.sh").write_text(script)
    (out / "guest.sh").chmod(0o755)
    begun = time.monotonic()
    argv = machine.argv(kernel, out, cpus=cpus, memory=memory)
    if count_instructions:
        argv.insert(-2, "--qemu-opts=-icount shift=0,sleep=on")
    # The machine ends with this process, however that ends, and at the deadline at the latest.
    guard = ["setpriv", "--pdeathsig", "TERM", "timeout", "--kill-after=5"]
    argv = [*guard, str(int(deadline_s) + 5), *argv]
    environment = {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"}
    with (out / "console").open("w") as console:
        running = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            boot_s = machine.BOOT_S * (COUNTING if count_instructions else 1)
            _follow(running, out, (begun, boot_s, deadline_s), echo)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(POWER_OFF_S)
        finally:
            _end(running)
            for name in ("repository.tar", "compiled.tar"):
                (out / name).unlink(missing_ok=True)
    status = out / "status"
    if not status.exists():
        raise GuestFailed(f"Linux {kernel.release} ended without a result: see {out}/console")
    return Outcome(int(status.read_text()), time.monotonic() - begun)


def _follow(
    machine: subprocess.Popen[bytes],
    out: Path,
    times: tuple[float, float, float],
    echo: TextIO | None,
) -> None:
    """Wait until the machine ends, its command's output copied meanwhile.

    Args:
        times: when it began, how long it may boot, and how long it may take in all.
    """
    begun, boot_s, deadline_s = times
    shown = 0
    while True:
        ended = machine.poll() is not None
        if echo is not None and (out / "output").exists():
            with (out / "output").open(errors="replace") as output:
                output.seek(shown)
                echo.write(output.read())
                echo.flush()
                shown = output.tell()
        if ended or (out / "status").exists():
            return
        taken_s = time.monotonic() - begun
        if taken_s > boot_s and not (out / "begun").exists():
            raise GuestFailed(f"it did not boot in {boot_s:.0f} s: see {out}/console")
        if taken_s > deadline_s:
            raise GuestFailed(f"no result after {deadline_s:.0f} s: see {out}/output")
        time.sleep(POLL_S)


def _end(machine: subprocess.Popen[bytes]) -> None:
    """End the machine and wait for it: `timeout` passes the signal on to all it started."""
    if machine.poll() is None:
        machine.send_signal(signal.SIGTERM)
        try:
            machine.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()


def archive_repository(path: Path) -> None:
    """Put the repository as it is, changes and new files included, into an archive."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    ).stdout.split(b"\0")
    names = b"\0".join(name for name in listed if name and (REPOSITORY / name.decode()).exists())
    subprocess.run(
        ["tar", "-cf", str(path), "--null", "--no-recursion", "-T", "-"],
        cwd=REPOSITORY,
        check=True,
        input=names,
    )
