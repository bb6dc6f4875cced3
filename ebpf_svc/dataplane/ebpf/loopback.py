"""What the kernel must let pass on the loopback device where no socket hooks translate.

Answers come back in there: from an address of the node to another, or between loopback addresses,
which the kernel takes from nobody unless told to. On this device it says nothing about other
machines, for only the node itself sends there; so it stays when we go.
"""

from __future__ import annotations

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import sysctl

_SETTINGS = ("net/ipv4/conf/lo/accept_local", "net/ipv4/conf/lo/route_localnet")


def allow() -> None:
    """Let both pass, in this network namespace; raises DataplaneError."""
    for setting in _SETTINGS:
        try:
            sysctl.write(setting, "1")
        except OSError as error:
            raise DataplaneError(f"sysctl {setting}: {error.strerror}") from error
