"""Network devices and the tc filters on them, in the words of the kernel.

Knows nothing of whose filters they are.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ebpf_svc.host import rtnetlink
from ebpf_svc.host.netlink import CREATE, EXCL, Failure, Message, attribute, attributes

_IFINFO = struct.Struct("=BxHiII")
_XDP, _NESTED, _XDP_IN_DRIVER = 43, 0x8000, 1 << 2
_XDP_ATTACHED_IN_DRIVER = b"\1"
_IFADDR = struct.Struct("=BBBBI")
"""ifaddrmsg: family, prefix length, flags, scope, device."""
_SECONDARY = 0x01  # IFA_F_SECONDARY; of IPv6 it means temporary
_NOT_A_SOURCE = 0x08 | 0x20 | 0x40  # IFA_F_DADFAILED, _DEPRECATED, _TENTATIVE
_TCMSG = struct.Struct("=BxxxiIII")

_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_DIRECT_ACTION = 1


class Side(IntEnum):
    """The two filter lists of a clsact qdisc; the value is the filter's parent."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


@dataclass(frozen=True, slots=True)
class Link:
    """A network device."""

    index: int
    name: str
    kind: str
    """rtnetlink's word, e.g. `veth`; empty for most hardware."""
    slave_kind: str
    """What it is enslaved to, e.g. `bond`, `bridge`; empty when to nothing."""
    type: int
    """ARPHRD_*: 1 is Ethernet."""
    flags: int
    """IFF_*."""
    master: int = 0
    """The device it is enslaved to, 0 = to none."""
    has_far_peer: bool = False
    """Its other end is in another network namespace, as a pod's is."""
    xdp_program: int = 0
    """Id of its XDP program, 0 = none."""
    xdp_in_driver: bool = False
    """Its driver runs that program: then it sends what other drivers hand to it, too."""


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """An address of a device that packets can be sent from, of global scope."""

    index: int
    address: str


@dataclass(frozen=True, slots=True)
class Filter:
    """A tc filter of kind bpf as it is, or as it shall be when `program_fd` is given."""

    index: int
    side: Side
    prio: int
    protocol: int
    """ETH_P_*."""
    handle: int
    name: str
    program_id: int = 0
    program_fd: int = -1
    kind: str = "bpf"


@dataclass(frozen=True, slots=True)
class Clsact:
    """The qdisc at a device's ingress hook."""

    index: int
    kind: str
    """`clsact` or `ingress`."""
    is_shared: bool
    """It takes its filters from a block other devices share."""


def _text(data: bytes | None) -> str:
    return (data or b"").rstrip(b"\0").decode(errors="replace")


def parse_link(message: Message) -> Link | None:
    """A link message; None when it speaks of a bridge's port rather than of a device."""
    family, kind, index, flags, _ = _IFINFO.unpack_from(message.body)
    if family != socket.AF_UNSPEC:
        return None
    found = attributes(message.body[_IFINFO.size :])
    info = attributes(found.get(18, b""))
    xdp = attributes(found.get(_XDP, b""))
    return Link(
        *(index, _text(found.get(3)), _text(info.get(1)), _text(info.get(4)), kind, flags),
        master=int.from_bytes(found.get(10, b"")[:4], "little"),
        has_far_peer=37 in found,  # IFLA_LINK_NETNSID
        xdp_program=int.from_bytes(xdp.get(4, b"")[:4], "little"),
        xdp_in_driver=xdp.get(2, b"")[:1] == _XDP_ATTACHED_IN_DRIVER,
    )


def index_of_tc(message: Message) -> int:
    """The device a qdisc or filter message speaks of."""
    return int(_TCMSG.unpack_from(message.body)[1])


def links(netlink: rtnetlink.Socket) -> list[Link]:
    """Every device of the namespace."""
    # IFLA_EXT_MASK skips statistics, which are most of a message.
    body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(29, struct.pack("=I", 1 << 3))
    found = (parse_link(message) for message in netlink.dump(rtnetlink.GETLINK, body))
    return [link for link in found if link is not None]


def addresses(netlink: rtnetlink.Socket) -> list[DeviceAddress]:
    """Every address of the namespace that may be a source: global, not on trial; primary first."""
    found = []
    for message in netlink.dump(rtnetlink.GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        family, _, flags, scope, index = _IFADDR.unpack_from(message.body)
        given = attributes(message.body[_IFADDR.size :])
        flags = int.from_bytes(given.get(8, bytes([flags])), "little")
        if scope == 0 and not flags & _NOT_A_SOURCE:
            packed = given.get(2, given.get(1, b""))
            found.append((flags & _SECONDARY, index, socket.inet_ntop(family, packed)))
    return [DeviceAddress(index, address) for _, index, address in sorted(found, key=_by_rank)]


def _by_rank(item: tuple[int, int, str]) -> int:
    return item[0]


def set_xdp(netlink: rtnetlink.Socket, index: int, program_fd: int) -> Failure | None:
    """Let the driver of a device run a program, in place of any it runs; -1 = none."""
    given = attribute(1, struct.pack("=i", program_fd))
    given += attribute(3, struct.pack("=I", _XDP_IN_DRIVER))
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attribute(_XDP | _NESTED, given)
    return netlink.requests([(rtnetlink.SETLINK, 0, body)])[0]


def clsacts(netlink: rtnetlink.Socket) -> dict[int, Clsact]:
    """The clsact or ingress qdisc of each device that has one, by index."""
    found: dict[int, Clsact] = {}
    for message in netlink.dump(rtnetlink.GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0)):
        _, index, _, parent, _ = _TCMSG.unpack_from(message.body)
        if parent == _CLSACT_PARENT:
            given = attributes(message.body[_TCMSG.size :])
            found[index] = Clsact(index, _text(given.get(1)), bool({13, 14} & given.keys()))
    return found


def filters(netlink: rtnetlink.Socket, index: int, sides: Iterable[Side] = Side) -> list[Filter]:
    """Every filter of a device, other agents' included; none when the device is gone."""
    found: list[Filter] = []
    for side in sides:
        try:
            messages = netlink.dump(rtnetlink.GETTFILTER, _TCMSG.pack(0, index, 0, int(side), 0))
        except OSError as error:
            # No such device, or no qdisc to hold filters.
            if error.errno in (errno.ENODEV, errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP):
                continue
            raise
        for message in messages:
            _, at, handle, _, info = _TCMSG.unpack_from(message.body)
            given = attributes(message.body[_TCMSG.size :])
            if at != index or not handle:  # handle 0 announces the list, not a filter
                continue
            options = attributes(given.get(2, b""))
            found.append(
                Filter(
                    *(index, side, info >> 16, socket.ntohs(info & 0xFFFF), handle),
                    name=_text(options.get(7)),
                    program_id=int.from_bytes(options.get(11, b"")[:4], "little"),
                    kind=_text(given.get(1)),
                )
            )
    return found


def add_clsacts(netlink: rtnetlink.Socket, indexes: Sequence[int]) -> list[Failure | None]:
    """Give devices the qdisc that holds filters; EEXIST where there is one or an ingress qdisc."""
    flags = CREATE | EXCL
    return netlink.requests([(rtnetlink.NEWQDISC, flags, _clsact(index)) for index in indexes])


def delete_clsacts(netlink: rtnetlink.Socket, indexes: Sequence[int]) -> list[Failure | None]:
    """Take the qdisc away with every filter in it."""
    return netlink.requests([(rtnetlink.DELQDISC, 0, _clsact(index)) for index in indexes])


def _clsact(index: int) -> bytes:
    return _TCMSG.pack(0, index, _CLSACT_HANDLE, _CLSACT_PARENT, 0) + attribute(1, b"clsact\0")


def replace_filters(netlink: rtnetlink.Socket, wanted: Sequence[Filter]) -> list[Failure | None]:
    """Put filters, each in one step: a packet meets the old program or the new one."""
    return netlink.requests(
        [
            (
                rtnetlink.NEWTFILTER,
                CREATE,
                _filter(item)
                + attribute(1, b"bpf\0")
                + attribute(
                    2,
                    attribute(6, struct.pack("=I", item.program_fd))
                    + attribute(7, item.name.encode() + b"\0")
                    + attribute(8, struct.pack("=I", _DIRECT_ACTION)),
                ),
            )
            for item in wanted
        ]
    )


def delete_filters(netlink: rtnetlink.Socket, unwanted: Sequence[Filter]) -> list[Failure | None]:
    """Take single filters away; others at the same prio stay."""
    return netlink.requests(
        [
            (rtnetlink.DELTFILTER, 0, _filter(item) + attribute(1, item.kind.encode() + b"\0"))
            for item in unwanted
        ]
    )


def _filter(item: Filter) -> bytes:
    info = item.prio << 16 | socket.htons(item.protocol)
    return _TCMSG.pack(0, item.index, item.handle, int(item.side), info)
