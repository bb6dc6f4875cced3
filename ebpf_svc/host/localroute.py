"""Make addresses this node's own by routes, without giving them to an interface.

An address on an interface counts as the node's: it would get node ports, and be chosen as source. A
route of type `local` only lets packets in. Ours are told by their protocol number.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from contextlib import closing

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import netlink, rtnetlink
from ebpf_svc.model.net import Family, family_of

PROTOCOL = 117
"""Not in any rt_protos list; `ip route show table local proto 117` shows ours."""
_NEW, _DELETE, _GET = 24, 25, 26
_TABLE_LOCAL, _SCOPE_HOST, _TYPE_LOCAL = 255, 254, 2
_DESTINATION, _DEVICE, _TABLE = 1, 4, 15
_GET_ADDRESS, _ADDRESS, _LOCAL = 22, 1, 2
_LOOPBACK = 1
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_BITS = {Family.V4: 32, Family.V6: 128}
_ROUTE = struct.Struct("=BBBBBBBBI")
"""rtmsg: family, destination's and source's length, TOS, table, protocol, scope, type, flags."""


def add(addresses: Iterable[str]) -> int:
    """Let packets to these addresses in; returns how many were not yet. Raises DataplaneError."""
    flags = netlink.CREATE | netlink.EXCL
    return _request([(_NEW, flags, _body(each)) for each in addresses], errno.EEXIST)


def remove(addresses: Iterable[str]) -> int:
    """Take these routes of ours away; returns how many were there. Raises DataplaneError."""
    return _request([(_DELETE, 0, _body(each)) for each in addresses], errno.ESRCH)


def present() -> set[str]:
    """The addresses that have a route of ours; raises DataplaneError."""
    found = set()
    try:
        with closing(rtnetlink.Socket()) as link:
            for af in _AF.values():
                # Asked for all of a family: old kernels do not look at more of the question.
                for message in link.dump(_GET, _ROUTE.pack(af, 0, 0, 0, 0, 0, 0, 0, 0)):
                    _, _, _, _, table, protocol, _, kind, _ = _ROUTE.unpack_from(message.body)
                    if (table, protocol, kind) == (_TABLE_LOCAL, PROTOCOL, _TYPE_LOCAL):
                        fields = netlink.attributes(message.body[_ROUTE.size :])
                        found.add(socket.inet_ntop(af, fields[_DESTINATION]))
    except OSError as error:
        raise DataplaneError(f"routes cannot be listed: {error.strerror}") from error
    return found


def own_addresses() -> frozenset[str]:
    """The addresses of this node's interfaces; raises DataplaneError."""
    found = set()
    try:
        with closing(rtnetlink.Socket()) as link:
            for af in _AF.values():
                for message in link.dump(_GET_ADDRESS, struct.pack("=BBBBI", af, 0, 0, 0, 0)):
                    fields = netlink.attributes(message.body[8:])
                    packed = fields.get(_LOCAL) or fields[_ADDRESS]
                    found.add(socket.inet_ntop(af, packed))
    except OSError as error:
        raise DataplaneError(f"addresses cannot be listed: {error.strerror}") from error
    return frozenset(found)


def _body(address: str) -> bytes:
    family = family_of(address)
    header = (_AF[family], _BITS[family], 0, 0, _TABLE_LOCAL, PROTOCOL, _SCOPE_HOST, _TYPE_LOCAL, 0)
    return (
        _ROUTE.pack(*header)
        + netlink.attribute(_DESTINATION, socket.inet_pton(_AF[family], address))
        + netlink.attribute(_DEVICE, struct.pack("=I", _LOOPBACK))
    )


def _request(wanted: list[tuple[int, int, bytes]], harmless: int) -> int:
    if not wanted:
        return 0
    try:
        with closing(rtnetlink.Socket()) as link:
            outcomes = link.requests(wanted)
    except OSError as error:
        raise DataplaneError(f"routes cannot be changed: {error.strerror}") from error
    for failure in outcomes:
        if failure is not None and failure.errno != harmless:
            raise DataplaneError(f"a route cannot be changed: {failure.reason}")
    return outcomes.count(None)
