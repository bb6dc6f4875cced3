"""Filters of another agent on a node's devices: programs that count packets and pass them on."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ebpf_svc.host import bpf, bpf_prog, links, rtnetlink
from ebpf_svc.host.bpf import MapType
from ebpf_svc.host.links import Filter, Side
from ebpf_svc.testbed.host import Node

NAME = "other-agent"
EVERYTHING = 3  # ETH_P_ALL
GO_ON, ACCEPT = -1, 0
"""TC_ACT_UNSPEC: to the next filter; TC_ACT_OK: no further filter is asked."""
PRIOS = {GO_ON: 7, ACCEPT: 3000}
"""One in front of every filter of ours, one behind."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A filter on a device, and where it counts."""

    filter: Filter
    map_fd: int

    @property
    def packets(self) -> int:
        return int.from_bytes(bpf.lookup(self.map_fd, bytes(4), 8) or b"", "little")


@contextmanager
def counting_filters(node: Node, device: str) -> Iterator[list[Counter]]:
    """Both filters on both sides of a device; they stay on it after the block."""
    with ExitStack() as stack:
        counters = []
        node.run(["tc", "qdisc", "add", "dev", device, "clsact"])
        stack.enter_context(node.namespace.entered())
        netlink = rtnetlink.Socket()
        stack.callback(netlink.close)
        (index,) = (link.index for link in links.links(netlink) if link.name == device)
        for side in Side:
            for verdict, prio in PRIOS.items():
                map_fd = bpf.map_create(
                    MapType.ARRAY, key_size=4, value_size=8, max_entries=1, name="count"
                )
                stack.callback(os.close, map_fd)
                program = bpf_prog.load(
                    _count_and_return(map_fd, verdict),
                    program_type=bpf_prog.ProgramType.SCHED_CLS,
                    name="count",
                )
                stack.callback(os.close, program)
                item = Filter(index, side, prio, EVERYTHING, 1, NAME, program_fd=program)
                assert links.replace_filters(netlink, [item]) == [None]
                counters.append(Counter(item, map_fd))
        yield counters


def filters_of(node: Node, device: str) -> list[tuple[str, int, str]]:
    """Every filter of a device as side, prio and name."""
    with node.namespace.entered():
        netlink = rtnetlink.Socket()
        try:
            (index,) = (link.index for link in links.links(netlink) if link.name == device)
            found = links.filters(netlink, index)
        finally:
            netlink.close()
    return sorted((item.side.name, item.prio, item.name) for item in found)


def _count_and_return(map_fd: int, verdict: int) -> bytes:
    """count[0]++; return verdict;"""
    return b"".join(
        struct.pack("=BBhi", code, registers, offset, value)
        for code, registers, offset, value in (
            (0xBF, 0xA2, 0, 0),  # r2 = r10
            (0x07, 0x02, 0, -4),  # r2 += -4
            (0x62, 0x0A, -4, 0),  # *(u32 *)(r10 - 4) = 0
            (0x18, 0x11, 0, map_fd),  # r1 = the map
            (0x00, 0x00, 0, 0),
            (0x85, 0x00, 0, 1),  # r0 = bpf_map_lookup_elem(r1, r2)
            (0x15, 0x00, 2, 0),  # if (!r0) goto end
            (0xB7, 0x01, 0, 1),  # r1 = 1
            (0xDB, 0x10, 0, 0),  # *(u64 *)r0 += r1, at once
            (0xB7, 0x00, 0, verdict),  # end: r0 = verdict
            (0x95, 0x00, 0, 0),  # exit
        )
    )
