"""A device whose other end is the test, with programs at its ingress hook.

BPF_PROG_TEST_RUN follows no redirect; here a packet goes round as often as it would on a node.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ebpf_svc.host import bpf_prog, features, links, rtnetlink
from ebpf_svc.host.command import run
from ebpf_svc.host.links import Filter, Side
from ebpf_svc.model.net import Family

TUN = Path("/dev/net/tun")
QUIET_S = 0.2
"""How long nothing must come out before that was all."""

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_TAP, _IFF_NO_PI = 1, 2, 0x1000
_TC_INDEX_OFFSET = 44
_FRAME_BYTES = 4096


def through(
    program_fd: int,
    family: Family,
    packets: Sequence[bytes],
    *,
    ethernet: bool = True,
    tc_index: int = 0,
    turned: bool = False,
) -> list[bytes]:
    """Send packets to a device with the program; what goes on to the filter after it, in order.

    Args:
        ethernet: the device has Ethernet headers; else packets start with that of IP.
        tc_index: what the packets already carry in `skb->tc_index`.
        turned: what leaves by the device it came by, instead.
    """

    def work() -> list[bytes]:
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        with _device("in", ethernet) as inside, _device("out", ethernet) as outside:
            run(["ip", "-b", "-"], input="link set in up\nlink set out up\n")
            with _filters(program_fd, family, tc_index):
                for packet in packets:
                    os.write(inside, packet)
                return list(_read(inside if turned else outside))

    return features.in_new_netns(work)


@contextmanager
def _device(name: str, ethernet: bool) -> Iterator[int]:
    fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = (_IFF_TAP if ethernet else _IFF_TUN) | _IFF_NO_PI
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _filters(program_fd: int, family: Family, tc_index: int) -> Iterator[None]:
    """One that sets tc_index, the program, and one that sends what goes on to `out`."""
    netlink = rtnetlink.Socket()
    programs: list[int] = []
    try:
        index = {link.name: link.index for link in links.links(netlink)}
        for code in (_set_tc_index(tc_index), _send_to(index["out"])):
            kind = bpf_prog.ProgramType.SCHED_CLS
            programs.append(bpf_prog.load(code, program_type=kind, name="other"))
        assert links.add_clsacts(netlink, [index["in"]]) == [None]
        protocol = 0x0800 if family is Family.V4 else 0x86DD
        before, after = programs
        chain = [
            Filter(index["in"], Side.INGRESS, prio, protocol, 1, name="test", program_fd=fd)
            # What comes in again keeps what it was given on the way.
            for prio, fd in enumerate((before, program_fd, after), start=1)
            if fd != before or tc_index
        ]
        assert links.replace_filters(netlink, chain) == [None] * len(chain)
        yield
    finally:
        netlink.close()
        for fd in programs:
            os.close(fd)


def _instruction(code: int, registers: int, offset: int, value: int) -> bytes:
    return struct.pack("=BBhi", code, registers, offset, value)


def _set_tc_index(value: int) -> bytes:
    return b"".join(
        (
            _instruction(0xB7, 2, 0, value),  # r2 = value
            _instruction(0x63, 0x21, _TC_INDEX_OFFSET, 0),  # skb->tc_index = r2
            _instruction(0xB7, 0, 0, -1),  # on to the next
            _instruction(0x95, 0, 0, 0),
        )
    )


def _send_to(index: int) -> bytes:
    return b"".join(
        (
            _instruction(0xB7, 1, 0, index),
            _instruction(0xB7, 2, 0, 0),
            _instruction(0x85, 0, 0, 23),  # bpf_redirect()
            _instruction(0x95, 0, 0, 0),
        )
    )


def _read(fd: int) -> Iterator[bytes]:
    while select.select([fd], [], [], QUIET_S)[0]:
        yield os.read(fd, _FRAME_BYTES)
