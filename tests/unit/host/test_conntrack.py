"""Connection tracking gets the limits and timeouts kube-proxy would give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.config import ConntrackSettings
from ebpf_svc.host import conntrack, sysctl
from ebpf_svc.host.conntrack import set_up, wanted_max

CPUS = 4
KERNEL = {
    "max": 65536,
    "tcp_timeout_established": 432000,
    "tcp_timeout_close_wait": 60,
    "udp_timeout": 30,
    "udp_timeout_stream": 120,
    "tcp_be_liberal": 0,
}


class Kernel:
    """/proc/sys and /sys of a machine."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "net/netfilter"
        self.folder.mkdir(parents=True)
        self.hashsize = root / "hashsize"
        self.hashsize.write_text("16384\n")
        for name, value in KERNEL.items():
            self.path(name).write_text(f"{value}\n")

    def path(self, name: str) -> Path:
        return self.folder / f"nf_conntrack_{name}"

    def changed(self) -> dict[str, int]:
        now = {name: int(self.path(name).read_text()) for name in KERNEL}
        return {name: value for name, value in now.items() if value != KERNEL[name]}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path)
    monkeypatch.setattr(sysctl, "ROOT", tmp_path)
    monkeypatch.setattr(conntrack, "HASHSIZE", kernel.hashsize)
    monkeypatch.setattr(conntrack.os, "sched_getaffinity", lambda _: set(range(CPUS)))
    return kernel


@pytest.mark.parametrize(
    ("settings", "cpus", "expected"),
    [
        ({}, 2, 131_072),
        ({}, 8, 262_144),
        ({}, 100, 1_048_576),
        ({"min": 2_000_000}, 100, 2_000_000),
        ({"max_per_core": 0}, 8, None),
        ({"max_per_core": 0, "min": 2_000_000}, 8, None),
        ({"max_per_core": 1, "min": 0}, 8, 8),
    ],
)
def test_limit_is_what_kube_proxy_computes(
    settings: dict[str, Any], cpus: int, expected: int | None
) -> None:
    """CPUs times the share, at most 1 Mi, and then at least the floor (S1)."""
    assert wanted_max(ConntrackSettings(**settings), cpus) == expected


def test_defaults_set_limit_and_tcp_timeouts(kernel: Kernel) -> None:
    """1 day and 1 hour; UDP and liberal windows stay as they are (S1-S6)."""
    assert set_up(ConntrackSettings()) == ()
    assert kernel.changed() == {
        "max": 131_072,
        "tcp_timeout_established": 86_400,
        "tcp_timeout_close_wait": 3_600,
    }
    assert kernel.hashsize.read_text() == "32768"


def test_all_that_is_asked_for_is_set(kernel: Kernel) -> None:
    """A part of a second is not none at all (S3-S6)."""
    settings = ConntrackSettings(
        max_per_core=0,
        tcp_established_timeout_s=7.5,
        tcp_close_wait_timeout_s=0.5,
        udp_timeout_s=10,
        udp_stream_timeout_s=20,
        tcp_be_liberal=True,
    )
    assert set_up(settings) == ()
    assert kernel.changed() == {
        "tcp_timeout_established": 7,
        "tcp_timeout_close_wait": 1,
        "udp_timeout": 10,
        "udp_timeout_stream": 20,
        "tcp_be_liberal": 1,
    }
    assert kernel.hashsize.read_text() == "16384\n"


def test_zeros_leave_the_kernel_alone(kernel: Kernel) -> None:
    """0 = not ours to decide."""
    nothing = ConntrackSettings(
        max_per_core=0, tcp_established_timeout_s=0, tcp_close_wait_timeout_s=0
    )
    assert set_up(nothing) == ()
    assert kernel.changed() == {}


def test_larger_hash_table_stays(kernel: Kernel) -> None:
    """Buckets are only added (S2)."""
    kernel.hashsize.write_text("262144\n")
    set_up(ConntrackSettings())
    assert kernel.hashsize.read_text() == "262144\n"


def test_other_namespace_leaves_the_limits_of_the_machine_alone(kernel: Kernel) -> None:
    """There the file is read-only; timeouts are the namespace's own."""
    kernel.path("max").chmod(0o444)
    assert set_up(ConntrackSettings()) == ()
    assert "max" not in kernel.changed()
    assert "tcp_timeout_established" in kernel.changed()
    assert kernel.hashsize.read_text() == "16384\n"


@pytest.mark.parametrize(("mode", "fatal"), [(0o644, True), (0o444, False)])
def test_failure_is_fatal_where_the_machine_is_ours(kernel: Kernel, mode: int, fatal: bool) -> None:
    """S10: what cannot be set is named with why, and what would make it go away."""
    kernel.path("max").chmod(mode)
    path = kernel.path("tcp_timeout_established")
    path.unlink()
    path.mkdir()
    (failure,) = set_up(ConntrackSettings())
    assert failure.fatal is fatal
    assert str(failure) == (
        "net/netfilter/nf_conntrack_tcp_timeout_established = 86400: Is a directory "
        "(conntrack.tcpEstablishedTimeout: 0 leaves it alone)"
    )
    assert kernel.path("tcp_timeout_close_wait").read_text() == "3600"


def test_read_only_sys_is_not_fatal(kernel: Kernel) -> None:
    """Some container runtimes mount it so; the table is slower for it, no more (S2)."""
    kernel.hashsize.unlink()
    (failure,) = set_up(ConntrackSettings())
    assert not failure.fatal
    assert "hashsize = 32768" in failure.setting
