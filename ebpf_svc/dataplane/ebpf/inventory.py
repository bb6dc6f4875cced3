"""List what of ours is in this kernel and which flows it keeps, for `show` and `cleanup`.

Looks only: needs no running agent, no compiler, and remembers nothing.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import filters, flows, hooks, xdp
from ebpf_svc.dataplane.ebpf.codec import Codec
from ebpf_svc.dataplane.ebpf.constants import FlowState
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.ebpf.programs import NAME_PREFIX, SOCKET_PROGRAMS
from ebpf_svc.dataplane.ebpf.tables import FamilyTables, pin_dir
from ebpf_svc.dataplane.inspect import FlowView, KernelPart
from ebpf_svc.errors import CommandError, UnsupportedHost
from ebpf_svc.host import bpf, bpf_prog, links, nft, rtnetlink
from ebpf_svc.model.net import Family, Protocol


def parts(settings: EbpfSettings, mark: int) -> list[KernelPart]:
    """Every pinned map, tc filter, socket hook and netfilter rule of ours.

    Args:
        settings: where they are.
        mark: what netfilter masquerades by.

    Raises:
        OSError: not root, or the kernel does not answer.
    """
    return [*_pins(settings), *_filters(), *_hooks(settings), *_rules(mark)]


def _pins(settings: EbpfSettings) -> Iterator[KernelPart]:
    for folder, _, names in os.walk(pin_dir(settings).parent):
        for name in sorted(names):
            path = Path(folder, name)
            fd = bpf.get_pinned(path)
            try:
                facts = bpf.map_facts(fd)
            finally:
                os.close(fd)
            entry_bytes = facts.key_size + facts.value_size
            room = f"room for {facts.max_entries} entries of " if facts.max_entries else ""
            yield KernelPart("map", name, str(path), f"{room}{entry_bytes} bytes")


def _filters() -> Iterator[KernelPart]:
    netlink = rtnetlink.Socket()
    try:
        names = {link.index: link.name for link in links.links(netlink)}
        for index, qdisc in sorted(links.clsacts(netlink).items()):
            sides = list(links.Side) if qdisc.kind == "clsact" else [links.Side.INGRESS]
            for item in filters.ours(links.filters(netlink, index, sides)):
                place = f"{names.get(index, index)} {item.side.name.lower()}"
                yield KernelPart("filter", item.name, place, f"program {item.program_id}")
        for link in xdp.attached(netlink):
            yield KernelPart("xdp", "forward", link.name, f"program {link.xdp_program}")
    finally:
        netlink.close()


def _hooks(settings: EbpfSettings) -> Iterator[KernelPart]:
    try:
        path = hooks.cgroup_of(settings)
    except UnsupportedHost:
        return
    if not path.is_dir():
        return
    kinds = {kind for spec in SOCKET_PROGRAMS.values() for kind in spec.attach_types.values()}
    cgroup_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for kind in sorted(kinds):
            for program_id in _attached(cgroup_fd, kind):
                name = _program_name(program_id)
                if name.startswith(NAME_PREFIX):
                    yield KernelPart("socket hook", name, str(path), f"program {program_id}")
    finally:
        os.close(cgroup_fd)


def _attached(cgroup_fd: int, kind: int) -> tuple[int, ...]:
    """Programs of that kind on the cgroup; none where the kernel or the folder has no such hook."""
    with suppress(OSError):
        return bpf_prog.cgroup_query(cgroup_fd, kind)
    return ()


def _program_name(program_id: int) -> str:
    """A program's kernel name; empty when it went meanwhile."""
    try:
        fd = bpf_prog.by_id(program_id)
    except FileNotFoundError:
        return ""
    try:
        return bpf_prog.facts(fd).name
    finally:
        os.close(fd)


def _rules(mark: int) -> Iterator[KernelPart]:
    with suppress(CommandError):
        rules = nft.masquerade_rules(mark)
        if rules.exists():
            yield KernelPart("rules", rules.name, "netfilter", f"masquerade {mark:#x}")


def flow_views(family: Family, codec: Codec, tables: FamilyTables) -> Iterator[FlowView]:
    """The flows of one family the next packet would go on with.

    Raises:
        OSError: the map cannot be read.
    """
    for chunk in flows.FlowReader(codec, tables).chunks():
        for index in range(len(chunk.services())):
            flow = chunk.flow(index)
            if not flows.is_alive(flow):
                continue
            backend, backend_port = codec.endpoint(flow.backend)
            yield FlowView(
                client=str(ipaddress.ip_address(flow.client)),
                client_port=wire_port(flow.client_port),
                frontend=codec.frontend_key(flow.frontend),
                backend=backend,
                backend_port=backend_port,
                state=_words(flow),
                idle_s=flow.idle_s,
                family=family,
            )


def _words(flow: flows.Flow) -> str:
    """The state of a TCP flow in words."""
    if flow.protocol != Protocol.TCP.number:
        return ""
    if flow.state & FlowState.RESET:
        return "reset"
    if flows.is_closed(flow):
        return "closed"
    if flow.state & (FlowState.CLIENT_FIN | FlowState.BACKEND_FIN):
        return "closing"
    return "established" if flow.state & FlowState.ESTABLISHED else "opening"
