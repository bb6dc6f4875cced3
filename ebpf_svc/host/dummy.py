"""A device that only holds addresses, and the addresses of this network namespace.

Thousands of addresses come and go in a few system calls.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import rtnetlink
from ebpf_svc.host.netlink import CREATE, EXCL, Failure, attribute, attributes
from ebpf_svc.model.net import Family, family_of

_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_IFINFO = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
"""ifaddrmsg: family, prefix length, flags, scope, device."""
_LOCAL, _LIFETIMES, _FLAGS = 2, 6, 8
_NO_DAD = 0x02
_DEPRECATED = struct.pack("=IIII", 0, 0xFFFF_FFFF, 0, 0)
"""ifa_cacheinfo: preferred for no time, valid for ever."""
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_BITS = {Family.V4: 32, Family.V6: 128}


class Held(NamedTuple):
    """An address of an interface."""

    address: str
    device: int
    """Its index."""
    flags: int
    """IFA_F_*."""


def index_of(name: str) -> int:
    """The device of that name in this thread's network namespace; 0 = there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def create(link: rtnetlink.Socket, name: str) -> int:
    """Make the device unless it is there, and return its index.

    It stays down, which does not keep packets from its addresses.

    Raises:
        DataplaneError: the kernel has no dummy devices.
    """
    info = attribute(18, attribute(1, b"dummy\0"))
    body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(3, name.encode() + b"\0") + info
    (failure,) = link.requests([(rtnetlink.NEWLINK, CREATE | EXCL, body)])
    if failure is not None and failure.errno != errno.EEXIST:
        raise DataplaneError(f"device {name}: {failure.reason} (module dummy)")
    return index_of(name)


def remove(link: rtnetlink.Socket, name: str) -> None:
    """Remove the device with its addresses; fine when it is gone. Raises DataplaneError."""
    index = index_of(name)
    if index:
        body = _IFINFO.pack(0, 0, index, 0, 0)
        (failure,) = link.requests([(rtnetlink.DELLINK, 0, body)])
        if failure is not None and failure.errno != errno.ENODEV:
            raise DataplaneError(f"device {name}: {failure.reason}")


def add_addresses(
    link: rtnetlink.Socket, index: int, addresses: Iterable[str]
) -> list[Failure | None]:
    """Give a device addresses, each for itself; one that is there is fine.

    Of IPv6 they are deprecated: nothing that may choose its source chooses them. Towards a device
    without an address of its own, as a pod's, the kernel would take that of whatever device has
    most bits in common with the receiver's.
    """
    flags = CREATE | EXCL
    wanted = [(_NEW_ADDRESS, flags, _body(index, address)) for address in addresses]
    return _forgive(link.requests(wanted), errno.EEXIST)


def remove_addresses(
    link: rtnetlink.Socket, index: int, addresses: Iterable[str]
) -> list[Failure | None]:
    """Take addresses from a device; one that is gone is fine."""
    wanted = [(_DELETE_ADDRESS, 0, _body(index, address)) for address in addresses]
    return _forgive(link.requests(wanted), errno.EADDRNOTAVAIL)


def addresses(link: rtnetlink.Socket) -> list[Held]:
    """Every address of every device of the namespace.

    Raises:
        OSError: the kernel does not say.
    """
    found = []
    for message in link.dump(_GET_ADDRESS, _ADDRESS.pack(0, 0, 0, 0, 0)):
        _, _, flags, _, index = _ADDRESS.unpack_from(message.body)
        given = attributes(message.body[_ADDRESS.size :])
        # On point-to-point links IFA_ADDRESS is the other end's.
        packed = given.get(_LOCAL) or given.get(1)
        if packed is None:
            continue
        if _FLAGS in given:
            (flags,) = struct.unpack("=I", given[_FLAGS])
        found.append(Held(str(ipaddress.ip_address(packed)), index, flags))
    return found


def _body(index: int, address: str) -> bytes:
    family = family_of(address)
    packed = socket.inet_pton(_AF[family], address)
    body = (
        _ADDRESS.pack(_AF[family], _BITS[family], 0, 0, index)
        + attribute(_LOCAL, packed)
        + attribute(1, packed)
    )
    if family is Family.V4:
        return body
    return body + attribute(_LIFETIMES, _DEPRECATED) + attribute(_FLAGS, struct.pack("=I", _NO_DAD))


def _forgive(answers: list[Failure | None], harmless: int) -> list[Failure | None]:
    return [None if one is not None and one.errno == harmless else one for one in answers]
