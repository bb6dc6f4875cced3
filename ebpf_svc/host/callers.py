"""Who calls from a network namespace: the socket hooks know callers by its cookie alone."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from ebpf_svc.host import netlink
from ebpf_svc.host.netlink import attributes
from ebpf_svc.host.netns import SO_NETNS_COOKIE
from ebpf_svc.host.sockets import in_namespace, network_namespaces

_GETADDR, _IFADDRMSG = 22, 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2


class Namespace(NamedTuple):
    """A network namespace some process lives in."""

    cookie: int
    addresses: tuple[str, ...]
    """Its own, loopback and link-local ones left out."""


def own_cookie() -> int:
    """The cookie of this thread's network namespace; 0 where it cannot be asked for (5.14)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            told = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        except OSError:
            return 0
    return int.from_bytes(told, sys.byteorder)


def namespaces(cgroup: Path) -> Mapping[int, Namespace]:
    """The network namespaces of the processes below a cgroup, by cookie.

    Those that go while they are looked at are left out.
    """
    found = {}
    for path in network_namespaces(cgroup):
        try:
            namespace = in_namespace(path, _look)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                raise
            continue
        if namespace is not None:
            found[namespace.cookie] = namespace
    return found


def _look() -> Namespace:
    return Namespace(own_cookie(), local_addresses())


def local_addresses() -> tuple[str, ...]:
    """Addresses of this thread's network namespace, loopback and link-local ones left out."""
    with closing(netlink.Socket(socket.NETLINK_ROUTE)) as link:
        found = [_address(message.body) for message in link.dump(_GETADDR, bytes(_IFADDRMSG))]
    return tuple(
        str(address) for address in found if not (address.is_loopback or address.is_link_local)
    )


def _address(body: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = attributes(body[_IFADDRMSG:])
    # On point-to-point links IFA_ADDRESS is the other end's.
    return ipaddress.ip_address(found.get(_IFA_LOCAL) or found[_IFA_ADDRESS])
