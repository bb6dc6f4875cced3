"""What settings come to on a kernel."""

from __future__ import annotations

import pytest

from ebpf_svc.config import EbpfSettings, SocketLB
from ebpf_svc.dataplane.ebpf import options


@pytest.mark.parametrize(
    ("fast_path", "socket_lb", "expected"),
    [
        (False, SocketLB.FULL, (False, True)),
        (True, SocketLB.FULL, (True, False)),
        (False, SocketLB.HOST_ONLY, (False, False)),
        # Without hooks no program has room for it.
        (True, SocketLB.OFF, (False, False)),
    ],
)
def test_pods_take_the_faster_way(
    fast_path: bool, socket_lb: SocketLB, expected: tuple[bool, bool]
) -> None:
    """Sockets are translated where the stack forwards, packets where the fast path does."""
    settings = EbpfSettings(fast_path=fast_path, socket_lb=socket_lb)
    found = options.uses_fast_path(settings), options.hooks_see_pods(settings)
    assert found == expected
