"""What the settings come to on the kernel at hand."""

from __future__ import annotations

import platform
import re

from ebpf_svc.config import EbpfSettings, SocketLB


def kernel() -> tuple[int, int]:
    """Major and minor version of this kernel."""
    major, minor, *_ = (int(part) for part in re.findall(r"\d+", platform.release()))
    return major, minor


def uses_fast_path(settings: EbpfSettings) -> bool:
    """Whether flows may go past the stack: asked for, and nothing is in the way."""
    return settings.fast_path and not why_no_fast_path(settings)


def why_no_fast_path(settings: EbpfSettings) -> str:
    """What is in its way; empty = nothing."""
    if translates_host_packets(settings):
        return "without socket hooks no program has room for it"
    return ""


def translates_host_packets(settings: EbpfSettings) -> bool:
    """Whether host processes are translated by packet, for want of socket hooks."""
    return settings.socket_lb is SocketLB.OFF


def hooks_see_pods(settings: EbpfSettings) -> bool:
    """Whether the socket hooks act for pods, not only for host processes.

    A pod whose connections they translate sends plain packets, which the stack forwards: with the
    fast path that would be the slower way.
    """
    return settings.socket_lb is SocketLB.FULL and not uses_fast_path(settings)
