"""What settings come to on a kernel."""

from __future__ import annotations

import platform

import pytest

from ebpf_svc.config import EbpfSettings, SocketLB
from ebpf_svc.dataplane.ebpf import options


@pytest.mark.parametrize(
    ("release", "fast_path", "socket_lb", "expected"),
    [
        ("6.18.4-custom", False, SocketLB.FULL, (False, True)),
        ("6.18.4-custom", True, SocketLB.FULL, (True, False)),
        ("6.1.0-56-amd64", True, SocketLB.FULL, (True, False)),
        # There the fast path is ignored, so pods keep what is fastest without it.
        ("5.10.0-46-amd64", True, SocketLB.FULL, (False, True)),
        ("6.18.4-custom", False, SocketLB.HOST_ONLY, (False, False)),
        # Without hooks no program has room for it.
        ("6.18.4-custom", True, SocketLB.OFF, (False, False)),
    ],
)
def test_pods_take_the_faster_way(
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    fast_path: bool,
    socket_lb: SocketLB,
    expected: tuple[bool, bool],
) -> None:
    """Sockets are translated where the stack forwards, packets where the fast path does."""
    monkeypatch.setattr(platform, "release", lambda: release)
    settings = EbpfSettings(fast_path=fast_path, socket_lb=socket_lb)
    found = options.uses_fast_path(settings), options.hooks_see_pods(settings)
    assert found == expected
