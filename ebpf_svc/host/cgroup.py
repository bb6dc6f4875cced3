"""Where the cgroup2 hierarchy is."""

from __future__ import annotations

from pathlib import Path

from ebpf_svc.host.mounts import mounts

MEND = (
    "mount -t cgroup2 none /sys/fs/cgroup (or an empty directory, and name it in ebpf.cgroup_root)"
)


def find_root() -> Path | None:
    """The mount point of cgroup2, on its own or beside cgroup1; None when it is not mounted."""
    for mount in mounts():
        if mount.kind == "cgroup2":
            return mount.target
    return None
