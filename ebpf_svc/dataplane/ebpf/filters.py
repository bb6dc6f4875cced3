"""Keep our tc filters on devices, and only ours.

Filters carry our name, handle and prio. Programs of ours end with "go on to the next filter" for
what is not theirs, and their low prio runs them before agents that end the list; nobody else's
filter is changed or removed. Remembers nothing: each call looks at the devices anew.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ebpf_svc.dataplane.ebpf.devices import DeviceRole
from ebpf_svc.dataplane.ebpf.programs import Programs
from ebpf_svc.host import links, rtnetlink
from ebpf_svc.host.links import Filter, Link, Side
from ebpf_svc.model.net import Family

NAME_PREFIX = "ebpf-svc/"
HANDLE = 0xEB5
PRIOS = {Family.V4: (47, 147, 247), Family.V6: (48, 148, 248)}
"""A prio holds filters of one kind and protocol: the later ones are for devices where another agent
has the first."""
PROTOCOLS = {Family.V4: 0x0800, Family.V6: 0x86DD}


@dataclass(slots=True)
class Outcome:
    """What one pass over devices did."""

    attached: list[Filter] = field(default_factory=list)
    """Put where there was none of that name, or one with another program."""
    problems: dict[int, str] = field(default_factory=dict)
    """Device index -> why it does not carry all its programs."""


def put(
    netlink: rtnetlink.Socket,
    devices: Sequence[tuple[Link, DeviceRole]],
    programs: Programs,
) -> Outcome:
    """Make each device carry exactly the programs of its role.

    Devices that vanish meanwhile are passed over.
    """
    outcome = Outcome()
    only_ingress = _ensure_clsact(netlink, [link for link, _ in devices], outcome)
    todo: list[Filter] = []
    stale: list[Filter] = []
    for link, role in devices:
        if link.index in outcome.problems and link.index not in only_ingress:
            continue
        sides = [Side.INGRESS] if link.index in only_ingress else list(Side)
        present = ours(links.filters(netlink, link.index, sides))
        for want in _wanted(link.index, role, programs, sides):
            same = _take(present, want)
            if same is None:
                todo.append(want)
            elif same.program_id != want.program_id:
                todo.append(replace(want, prio=same.prio, handle=same.handle))
        stale += present
    _replace(netlink, todo, outcome)
    # Last, so that a renamed filter's place is taken before it goes.
    links.delete_filters(netlink, stale)
    return outcome


def remove(netlink: rtnetlink.Socket, indexes: Iterable[int] | None = None) -> int:
    """Take our filters off devices, and the qdisc where nothing else uses it.

    Args:
        netlink: in the namespace of the devices.
        indexes: which devices; None = all.

    Returns:
        how many filters there were.
    """
    qdiscs = links.clsacts(netlink)
    chosen = qdiscs.keys() if indexes is None else set(indexes) & qdiscs.keys()
    unwanted: list[Filter] = []
    unused: list[int] = []
    for index in chosen:
        qdisc = qdiscs[index]
        # An ingress qdisc answers with the same list for both sides.
        sides = list(Side) if qdisc.kind == "clsact" else [Side.INGRESS]
        present = links.filters(netlink, index, sides)
        mine = ours(present)
        unwanted += mine
        alone = len(mine) == len(present) and qdisc.kind == "clsact" and not qdisc.is_shared
        if mine and alone:
            unused.append(index)
    links.delete_filters(netlink, unwanted)
    links.delete_clsacts(netlink, unused)
    return len(unwanted)


def has_any(netlink: rtnetlink.Socket) -> bool:
    """Whether any device carries a filter of ours."""
    return any(
        ours(links.filters(netlink, index, [Side.INGRESS])) for index in links.clsacts(netlink)
    )


def ours(filters: Iterable[Filter]) -> list[Filter]:
    """Those among filters that carry our name."""
    return [item for item in filters if item.kind == "bpf" and item.name.startswith(NAME_PREFIX)]


def _ensure_clsact(
    netlink: rtnetlink.Socket, devices: Sequence[Link], outcome: Outcome
) -> set[int]:
    """Give each device its qdisc; the indexes of those that can only take ingress filters."""
    answers = links.add_clsacts(netlink, [link.index for link in devices])
    existing = []
    for link, answer in zip(devices, answers, strict=True):
        if answer is None:
            continue
        if answer.errno == errno.EEXIST:
            existing.append(link)
        elif answer.errno != errno.ENODEV:
            outcome.problems[link.index] = f"{link.name}: no clsact qdisc: {answer.reason}"
    if not existing:
        return set()
    qdiscs = links.clsacts(netlink)
    only_ingress = set()
    for link in existing:
        qdisc = qdiscs.get(link.index)
        if qdisc is not None and qdisc.kind != "clsact":
            only_ingress.add(link.index)
            outcome.problems[link.index] = (
                f"{link.name}: has a qdisc of kind {qdisc.kind}, which leaves no place for an "
                "egress filter: replies through this device are not translated"
            )
    return only_ingress


def _wanted(
    index: int, role: DeviceRole, programs: Programs, sides: Iterable[Side]
) -> Iterable[Filter]:
    for side in sides:
        for family in programs.families:
            name = role.program(side)
            program = programs.get(family, name)
            if program is not None:
                yield Filter(
                    *(index, side, PRIOS[family][0], PROTOCOLS[family], HANDLE),
                    name=f"{NAME_PREFIX}{name}{int(family)}",
                    program_id=program.id,
                    program_fd=program.fd,
                )


def _take(present: list[Filter], want: Filter) -> Filter | None:
    """Remove and give the filter that stands where `want` shall."""
    for item in present:
        if (item.side, item.protocol, item.name) == (want.side, want.protocol, want.name):
            present.remove(item)
            return item
    return None


def _replace(netlink: rtnetlink.Socket, todo: list[Filter], outcome: Outcome) -> None:
    """Put filters, moving to a later prio where somebody else's filters hold the first."""
    prios: Mapping[int, tuple[int, ...]] = {PROTOCOLS[f]: PRIOS[f] for f in Family}
    while todo:
        again: list[Filter] = []
        for item, answer in zip(todo, links.replace_filters(netlink, todo), strict=True):
            if answer is None:
                outcome.attached.append(item)
                continue
            if answer.errno == errno.ENODEV:
                continue
            choices = prios[item.protocol]
            later = choices[choices.index(item.prio) + 1 :] if item.prio in choices else ()
            if answer.errno in (errno.EINVAL, errno.EEXIST) and later:
                again.append(replace(item, prio=later[0]))
            else:
                outcome.problems[item.index] = f"device {item.index}: {item.name}: {answer.reason}"
        todo = again
