"""Reading the mount table."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_svc.host import mounts
from ebpf_svc.host.mounts import Mount


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Mount("none", Path("/"), "ext4"),
        Mount("bpf", Path("/sys/fs/bpf"), "bpf"),
        Mount("none", Path("/sys/fs/bpf/over"), "tmpfs"),
        Mount("none", Path("/twice"), "bpf"),
        Mount("none", Path("/twice"), "tmpfs"),
    ]
    monkeypatch.setattr(mounts, "mounts", lambda: found)


@pytest.mark.parametrize(
    ("path", "is_bpffs"),
    [
        ("/sys/fs/bpf", True),
        ("/sys/fs/bpf/ebpf-svc/v1", True),
        ("/sys/fs/bpffs", False),
        ("/sys/fs", False),
        ("/sys/fs/bpf/over/x", False),
        ("/twice", False),
    ],
)
def test_path_lies_on_the_innermost_and_latest_mount(table, path, is_bpffs):
    """A name that merely starts alike, or a mount on top, is not the BPF file system."""
    assert mounts.is_on_bpffs(Path(path)) is is_bpffs


def test_spaces_in_mount_points_are_read(monkeypatch):
    """The kernel writes them as octal numbers."""
    line = "none /mnt/a\\040b\\134c tmpfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: line)

    assert mounts.mounts() == [Mount("none", Path("/mnt/a b\\c"), "tmpfs")]
