"""Run the loaded programs on a packet of ours, without touching a live flow.

The same bytecode is loaded once more: with the live maps for all that the agent writes, and with
maps of its own for all that the programs write. What one client left in the live ones can be put
into these, so that it meets what it would meet. A trial says where a packet would be sent, and
sends nothing: who redirects is the kernel, after the program, and nothing comes after this run.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape
from ebpf_svc.dataplane.ebpf.constants import DIRECT_NOTES, Drop
from ebpf_svc.dataplane.ebpf.layout import Layout
from ebpf_svc.dataplane.ebpf.live import End, Entry, Live, Noted
from ebpf_svc.dataplane.ebpf.programs import PROGRAMS, XDP_PROGRAM
from ebpf_svc.dataplane.ebpf.table import ArrayTable, HashTable, PerCpuArray
from ebpf_svc.host import bpf, bpf_prog
from ebpf_svc.model.desired import FrontendKey

OWN = (
    *("flows", "affinity", "fragments", "held", "sockets", "udp_sockets", "reverse"),
    *("service_counters", "drops", "monitor", "events"),
    *("openings", "holding", "direct"),
)
"""Maps a trial has of its own: all that programs write."""
ENTRIES = 8192
"""In each of them: clients a trial can send."""
_SIZES = dict.fromkeys(("service_counters", "openings", "holding", "monitor"), 1)
_SIZES |= {"sockets": 0, "drops": len(Drop), "held": 8, "direct": 1 + DIRECT_NOTES}
_SK_BUFF_BYTES, _MARK_OFFSET, _IFINDEX_OFFSET = 192, 8, 40


@dataclass(frozen=True, slots=True)
class Ran:
    """What a program did with a packet."""

    verdict: int
    """`TC_ACT_*`, of XDP's program `XDP_*`."""
    data: bytes
    mark: int
    drop: Drop | None
    """The reason that was counted."""


class Trial:
    """One family's device programs with maps of their own; `close` gives everything back."""

    def __init__(self, artifact: Artifact, live: Live) -> None:
        """Make the maps; each program is loaded when it is first run.

        Args:
            artifact: what the agent's programs were loaded from.
            live: the agent's maps; they stay open and unchanged.

        Raises:
            OSError: the kernel refuses, e.g. for want of rights.
        """
        self._artifact, self._live, self._family = artifact, live, live.family
        self._undo = ExitStack()
        self._programs: dict[str, int] = {}
        try:
            self._fds = fds = live.tables.fds(live.family)
            for name in OWN:
                shape = artifact.maps[name]
                fds[name] = _create(name, shape)
                self._undo.callback(os.close, fds[name])
            self._flows = self._hash(artifact, fds, "flows")
            self._affinity = self._hash(artifact, fds, "affinity")
            self._reverse = self._hash(artifact, fds, "reverse")
            shape = artifact.maps["direct"]
            self._direct = ArrayTable("direct", os.dup(fds["direct"]), *_layouts(shape))
            self._undo.callback(self._direct.close)
            shape = artifact.maps["drops"]
            self._drops = PerCpuArray("drops", fds["drops"], *_layouts(shape))
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give programs and maps back to the kernel."""
        self._undo.close()

    def seed(
        self,
        *,
        flows: Iterable[Entry] = (),
        affinity: Iterable[Entry] = (),
        reverse: Iterable[Entry] = (),
        direct: bytes = b"",
    ) -> None:
        """Let the client meet what it would meet in the live maps.

        Args:
            flows: its own, and those that hold ports it might get.
            affinity: its own.
            reverse: notes of the node's own datagrams.
            direct: notes of calls to endpoints themselves, all of them.
        """
        flows = list(flows)
        self._flows.update(flows)
        self._reverse.update([self._live.reversed(flow) for flow in flows])
        self._reverse.update(list(reverse))
        self._affinity.update(list(affinity))
        if direct:
            self._direct.write(0, direct)

    def noted(self, frontend: FrontendKey, client: End) -> Noted | None:
        """What the flow a packet opened, or belongs to, has noted of its way."""
        return self._live.noted(frontend, client, self._flows)

    def tag(self, name: str) -> str:
        """What the kernel calls the program's code: the same code has the same tag."""
        return bpf_prog.facts(self._program(name)).tag

    def run(self, name: str, packet: bytes, *, ifindex: int = 0) -> Ran:
        """Send a packet through a program; for `_l3` programs it starts with its IP header.

        Args:
            name: the C function.
            packet: the bytes.
            ifindex: the device it comes in or leaves by; 0 = none that is known to any map.

        Raises:
            OSError, VerifierError: the kernel does not take the program, or does not run it.
        """
        program = self._program(name)
        context = bytearray(_SK_BUFF_BYTES)
        struct.pack_into("=I", context, _IFINDEX_OFFSET, ifindex)
        before = self._drops.sums()
        run = bpf_prog.test_run(program, packet, context=bytes(context))
        counted = [a - b for a, b in zip(self._drops.sums(), before, strict=True)]
        drop = next((Drop(index) for index, count in enumerate(counted) if count), None)
        mark = struct.unpack_from("=I", run.context, _MARK_OFFSET)[0]
        return Ran(run.retval, run.data, mark, drop)

    def run_driver(self, packet: bytes, *, ifindex: int) -> int | None:
        """Send a packet through the program of a NIC's driver; what that says, `XDP_*`.

        None: before Linux 5.15 the kernel does not let such a program see a device.

        Raises:
            OSError, VerifierError: as `run`.
        """
        # struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        context = struct.pack("=6I", 0, len(packet), 0, ifindex, 0, 0)
        try:
            return bpf_prog.test_run(self._program(XDP_PROGRAM), packet, context=context).retval
        except OSError as error:
            if error.errno == errno.EINVAL:
                return None
            raise

    def _program(self, name: str) -> int:
        if name not in self._programs:
            self._programs[name] = bpf_prog.load(
                self._artifact.programs[name].relocated(self._fds),
                program_type=PROGRAMS[name].type,
                name=PROGRAMS[name].name(self._family),
            )
            self._undo.callback(os.close, self._programs[name])
        return self._programs[name]

    @staticmethod
    def _hash(artifact: Artifact, fds: dict[str, int], name: str) -> HashTable:
        return HashTable(name, fds[name], *_layouts(artifact.maps[name]))


def _create(name: str, shape: MapShape) -> int:
    return bpf.map_create(
        shape.type,
        key_size=shape.key_size,
        value_size=shape.value_size,
        max_entries=_SIZES.get(name, ENTRIES),
        flags=shape.flags,
        name=f"try_{name}",
    )


def _layouts(shape: MapShape) -> tuple[Layout, Layout]:
    return (
        Layout.from_desc(shape.key_desc, shape.key_size),
        Layout.from_desc(shape.value_desc, shape.value_size),
    )
