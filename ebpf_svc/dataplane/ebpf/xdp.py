"""Keep our program in the drivers of NICs, where it is wanted and where nobody else's is.

A device has room for one program. One that is not ours stays, and tc does the work.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping

from ebpf_svc.dataplane.ebpf.programs import NAME_PREFIX, XDP_PROGRAM, Programs
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.host import bpf, bpf_prog, links, rtnetlink
from ebpf_svc.host.links import Link
from ebpf_svc.model.net import Family


def chain(programs: Programs, tables: Tables) -> None:
    """Let IPv4's program, which a device runs, call IPv6's."""
    second = programs.get(Family.V6, XDP_PROGRAM)
    if second is not None:
        bpf.update(tables.xdp_next.fd, bytes(4), second.fd.to_bytes(4, "little"))


def put(
    netlink: rtnetlink.Socket, devices: Iterable[Link], programs: Programs
) -> Mapping[int, str]:
    """Make each NIC run our program, if there is one.

    Returns:
        device index -> why it does not.
    """
    found = (programs.get(family, XDP_PROGRAM) for family in Family)
    ours = next((program for program in found if program is not None), None)
    problems: dict[int, str] = {}
    for link in devices:
        if ours is None:
            if is_ours(link):
                links.set_xdp(netlink, link.index, -1)
        elif link.xdp_program and not is_ours(link):
            problems[link.index] = f"{link.name}: runs another XDP program, which stays; tc serves"
        elif link.xdp_program != ours.id:
            failure = links.set_xdp(netlink, link.index, ours.fd)
            if failure is not None:
                problems[link.index] = f"{link.name}: no XDP in its driver: {failure.reason}"
    return problems


def remove(netlink: rtnetlink.Socket, indexes: Collection[int] | None = None) -> int:
    """Take our program out of these devices, or of all; returns of how many."""
    found = [link for link in attached(netlink) if indexes is None or link.index in indexes]
    for link in found:
        links.set_xdp(netlink, link.index, -1)
    return len(found)


def attached(netlink: rtnetlink.Socket) -> Iterator[Link]:
    """Devices that run our program, whoever put it there."""
    return (link for link in links.links(netlink) if is_ours(link))


def is_ours(link: Link) -> bool:
    """Whether the program a device runs is one of ours, by its name."""
    if not link.xdp_program:
        return False
    try:
        fd = bpf_prog.by_id(link.xdp_program)
    except FileNotFoundError:
        return False
    try:
        return bpf_prog.facts(fd).name.startswith(NAME_PREFIX)
    finally:
        os.close(fd)
