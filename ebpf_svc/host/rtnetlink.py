"""Links and tc filters: what rtnetlink calls its messages, and its sockets."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from ebpf_svc.host import netlink

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
GETADDR = 22
NEWQDISC, DELQDISC, GETQDISC = 36, 37, 38
NEWTFILTER, DELTFILTER, GETTFILTER = 44, 45, 46
GROUP_LINK, GROUP_TC = 1, 4
GROUP_IPV4_ADDRESS, GROUP_IPV6_ADDRESS = 5, 9
"""Multicast groups, as numbers."""


class Socket(netlink.Socket):
    """A request socket for links and filters."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)


class Notifications(netlink.Notifications):
    """Hears of changes of links and filters."""

    def __init__(self, groups: Sequence[int]) -> None:
        super().__init__(socket.NETLINK_ROUTE, groups)
