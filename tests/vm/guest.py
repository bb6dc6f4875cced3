"""Boot a kernel on this machine's own root file system and run one command in it.

The guest sees the host's files, and what it writes is gone with it, except below its `out` folder.
What Python needs comes from a disk image, the repository from an archive: over 9p each import
takes three times as long. Output and exit code come back as files of `out`, which need no driver
that a stock kernel might lack.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from tests.vm import artifacts
from tests.vm.kernels import CACHE, Kernel

REPOSITORY = Path(__file__).resolve().parents[2]
BOOT_S, COUNTING_BOOT_S = 60.0, 300.0
"""A guest that has not begun by then never will; one whose clock counts instructions is slower."""
POWER_OFF_S = 10.0
POLL_S = 0.2
PATIENCE = 10
"""How many times longer than a real machine an emulated one may take; tests read it."""
FUZZ_ROUNDS = 1000
"""The first of the 5,000 of a real machine: one seed gives every kernel the same packets."""
MODULES = ("virtio_blk", "ext4", "br_netfilter", "tun")
"""br_netfilter: netfilter sees what passes a bridge of pods, as on a node of Kubernetes. tun: tests
hold the other end of a device.
"""
GUEST_OUT = "/mnt"
"""Where the guest has its `out` folder: outside the repository, which is hidden by its copy."""
NOT_FOR_GUESTS = ("mypy", "mypyc", "*mypyc*.so", "pip", "ruff", "kubernetes_validate")

SCRIPT = """\
#!/bin/bash
# Written by tests.vm: what the guest does first, then the command.
out={out}
touch $out/begun
exec >$out/output 2>&1
set -e
mount -t tmpfs tmpfs /tmp
{modules}
mkdir /run/image
mount -o ro,noload /dev/vda /run/image
for folder in {folders}; do mount --bind "/run/image$folder" "$folder"; done
mkdir -p {repository}
mount -t tmpfs -o size=50% tmpfs {repository}
tar -C {repository} -xf $out/repository.tar
tar -C {repository} -xf $out/compiled.tar
mkdir -p {venv}
mount --bind "/run/image{venv}" {venv}
[ -e {repository}/.venv ] || ln -s {venv} {repository}/.venv
cp -r {artifacts} /tmp/artifacts
mkdir -p $out/test-logs
ln -s $out/test-logs {repository}/test-logs
mkdir -p /sys/fs/bpf
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
ip link set lo up
cd {repository}
set +e
env {environment} {command}
echo $? >$out/status
"""


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
            Needs a single processor.

    Raises:
        GuestFailed: it did not boot, died, or ran into the deadline.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("begun", "output", "status"):
        (out / name).unlink(missing_ok=True)
    image, programs = python_image(), artifacts.prepare(kernel)
    archive_repository(out / "repository.tar")
    archive_compiled(out / "compiled.tar")
    (out / "guest.sh").write_text(_script(command, programs))
    begun = time.monotonic()
    argv = _argv(kernel, image, out, cpus=cpus, memory=memory)
    if count_instructions:
        argv.insert(-2, "--qemu-opts=-icount shift=0,sleep=on")
    # The machine ends with this process, however that ends, and at the deadline at the latest.
    guard = ["setpriv", "--pdeathsig", "TERM", "timeout", "--kill-after=5"]
    argv = [*guard, str(int(deadline_s) + 5), *argv]
    environment = {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"}
    with (out / "console").open("w") as console:
        machine = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            boot_s = COUNTING_BOOT_S if count_instructions else BOOT_S
            _follow(machine, out, (begun, boot_s, deadline_s), echo)
            with contextlib.suppress(subprocess.TimeoutExpired):
                machine.wait(POWER_OFF_S)
        finally:
            _end(machine)
            for name in ("repository.tar", "compiled.tar"):
                (out / name).unlink(missing_ok=True)
    status = out / "status"
    if not status.exists():
        raise GuestFailed(f"Linux {kernel.release} ended without a result: see {out}/console")
    return Outcome(int(status.read_text()), time.monotonic() - begun)


def _script(command: Sequence[str], programs: Path) -> str:
    environment = {
        "EBPF_SVC_PATIENCE": str(PATIENCE),
        "EBPF_SVC_ARTIFACTS": "/tmp/artifacts",
        "EBPF_SVC_FUZZ_ROUNDS": str(FUZZ_ROUNDS),
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "LC_ALL": "C.UTF-8",
    }
    return SCRIPT.format(
        out=GUEST_OUT,
        modules="\n".join(f"modprobe {name}" for name in MODULES),
        folders=shlex.join(str(path) for path in _library_folders()),
        repository=shlex.quote(str(REPOSITORY)),
        artifacts=shlex.quote(str(programs)),
        venv=shlex.quote(str(Path(sys.prefix).resolve())),
        environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
        command=shlex.join(command),
    )


def _argv(kernel: Kernel, image: Path, out: Path, *, cpus: int, memory: str) -> list[str]:
    return [
        *("vng", "--verbose", "--run", str(kernel.image)),
        *("--disable-kvm", "--force-9p", "--user", "root"),
        *("--cpus", str(cpus), "--memory", memory),
        f"--rwdir={GUEST_OUT}={out}",
        f"--qemu-opts=-drive file={image},if=virtio,format=raw,readonly=on",
        # Guarding against speculation costs an emulated machine a third of its speed.
        *("--append", "mitigations=off", "--append", "loglevel=4"),
        *("--", f"bash {GUEST_OUT}/guest.sh"),
    ]


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


_compiling = threading.Lock()


def archive_compiled(path: Path) -> None:
    """Put the repository's modules, compiled, into an archive: emulated, compiling takes a minute.

    Python compares them with the sources: what has changed since is compiled in the guest.
    """
    with _compiling:
        shutil.copyfile(_compiled(), path)


@functools.cache
def _compiled() -> Path:
    """That archive, made once a process; modules of tests as pytest has them, with its own code."""
    prefix = CACHE / "compiled"
    root = prefix / REPOSITORY.relative_to("/")
    archive = root / "compiled.tar"
    steps = (
        ["compileall", "-q", "ebpf_svc", "tests"],
        ["pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/packet"],
        ["pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/behaviour"],
    )
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(prefix)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for step in steps:
        argv = [sys.executable, "-m", *step]
        subprocess.run(argv, cwd=REPOSITORY, check=True, env=environment, stdout=subprocess.DEVNULL)
    names = [
        str(found.relative_to(root))
        for part in ("ebpf_svc", "tests")
        for found in (root / part).rglob("*.pyc")
    ]
    beside = r"--transform=flags=r;s,([^/]*)$,__pycache__/\1,x"
    pack = ["tar", "-C", str(root), "-cf", str(archive), beside, "-T", "-"]
    subprocess.run(pack, check=True, input="\n".join(names).encode())
    return archive


def _library_folders() -> list[Path]:
    """What Python reads when it starts, besides the environment's own folder."""
    return [Path(sysconfig.get_path("stdlib")), Path("/usr/lib/python3")]


def python_image() -> Path:
    """A disk image with Python's libraries and the environment; made anew when those change."""
    venv = Path(sys.prefix).resolve()
    installed = sorted(path.name for path in Path(sysconfig.get_path("purelib")).iterdir())
    stamp = "\n".join([sys.version, str(venv), *installed])
    key = hashlib.sha256(stamp.encode()).hexdigest()[:16]
    images = CACHE / "python"
    image = images / f"{key}.ext4"
    if image.exists():
        return image
    images.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".image-", dir=images) as work:
        tree, made = Path(work, "tree"), Path(work, "image")
        tree.mkdir()
        for folder in [*_library_folders(), venv]:
            excludes = shlex.join(f"--exclude={name}" for name in NOT_FOR_GUESTS)
            copy = f"tar -C / -cf - {excludes} {shlex.quote(str(folder)[1:])} | tar -C {tree} -xf -"
            subprocess.run(["bash", "-o", "pipefail", "-c", copy], check=True)
        blocks = subprocess.run(
            ["du", "-s", "--block-size=1M", str(tree)], check=True, capture_output=True, text=True
        ).stdout.split()[0]
        size = f"{int(blocks) * 5 // 4 + 32}M"
        make = [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-d",
            str(tree),
            str(made),
            size,
        ]
        subprocess.run(make, check=True)
        for old in images.glob("*.ext4"):
            old.unlink()
        made.rename(image)
    return image
