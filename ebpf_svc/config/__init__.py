"""What the agent can be told, and how the user's words become values.

Reads our own files and flags, and kube-proxy's; validated once, here, at the edge, so that the rest
of the program trusts what it gets.
"""

from __future__ import annotations

from ebpf_svc.config.ebpf import EbpfSettings, SocketLB
from ebpf_svc.config.kubernetes import KubernetesSettings
from ebpf_svc.config.settings import (
    ConntrackSettings,
    DetectLocal,
    DetectLocalMode,
    LogLevel,
    LogSettings,
    Mode,
    Settings,
)

__all__ = [
    "ConntrackSettings",
    "DetectLocal",
    "DetectLocalMode",
    "EbpfSettings",
    "KubernetesSettings",
    "LogLevel",
    "LogSettings",
    "Mode",
    "Settings",
    "SocketLB",
]
