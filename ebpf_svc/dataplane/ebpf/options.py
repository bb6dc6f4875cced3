"""What the settings come to on the kernel at hand."""

from __future__ import annotations

import platform
import re

from ebpf_svc.config import EbpfSettings, SocketLB
from ebpf_svc.dataplane.ebpf.constants import FAST_PATH_KERNEL


def kernel() -> tuple[int, int]:
    """Major and minor version of this kernel."""
    major, minor, *_ = (int(part) for part in re.findall(r"\d+", platform.release()))
    return major, minor


def uses_fast_path(settings: EbpfSettings) -> bool:
    """Whether flows may go past the stack: asked for, and safe on this kernel."""
    return settings.fast_path and kernel() >= FAST_PATH_KERNEL


def hooks_see_pods(settings: EbpfSettings) -> bool:
    """Whether the socket hooks act for pods, not only for host processes.

    A pod whose connections they translate sends plain packets, which the stack forwards: with the
    fast path that would be the slower way.
    """
    return settings.socket_lb is SocketLB.FULL and not uses_fast_path(settings)
