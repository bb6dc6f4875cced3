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
from pathlib import Path

from tests.vm import archive
from tests.vm.kernels import CACHE, Kernel, NoKernel, Wanted
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
CORRECTIONS = {
    "kernel/bpf/*.c": (
        "env->prog->aux->stack_depth = subprogs[0].stack_depth;",
        "if (env->prog->aux->stack_depth < subprogs[0].stack_depth) "
        "env->prog->aux->stack_depth = subprogs[0].stack_depth;",
    ),
    "arch/um/kernel/trap.c": (
        "flush_tlb_kernel_vm();",
        "flush_tlb_kernel_range(address & PMD_MASK, (address & PMD_MASK) + PMD_SIZE);",
    ),
}
"""By file: a line that some versions have, and what it is replaced by.

The first, from 6.9 on: without machine code a program runs on the stack of the one that called it,
so the verifier asks for the deepest stack where it sees a tail call. That line, run later, forgets
it: the called program writes over the interpreter's registers, and the kernel dies.
The second, before 6.11: the first touch of new memory looked at all memory of maps there is.
"""
POWER_OFF = "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)'"


def cached(name: str) -> Kernel | None:
    """The kernel of that name, if it was built before from what it would be built from now."""
    folder = FOLDER / name
    for image in sorted(folder.glob("linux-*")):
        recipe = folder / RECIPE
        if recipe.exists() and recipe.read_text() == _recipe():
            return Kernel(name, image.name.removeprefix("linux-"), image)
    return None


def _recipe() -> str:
    """All that is ours of what a kernel is made from."""
    ours = [CONFIGURATION.read_text(), STATE.read_text(), FLAGS]
    return "\n".join([*ours, *(word for pair in CORRECTIONS.values() for word in pair)])


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
        for pattern, correction in CORRECTIONS.items():
            for file in tree.glob(pattern):
                file.write_text(file.read_text().replace(*correction))
        make = ["make", "-C", str(tree), "ARCH=um"]
        archive.run([*make, f"KCONFIG_ALLCONFIG={CONFIGURATION}", "allnoconfig"])
        archive.run([*make, f"-j{os.cpu_count()}", f"KCFLAGS={FLAGS}", "linux"])
        release = archive.run([*make, "-s", "kernelrelease"]).strip()
        made = Path(work, "made")
        made.mkdir()
        (made / RECIPE).write_text(_recipe())
        (tree / "linux").rename(made / f"linux-{release}")
        compile_state = ["cc", "-O2", "-Wall", "-shared", "-fPIC", str(STATE)]
        archive.run([*compile_state, "-o", f"{made}/state.so"])
        target = FOLDER / row.name
        if target.exists():
            target.rename(Path(work, "old"))
        made.rename(target)
    return Kernel(row.name, release, target / f"linux-{release}")


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
