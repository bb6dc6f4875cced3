"""Build the image without a registry, and run it in a pod's place.

The base that a builder would pull is made by mmdebstrap; buildah builds with chroot isolation, so
no container engine is needed. `Pod` then gives the image what the DaemonSet mounts, in namespaces
of its own: nothing outside them sees its programs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ebpf_svc.host.cgroup import find_root
from tests.deploy.conftest import DEPLOY, Deployed

ROOT = DEPLOY.parent
BASE = "localhost/base:bookworm"
TAG = "localhost/ebpf-svc:built"
SUITE = "bookworm"


def run(argv: Sequence[object], *, timeout_s: float = 400) -> str:
    """Run a command; its output goes into the failure when it ends with another status than 0."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Image:
    """The built image, in a storage of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.root = Path()
        """The file system of a container of it."""
        self._container = ""

    def build(self) -> None:
        """Make the base and the wheels, build, and mount a container."""
        base, wheels = self._folder / "base.tar", self._folder / "wheels"
        run(["mmdebstrap", "--quiet", "--variant=minbase", SUITE, base])
        container = self._buildah("from", "scratch")
        self._buildah("add", "--quiet", container, base, "/")
        self._buildah("commit", "--quiet", container, BASE)
        self._buildah("rm", container)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        run([*pip, "download", "--dest", wheels, ROOT, "hatchling"])
        self._buildah(
            *("bud", "--isolation", "chroot", "--pull-never", "--file", DEPLOY / "Dockerfile"),
            *("--ignorefile", DEPLOY / "Dockerfile.dockerignore"),
            *("--build-arg", f"BASE={BASE}", "--build-arg", "PIP_NO_INDEX=1"),
            *("--build-arg", "PIP_FIND_LINKS=/wheels", "--volume", f"{wheels}:/wheels:ro"),
            *("--tag", TAG, ROOT),
        )
        self._container = self._buildah("from", "--pull-never", TAG)
        self.root = Path(self._buildah("mount", self._container))

    def run(self, *argv: str) -> str:
        """Run a command in a container, its entrypoint left aside."""
        return self._buildah("run", "--isolation", "chroot", self._container, "--", *argv)

    def configuration(self) -> Any:
        """What the image says about itself: Entrypoint, Labels, Env and so on."""
        return json.loads(self._buildah("inspect", "--type", "image", TAG))["OCIv1"]["config"]

    def remove(self) -> None:
        """Unmount; the storage goes with its folder."""
        with suppress(AssertionError):
            self._buildah("rm", "--all")

    def _buildah(self, *words: object) -> str:
        storage = [f"--root={self._folder}/storage", f"--runroot={self._folder}/run"]
        return run(["buildah", "--storage-driver=vfs", *storage, *words]).strip()


class Pod:
    """The image run as the DaemonSet says, in network and mount namespaces of its own."""

    def __init__(self, image: Image, deployed: Deployed, folder: Path) -> None:
        self._root, self._folder = image.root, folder
        self.program = image.configuration()["Entrypoint"]
        self._deployed = deployed
        self._stack = ExitStack()
        hierarchy = find_root()
        assert hierarchy is not None, "no cgroup2 here"
        self.cgroup = hierarchy / f"ebpf-svc-image-{os.getpid()}"
        """Plays the node's whole hierarchy: only processes in it are translated."""
        self.log = folder / "agent.log"
        self._keeper: subprocess.Popen[bytes] | None = None
        self._agent: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.cgroup.mkdir()
        self._stack.callback(self.cgroup.rmdir)
        script = self._folder / "pod.sh"
        script.write_text(
            "\n".join(["set -eu", *self._preparation(), "echo ready", "exec sleep 1000"])
        )
        self._keeper = subprocess.Popen(
            ["unshare", "--net", "--mount", "bash", script], stdout=subprocess.PIPE
        )
        self._stack.callback(self._end)
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == b"ready\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def volume(self, name: str) -> Path:
        """What plays a volume of the pod."""
        return self._folder / name

    def start(self, *arguments: str) -> None:
        """Run the entrypoint with these arguments."""
        with self.log.open("wb") as log:
            self._agent = subprocess.Popen(
                [*self._enter(), *self.program, *arguments], stdout=log, stderr=log
            )

    def execute(self, *argv: str) -> str:
        """Run a command in the running pod, as `kubectl exec` does."""
        return run([*self._enter(), *argv], timeout_s=60)

    def outside(self, *argv: str) -> str:
        """Run a command of this machine in the pod's network and the cgroup it serves."""
        join = f'echo $$ > {self.cgroup}/cgroup.procs && exec "$@"'
        return run(["nsenter", f"--net={self._network}", "sh", "-c", join, "sh", *argv])

    def wait_for(self, event: str, deadline_s: float = 60) -> None:
        """Wait for a line of the log."""
        end = time.monotonic() + deadline_s
        while event not in self.log.read_text():
            assert self._agent is not None
            tail = self.log.read_text()[-4000:]
            assert self._agent.poll() is None, f"ended before {event}: {tail}"
            assert time.monotonic() < end, f"no {event}: {tail}"
            time.sleep(0.05)

    def _preparation(self) -> list[str]:
        """Mounts as the container runtime makes them, then a root nobody can write to."""
        root, lines = self._root, []
        lines.append(f"mount --bind {root} {root}")
        for place, (_, volume) in self._deployed.mounts().items():
            is_file = volume.get("hostPath", {}).get("type") == "FileOrCreate"
            at = root / place.relative_to("/")
            if not place.is_relative_to("/sys"):
                make = f"mkdir -p {at.parent} && touch {at}" if is_file else f"mkdir -p {at}"
                lines.append(make)
        lines += [
            f"mount -o remount,bind,ro {root}",
            f"mount -t proc proc {root}/proc",
            f"mount -t sysfs sysfs {root}/sys",
            f"mount --bind /dev {root}/dev",
        ]
        for place, (mount, volume) in self._deployed.mounts().items():
            at = root / place.relative_to("/")
            if place == Path("/sys/fs/bpf"):
                lines.append(f"mount -t bpf bpf {at}")
                continue
            source = self.volume(volume["name"])
            if place == Path("/sys/fs/cgroup"):
                source = self.cgroup
            elif volume.get("hostPath", {}).get("type") == "FileOrCreate":
                source.touch()
            else:
                source.mkdir()
                if "configMap" in volume:
                    self._write_config(source, volume["configMap"]["name"])
            lines.append(f"mount --bind {source} {at}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {at}")
        return [*lines, "ip link set lo up"]

    def _write_config(self, folder: Path, name: str) -> None:
        for each in self._deployed.objects:
            if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", name):
                for file, text in each["data"].items():
                    (folder / file).write_text(text)

    @property
    def _network(self) -> str:
        assert self._keeper is not None
        return f"/proc/{self._keeper.pid}/ns/net"

    def _enter(self) -> list[str]:
        assert self._keeper is not None
        target = f"--target={self._keeper.pid}"
        return ["nsenter", target, "--net", "--mount", "chroot", str(self._root)]

    def _end(self) -> None:
        """The agent as a kubelet ends it, then everything in the namespaces."""
        if self._agent is not None and self._agent.poll() is None:
            self._agent.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._agent.wait(10)
        assert self._keeper is not None
        self._keeper.kill()
        self._keeper.wait()
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()
