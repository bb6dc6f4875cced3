"""Stock kernels of Debian, booted in an emulator on this machine's own root file system.

The guest sees the host's files over 9p, and what it writes is gone with it, except below its `out`
folder. What Python needs comes from a disk image, the repository from an archive: over 9p each
import takes three times as long.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.vm import archive
from tests.vm.kernels import CACHE, Kernel, NoKernel, Wanted
from tests.vm.setup import GUEST_OUT, REPOSITORY, Setup

BOOT_S = 60.0
"""A guest that has not begun by then never will."""
ENVIRONMENT = {
    # How many times longer than a real machine an emulated one may take; tests read it.
    "EBPF_SVC_PATIENCE": "10",
    # The first of the 5,000 of a real machine: one seed gives every kernel the same packets.
    "EBPF_SVC_FUZZ_ROUNDS": "1000",
}
MODULES = ("virtio_blk", "ext4", "br_netfilter", "tun")
"""br_netfilter: netfilter sees what passes a bridge of pods, as on a node of Kubernetes. tun: tests
hold the other end of a device.
"""
NOT_FOR_GUESTS = ("mypy", "mypyc", "*mypyc*.so", "pip", "ruff", "kubernetes_validate")


def cached(name: str) -> Kernel | None:
    """The kernel of that name, if it was fetched before."""
    for image in sorted((CACHE / "kernels" / name).glob("boot/vmlinuz-*")):
        return Kernel(name, image.name.removeprefix("vmlinuz-"), image)
    return None


def fetch(row: Wanted) -> Kernel:
    """Get the newest image of the row's suites from the archive; raises as `machines.obtain`."""
    architecture = archive.run(["dpkg", "--print-architecture"]).strip()
    if architecture != "amd64":
        raise NoKernel(f"the ring emulates amd64 machines only, and this one is {architecture}")
    apt = row.apt
    apt.update()
    image_package = apt.behind(f"linux-image-{architecture}", r"linux-image-\d\S*")
    # Since 14, an image's parts have packages of their own.
    parts = apt.depends(image_package, r"linux-(?:binary|modules)-\d\S*")
    (CACHE / "kernels").mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".unpack-", dir=CACHE / "kernels"))
    try:
        tree = work / "tree"
        for package in apt.download([image_package, *parts], work):
            archive.run(["dpkg", "-x", str(package), str(tree)])
        if not (tree / "lib").exists():  # since 13, Debian's packages name the merged /usr
            (tree / "lib").symlink_to("usr/lib")
        for image in tree.glob("usr/lib/modules/*/vmlinuz"):  # since 14
            (tree / "boot").mkdir(exist_ok=True)
            image.rename(tree / "boot" / f"vmlinuz-{image.parent.name}")
        (image,) = tree.glob("boot/vmlinuz-*")
        release = image.name.removeprefix("vmlinuz-")
        archive.run(["depmod", "-b", str(tree), release])
        target = CACHE / "kernels" / row.name
        if target.exists():
            target.rename(work / "old")
        tree.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Kernel(row.name, release, CACHE / "kernels" / row.name / "boot" / image.name)


def prepare(out: Path) -> Setup:
    """Put what a guest needs into its folder, and say what it has to do first."""
    python_image()
    with _compiling:
        shutil.copyfile(_compiled(), out / "compiled.tar")
    folders = shlex.join(str(path) for path in _library_folders())
    before = [
        "mount -t tmpfs tmpfs /tmp",
        *(f"modprobe {name}" for name in MODULES),
        "mkdir /run/image",
        "mount -o ro,noload /dev/vda /run/image",
        f'for folder in {folders}; do mount --bind "/run/image$folder" "$folder"; done',
    ]
    after = [f"tar -C {shlex.quote(str(REPOSITORY))} -xf {GUEST_OUT}/compiled.tar"]
    return Setup(before, f"/run/image{Path(sys.prefix).resolve()}", after, ENVIRONMENT)


def argv(kernel: Kernel, out: Path, *, cpus: int, memory: str) -> list[str]:
    """The command that boots a guest which was prepared."""
    return [
        *("vng", "--verbose", "--run", str(kernel.image)),
        *("--disable-kvm", "--force-9p", "--user", "root"),
        *("--cpus", str(cpus), "--memory", memory),
        f"--rwdir={GUEST_OUT}={out}",
        f"--qemu-opts=-drive file={python_image()},if=virtio,format=raw,readonly=on",
        # Guarding against speculation costs an emulated machine a third of its speed.
        *("--append", "mitigations=off", "--append", "loglevel=4"),
        *("--", f"bash {GUEST_OUT}/guest.sh"),
    ]


_compiling = threading.Lock()


@functools.cache
def _compiled() -> Path:
    """An archive of the repository's modules, compiled, made once a process: emulated, compiling
    takes a minute. Those of tests are as pytest has them, with its own code.

    Python compares them with the sources: what has changed since is compiled in the guest.
    """
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
