"""The cookie of a network namespace, by both ways to learn it."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.host import cgroup, features, netns
from tests.lib.kernel import running_kernel

pytestmark = pytest.mark.root


class OldSocket(socket.socket):
    """What Linux 5.10 answers."""

    def getsockopt(self, level: int, option: int, *rest: int) -> int | bytes:
        if option == netns.SO_NETNS_COOKIE:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        return super().getsockopt(level, option, *rest)


@pytest.fixture
def root() -> Path:
    found = cgroup.find_root()
    assert found is not None
    return found


def test_program_and_socket_option_tell_the_same(root, monkeypatch):
    """Linux before 5.14 tells a process nothing, but a program: the hooks know their node there."""
    monkeypatch.setattr(netns.socket, "socket", OldSocket)
    ours, elsewhere = netns.cookie(root), features.in_new_netns(lambda: netns.cookie(root))
    monkeypatch.undo()

    assert 0 < ours != elsewhere > 0
    if running_kernel() >= (5, 14):
        assert ours == netns.cookie(root)


def test_process_outside_the_cgroup_is_told_so(root, monkeypatch):
    """Hooks on a cgroup that does not hold the agent are a mistake of the settings there."""
    monkeypatch.setattr(netns.socket, "socket", OldSocket)
    empty = root / "ebpf-svc-test-netns"
    empty.mkdir()
    try:
        with pytest.raises(UnsupportedHost, match="this process is in no cgroup of"):
            netns.cookie(empty)
    finally:
        empty.rmdir()
