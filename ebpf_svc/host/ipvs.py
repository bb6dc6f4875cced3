"""The kernel's virtual servers (IPVS): listed from proc, removed over netlink."""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.net import Protocol

PROC = Path("/proc/thread-self/net/ip_vs")
"""Of this thread's network namespace; there is none while the module is not loaded."""
_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """An address IPVS answers for."""

    address: str
    port: int
    protocol: Protocol
    active_count: int = 0
    """Connections that are established, over all its real servers."""


def virtual_servers() -> tuple[VirtualServer, ...]:
    """Every virtual server that has an address; empty without IPVS.

    Those for a mark of the firewall are left out: kube-proxy has none.
    """
    try:
        return parse(PROC.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return ()


def parse(text: str) -> tuple[VirtualServer, ...]:
    """Read the text of /proc/net/ip_vs."""
    found: list[VirtualServer] = []
    counting = False
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["->"] and counting:
            if words[1] == "RemoteAddress:Port":
                continue
            last = found[-1]
            active = last.active_count + int(words[4])
            found[-1] = VirtualServer(last.address, last.port, last.protocol, active)
        elif words:
            counting = words[0] in Protocol.__members__
            if counting:
                address, _, port = words[1].rpartition(":")
                found.append(VirtualServer(_address(address), int(port, 16), Protocol(words[0])))
    return tuple(found)


def _address(text: str) -> str:
    """`0A600001` or `[fd00:0010:…]` as everybody else writes it."""
    if text.startswith("["):
        return str(ipaddress.ip_address(text.strip("[]")))
    return str(ipaddress.ip_address(int(text, 16)))


def remove(servers: Iterable[VirtualServer]) -> None:
    """Remove virtual servers; one that is gone already is fine.

    Raises:
        DataplaneError: the kernel refused one.
    """
    from pyroute2 import IPVS, IPVSService  # noqa: PLC0415  # hardly ever needed
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    with IPVS() as ipvs:
        for server in servers:
            service = IPVSService(
                addr=server.address, port=server.port, protocol=_NUMBERS[server.protocol]
            )
            try:
                ipvs.service("del", service=service)
            except NetlinkError as error:
                if error.code not in (errno.ESRCH, errno.ENOENT):
                    where = f"{server.address} port {server.port}"
                    raise DataplaneError(f"virtual server {where}: {error}") from error
