"""Kernels that run as a process of this machine, at nearly its speed: Linux for user mode.

Built from Debian's sources of the very kernels that are emulated, with a configuration of our own
(usermode.config). What is not the processor's is the same code: verifier, netfilter, IPVS, tc. It
has one processor and does not compile BPF to machine code.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.vm import archive
from tests.vm.kernels import CACHE, Kernel, NoKernel, Wanted, version_of
from tests.vm.setup import GUEST_OUT, Setup

BOOT_S = 60.0
ENVIRONMENT = {"EBPF_SVC_PATIENCE": "3"}
"""Its processor may be shared with another one's."""
CONFIGURATION = Path(__file__).with_name("usermode.config")
STATE = Path(__file__).with_name("usermode_state.c")
FOLDER = CACHE / "user-mode"
RECIPE = "recipe"
"""Beside an image: what it was made from."""
KEPT_VENV = "/run/venv"

HOST_SCRIPT = """\
#!/bin/bash
# Written by tests.vm: a root file system that forgets, and the kernel on it.
set -e
work={work}
mkdir -p $work
mount -t tmpfs -o exec tmpfs $work
mkdir $work/upper $work/work $work/root $work/memory
mount -t overlay overlay -o lowerdir=/,upperdir=$work/upper,workdir=$work/work $work/root
for folder in {folders}; do mount --bind "$folder" "$work/root$folder"; done
mount --bind {out} $work/root{guest_out}
cd $work/root
export TMPDIR=$work/memory HOME=$work/memory LD_PRELOAD={state}
# Not this shell's successor: a kernel that panics aborts, which the first process of a namespace
# does not die of.
{image} root=/dev/root rootfstype=hostfs rootflags=$work/root rw mem={memory} \\
    init={guest_out}/guest.sh con=null con0=fd:0,fd:1 quiet seccomp=auto \\
    'slab_debug=F,kmalloc-*'
"""
"""What the last word asks for changes no result. From 6.18 on allocations for BPF from any context
(`kmalloc_nolock`) need checked caches, or a processor whose `cmpxchg16b` user mode does not use.
"""

FILE_SYSTEMS = """\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
# Before the guest's own /tmp, below which the repository may be.
mkdir -p {kept_venv}
mount --bind {venv} {kept_venv}
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo 1 >/proc/sys/net/core/fb_tunnels_only_for_init_net
{seed}"""
SEED = (
    "import fcntl, struct; fcntl.ioctl(open('/dev/random'), 0x40085203, "  # RNDADDENTROPY
    "struct.pack('ii64s', 512, 64, bytes.fromhex('{}')))"
)
"""A kernel without devices has nothing to make random numbers of: programs would wait for them."""

FLAGS = "-DCONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS=1"
"""The verifier asks that of a processor before it lets programs read words where packets have them.
This one can; old versions forget to say so for user mode.
"""


@dataclass(frozen=True, slots=True)
class Correction:
    """A line of some versions' sources, and what it is replaced by."""

    files: str
    line: str
    instead: str
    since: tuple[int, int] = (0, 0)
    before: tuple[int, int] = (99, 0)
    """Of versions: who has the line and needs it replaced."""


CORRECTIONS = (
    # Without machine code a program runs on the stack of the one that called it, so the verifier
    # asks for the deepest stack where it sees a tail call. This line, run later, forgets it: the
    # called program writes over the interpreter's registers, and the kernel dies.
    Correction(
        "kernel/bpf/*.c",
        "env->prog->aux->stack_depth = subprogs[0].stack_depth;",
        "if (env->prog->aux->stack_depth < subprogs[0].stack_depth) "
        "env->prog->aux->stack_depth = subprogs[0].stack_depth;",
        since=(6, 9),
    ),
    # The first touch of new memory looked at all memory of maps there is.
    Correction(
        "arch/um/kernel/trap.c",
        "flush_tlb_kernel_vm();",
        "flush_tlb_kernel_range(address & PMD_MASK, (address & PMD_MASK) + PMD_SIZE);",
        before=(6, 11),
    ),
    # Tries have memory that is refilled by an interrupt the processor sends itself. User mode has
    # none and refills at the next tick: the fifth entry before it found no memory.
    Correction(
        "kernel/bpf/memalloc.c",
        "irq_work_queue(&c->refill_work);",
        "bpf_mem_refill(&c->refill_work);",
        since=(6, 13),
    ),
)
POWER_OFF = "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)'"


def cached(name: str) -> Kernel | None:
    """The kernel of that name, if it was built before from what it would be built from now."""
    folder = FOLDER / name
    for image in sorted(folder.glob("linux-*")):
        kernel, recipe = Kernel(name, image.name.removeprefix("linux-"), image), folder / RECIPE
        if recipe.exists() and recipe.read_text() == _recipe(kernel.version):
            return kernel
    return None


def _corrections(version: tuple[int, int]) -> list[Correction]:
    return [each for each in CORRECTIONS if each.since <= version < each.before]


def _recipe(version: tuple[int, int]) -> str:
    """All that is ours of what a kernel is made from."""
    ours = [CONFIGURATION.read_text(), STATE.read_text(), FLAGS]
    for each in _corrections(version):
        ours += [each.files, each.line, each.instead]
    return "\n".join(ours)


def fetch(row: Wanted) -> Kernel:
    """Build the newest of the row's suites: some minutes; raises as `machines.obtain`."""
    architecture = archive.run(["uname", "-m"]).strip()
    if architecture != "x86_64":
        raise NoKernel(f"user mode is for x86_64 machines only, and this one is {architecture}")
    apt = row.apt
    apt.update()
    package = apt.behind("linux-source", r"linux-source-\d\S*")
    print(f"building {package} for user mode: minutes", file=sys.stderr, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    prefix = f".{row.name}-"
    for left in FOLDER.glob(f"{prefix}*"):  # by one who was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=FOLDER) as work:
        tree = Path(work, package)
        (source,) = apt.download([package], Path(work))
        archive.run(["dpkg", "-x", str(source), work])
        archive.run(["tar", "-C", work, "-xf", f"{work}/usr/src/{package}.tar.xz"])
        version = version_of(package)
        for each in _corrections(version):
            _correct(tree, each)
        make = ["make", "-C", str(tree), "ARCH=um"]
        archive.run([*make, f"KCONFIG_ALLCONFIG={CONFIGURATION}", "allnoconfig"])
        archive.run([*make, f"-j{os.cpu_count()}", f"KCFLAGS={FLAGS}", "linux"])
        release = archive.run([*make, "-s", "kernelrelease"]).strip()
        made = Path(work, "made")
        made.mkdir()
        (made / RECIPE).write_text(_recipe(version))
        (tree / "linux").rename(made / f"linux-{release}")
        compile_state = ["cc", "-O2", "-Wall", "-shared", "-fPIC", str(STATE)]
        archive.run([*compile_state, "-o", f"{made}/state.so"])
        target = FOLDER / row.name
        if target.exists():
            target.rename(Path(work, "old"))
        made.rename(target)
    return Kernel(row.name, release, target / f"linux-{release}")


def _correct(tree: Path, correction: Correction) -> None:
    """Raises NoKernel where there is no such line."""
    found = [file for file in tree.glob(correction.files) if correction.line in file.read_text()]
    if not found:
        raise NoKernel(f"{correction.files} of {tree.name} has no line {correction.line!r}")
    for file in found:
        file.write_text(file.read_text().replace(correction.line, correction.instead))


def prepare(out: Path) -> Setup:
    """Nothing needs to be put anywhere: files are as near as they are to this process."""
    venv = Path(sys.prefix).resolve()
    seed = shlex.join(["python3", "-c", SEED.format(secrets.token_hex(64))])
    before = FILE_SYSTEMS.format(venv=shlex.quote(str(venv)), kept_venv=KEPT_VENV, seed=seed)
    return Setup([before], KEPT_VENV, environment=ENVIRONMENT, end=POWER_OFF)


def argv(kernel: Kernel, out: Path, *, cpus: int, memory: str) -> list[str]:
    """The command that boots a guest which was prepared; it has one processor at most."""
    if cpus != 1:
        raise NoKernel("a kernel in user mode has one processor")
    # Of other file systems than the root's, perhaps.
    folders = (Path(sys.prefix).resolve(), CACHE)
    script = HOST_SCRIPT.format(
        work=shlex.quote(str(out / "machine")),
        folders=shlex.join(map(str, folders)),
        out=shlex.quote(str(out)),
        guest_out=GUEST_OUT,
        state=shlex.quote(str(kernel.image.with_name("state.so"))),
        image=shlex.quote(str(kernel.image)),
        memory=memory,
    )
    (out / "machine.sh").write_text(script)
    alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return [*alone, "--mount-proc", "bash", str(out / "machine.sh")]
