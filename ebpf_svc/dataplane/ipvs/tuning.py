"""Settings of the kernel that ipvs mode needs (V2, V3)."""

from __future__ import annotations

import platform
import re

from ebpf_svc.config.ipvs import IpvsSettings
from ebpf_svc.dataplane.ipvs.kernel import Kernel
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import sysctl

_SYSCTLS = {
    "net/ipv4/vs/conntrack": "1",
    "net/ipv4/vs/expire_nodest_conn": "1",
    "net/ipv4/vs/expire_quiescent_template": "1",
    "net/ipv4/ip_forward": "1",
}
_REUSE_MODE = "net/ipv4/vs/conn_reuse_mode"
_REUSE_MENDED = (5, 9)
"""From this kernel on a client's port that is used again goes to another real server unharmed."""
_STRICT_ARP = {"net/ipv4/conf/all/arp_ignore": "1", "net/ipv4/conf/all/arp_announce": "2"}


def set_up(settings: IpvsSettings, kernel: Kernel) -> None:
    """Write sysctls and time-outs; raises DataplaneError."""
    wanted = dict(_SYSCTLS)
    major, minor, *_ = (int(part) for part in re.findall(r"\d+", platform.release()))
    if (major, minor) < _REUSE_MENDED:
        wanted[_REUSE_MODE] = "0"
    if settings.strict_arp:
        wanted |= _STRICT_ARP
    for name, value in wanted.items():
        try:
            sysctl.write(name, value)
        except OSError as error:
            dotted = name.replace("/", ".")
            raise DataplaneError(f"{dotted} = {value}: {error.strerror}") from error
    timeouts = (settings.tcp_timeout_s, settings.tcp_fin_timeout_s, settings.udp_timeout_s)
    if any(timeouts):
        kernel.set_timeouts(*timeouts)
