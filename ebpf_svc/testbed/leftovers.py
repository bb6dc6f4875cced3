"""Whose a cluster is, and the removal of one by its id alone: also after its process was killed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from ebpf_svc.errors import EbpfSvcError
from ebpf_svc.testbed import cgroup, kernel

RUN_DIR = Path("/run/ebpf-svc-testbed")
CGROUP_NAME = "ebpf-svc-testbed"
NAME_PREFIX = "esvc-"

_OWNER = "owner"
_KEPT = "kept"


class LeftoverError(EbpfSvcError):
    """A removed cluster left something behind; each entry of `traces` names one."""

    def __init__(self, traces: tuple[str, ...]) -> None:
        super().__init__(f"left behind: {', '.join(traces)}")
        self.traces = traces


def claim(folder: Path) -> None:
    """Make a cluster's folder and write down that it is this process's."""
    folder.mkdir(parents=True)
    pid = os.getpid()
    (folder / _OWNER).write_text(f"{pid} {_start_time(pid)}")


def keep(folder: Path) -> None:
    """Mark a cluster as meant to outlive its process."""
    (folder / _KEPT).touch()


def remove(cluster_id: str) -> None:
    """Remove a cluster's processes, cgroups, mounts, namespaces and files; raises LeftoverError."""
    group, folder = cgroup.cgroup2_root() / CGROUP_NAME / cluster_id, RUN_DIR / cluster_id
    cgroup.remove(group)
    for target in kernel.mounts_below(folder):
        kernel.unmount(target)
    for name in _namespaces(cluster_id):
        kernel.remove_netns(name)
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (group.parent, folder.parent):
        with suppress(OSError):  # other clusters live there
            parent.rmdir()
    if left := traces(cluster_id):
        raise LeftoverError(left)


def traces(cluster_id: str) -> tuple[str, ...]:
    """Everything on this machine that carries the id."""
    group, folder = cgroup.cgroup2_root() / CGROUP_NAME / cluster_id, RUN_DIR / cluster_id
    return (
        *(str(path) for path in (group, folder) if path.exists()),
        *(f"mount {path}" for path in kernel.mounts_below(folder)),
        *(f"netns {name}" for name in _namespaces(cluster_id)),
    )


def cleanup(*, kept: bool) -> tuple[str, ...]:
    """Remove clusters whose owner has ended; kept ones only if asked. Returns their ids."""
    ids = {path.name for path in RUN_DIR.glob("*")}
    gone = tuple(sorted(one for one in ids if _abandoned(RUN_DIR / one, kept=kept)))
    for one in gone:
        remove(one)
    return gone


def _abandoned(folder: Path, *, kept: bool) -> bool:
    if (folder / _KEPT).exists():
        return kept
    try:
        pid, started = (folder / _OWNER).read_text().split()
    except (OSError, ValueError):
        return False  # just being made
    return _start_time(int(pid)) != int(started)


def _start_time(pid: int) -> int:
    """When a process began, in ticks since boot: with the pid it names one process; 0 = none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[19])


def _namespaces(cluster_id: str) -> tuple[str, ...]:
    prefix = f"{NAME_PREFIX}{cluster_id}-"
    return tuple(sorted(path.name for path in kernel.NETNS_DIR.glob(f"{prefix}*")))


if __name__ == "__main__":
    for removed in cleanup(kept=True):
        print(f"removed cluster {removed}")
