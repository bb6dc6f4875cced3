"""Hearing what netlink tells everybody."""

from __future__ import annotations

import socket
from contextlib import closing, suppress

import pytest

from ebpf_svc.host import netlink

pytestmark = pytest.mark.root

NETLINK_USERSOCK, GROUP = 2, 20
"""For programs among themselves, and a group that is nobody's."""


def test_everything_that_came_in_is_heard_at_once() -> None:
    """Whoever looks a last time misses nothing: each message is a datagram of its own."""
    with (
        closing(netlink.Notifications(NETLINK_USERSOCK, [GROUP])) as heard,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_USERSOCK) as teller,
    ):
        for number in range(300):
            message = netlink.encode(0x100 + number, 0, 0, b"news")
            with suppress(ConnectionRefusedError):  # of the kernel, which is told as well
                teller.sendto(message, (0, 1 << GROUP - 1))
        assert [each.type for each in heard.wait(0)] == list(range(0x100, 0x100 + 300))
        assert heard.wait(0) == []
