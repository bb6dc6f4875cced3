"""Run one tc program at a time, with maps of ours; nothing is attached or pinned.

A `World` is one family's programs and maps. Tests fill the maps in the words of Services
(`World.service`) and send packets through a program (`World.run`).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from scapy.all import Packet

from ebpf_svc.dataplane.ebpf import compiler, constants
from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape
from ebpf_svc.dataplane.ebpf.constants import (
    DIRECT_NOTES,
    BackendFlag,
    Drop,
    FrontendFlag,
)
from ebpf_svc.dataplane.ebpf.layout import Layout, wire_port
from ebpf_svc.dataplane.ebpf.programs import DEVICE_PROGRAMS
from ebpf_svc.dataplane.ebpf.table import ArrayTable, HashTable, PerCpuArray, Table
from ebpf_svc.dataplane.inspect import Traffic
from ebpf_svc.host import bpf, bpf_prog
from ebpf_svc.host.bpf import MapFlag, MapType, lift_memory_limit
from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.packet_service import PLAIN, Service
from tests.lib.packets import CLUSTER_CIDRS, Address, Result, Wire

HASH_SEED = 0x9E3779B9
MAP_ENTRIES = 8192
HELD_ENTRIES = 128
COUNTED_SERVICES = 4
"""So few that a test can go beyond."""

IPV4_ONLY, IPV6_ONLY = (
    pytest.mark.parametrize("loaded", [family], indirect=True, ids=[f"ipv{int(family)}"])
    for family in Family
)
"""What only one family has: options, extension headers."""

_SK_BUFF_BYTES, _MARK_OFFSET, _CAME_BY_OFFSET = 192, 8, 36


class World(Wire):
    """One family's programs, maps and cast. `close` gives all of it back to the kernel."""

    ingress_programs = ("pod_ingress", "node_ingress")

    def __init__(self, family: Family, artifact: Artifact) -> None:
        super().__init__(family)
        self._undo = ExitStack()
        self.tables: dict[str, Table] = {}
        lift_memory_limit()
        try:
            for name, shape in artifact.maps.items():
                self.tables[name] = _create(name, shape)
                self._undo.callback(self.tables[name].close)
            fds = {name: table.fd for name, table in self.tables.items()}
            self.programs: dict[str, int] = {}
            for name, spec in DEVICE_PROGRAMS.items():
                code = artifact.programs[name].relocated(fds)
                self.programs[name] = bpf_prog.load(
                    code, program_type=spec.type, name=spec.name(family)
                )
                self._undo.callback(os.close, self.programs[name])
        except BaseException:
            self.close()
            raise
        self._services = self._backends = self._ranges = self._slots = 0
        self.reset()

    def close(self) -> None:
        """Give every descriptor back."""
        self._undo.close()

    def reset(self) -> None:
        """Empty every map."""
        for name in (
            *("frontends", "backend_index", "flows", "affinity", "source_ranges", "fragments"),
            *("held", "reverse"),
        ):
            self.hash(name).clear()
        backends, slots = self._array("backends"), self._array("slots")
        notes = self._array("direct")
        notes.write(0, bytes(notes.max_entries * notes.value.size))
        backends.write(0, bytes((self._backends + 1) * backends.value.size))
        slots.write(0, bytes(self._slots * slots.value.size))
        self._services = self._backends = self._ranges = self._slots = 0
        self.put("settings", {"value": 0}, {"host_netns": 0, "hash_seed": HASH_SEED})
        for name in ("drops", "service_counters"):
            counters = self._counters(name)
            counters.clear(range(counters.max_entries))

    def run(
        self, program: str, packet: Packet | bytes, *, mark: int = 0, came_by: int = 0
    ) -> Result:
        """Send a packet through a program; for `_l3` programs it starts with its IP header.

        Args:
            program: its name.
            packet: the whole frame.
            mark: the mark it has.
            came_by: the device it came by, 0 when the node itself sends it. Old kernels know none.
        """
        sent = bytes(packet)
        context = bytearray(_SK_BUFF_BYTES)
        struct.pack_into("=I", context, _MARK_OFFSET, mark)
        struct.pack_into("=I", context, _CAME_BY_OFFSET, came_by)
        run = bpf_prog.test_run(self.programs[program], sent, context=bytes(context))
        return Result(
            verdict=run.retval,
            data=run.data,
            mark=struct.unpack_from("=I", run.context, _MARK_OFFSET)[0],
            sent=sent,
        )

    def choices(self, program: str, packet: Packet, ports: Iterable[int]) -> dict[int, Address]:
        """Where the packet goes from each of these client ports; no checksum is mended."""
        raw = bytearray(bytes(packet))
        ip_bytes, at = (4, 30) if self.family is Family.V4 else (16, 38)
        ends = at + ip_bytes
        chosen = {}
        for port in ports:
            struct.pack_into("!H", raw, ends, port)
            left = bpf_prog.test_run(self.programs[program], bytes(raw)).data
            kind = socket.AF_INET if self.family is Family.V4 else socket.AF_INET6
            address = socket.inet_ntop(kind, left[at:ends])
            chosen[port] = address, struct.unpack_from("!H", left, ends + 2)[0]
        return chosen

    # What the agent writes.

    def service(
        self,
        address: str,
        port: int,
        proto: Protocol = Protocol.TCP,
        *,
        backends: Sequence[Address],
        local: Sequence[Address] = (),
        affinity_s: int = 0,
        maglev_size: int = 0,
        local_for: Sources = Sources.NONE,
        masquerade_for: Sources = Sources.NONE,
        flags: FrontendFlag = PLAIN,
        source_ranges: Sequence[str] | None = None,
    ) -> Service:
        """A service port with one frontend, as the plan of a Service would put it in the maps."""
        self._services += 1
        service = Service(self, self._services, proto, affinity_s)
        service.set_backends(backends, local=local, maglev_size=maglev_size)
        if maglev_size:
            flags |= FrontendFlag.MAGLEV
        service.add_frontend(
            address,
            port,
            local_for=local_for,
            masquerade_for=masquerade_for,
            flags=flags,
            source_ranges=source_ranges,
        )
        return service

    def add_backend(self, endpoint: Address, proto: Protocol, service: int) -> int:
        """A backend at the head of its endpoint's chain."""
        self._backends += 1
        at = self.l4_addr(endpoint, proto)
        index = self.hash("backend_index")
        head = index.lookup(index.key.pack(**at))
        value = self._array("backends").value.pack(
            **{f"at_{name}": part for name, part in at.items()},
            service=service,
            next=struct.unpack("=I", head)[0] if head else constants.NO_BACKEND,
            flags=0,
        )
        self._array("backends").write(self._backends, value)
        self.put("backend_index", at, {"value": self._backends})
        return self._backends

    def flag_backend(self, backend_id: int, flags: BackendFlag) -> None:
        """Say what a backend may get."""
        self.change_backend(backend_id, flags=int(flags))

    def change_backend(self, backend_id: int, **fields: Any) -> None:
        """Write some fields of a backend's value."""
        backends = self._array("backends")
        known = backends.value.unpack(backends.read(backend_id, 1))._asdict()
        backends.write(backend_id, backends.value.pack(**{**known, **fields}))

    def add_slots(self, ids: Sequence[int]) -> tuple[int, int]:
        """A new list; (first, count)."""
        first = self._slots
        self._array("slots").write(first, struct.pack(f"={len(ids)}I", *ids))
        self._slots += len(ids)
        return first, len(ids)

    def add_ranges(self, prefixes: Sequence[str]) -> int:
        """A set of source ranges."""
        self._ranges += 1
        for prefix in prefixes:
            address, _, length = prefix.partition("/")
            key = {"prefix_bits": 32 + int(length), "ranges": self._ranges}
            self.put("source_ranges", {**key, "addr": self._packed(address)}, {"value": 1})
        return self._ranges

    # What the kernel holds.

    def hash(self, name: str) -> HashTable:
        """A keyed map by its C name."""
        table = self.tables[name]
        assert isinstance(table, HashTable)
        return table

    def put(self, name: str, key: Mapping[str, Any], value: Mapping[str, Any]) -> None:
        """Write one entry by field names."""
        table = self.hash(name)
        table.update([(table.key.pack(**key), table.value.pack(**value))])

    def entries(self, name: str) -> list[tuple[Any, Any]]:
        """Every key and value of a map, as named tuples."""
        table = self.hash(name)
        return [(table.key.unpack(k), table.value.unpack(v)) for k, v in table.items()]

    def age(self, name: str, seconds: int) -> None:
        """Let time pass for the entries of a map that notes when they were seen."""
        table = self.hash(name)
        for key, value in list(table.items()):
            fields = table.value.unpack(value)._asdict()
            fields["seen_s"] = (fields["seen_s"] - seconds) % 2**32
            table.update([(key, table.value.pack(**fields))])

    def age_notes(self, seconds: int) -> None:
        """The same for notes of calls to endpoints themselves."""
        notes = self._array("direct")
        size, offset = notes.value.size, notes.value.offset("seen_s")
        for index in range(notes.max_entries):
            (seen_s,) = struct.unpack_from(
                "=I", notes.view(notes.max_entries), index * size + offset
            )
            if seen_s:
                notes.write_word(index, offset, (seen_s - seconds) % 2**32)

    def drops(self) -> dict[Drop, int]:
        """Counters that are not zero."""
        return {Drop(i): count for i, count in enumerate(self._counters("drops").sums()) if count}

    def traffic(self) -> dict[int, Traffic]:
        """What services were counted, by id."""
        counters = self._counters("service_counters")
        found = counters.totals(range(counters.max_entries))
        return {service: Traffic(*counts) for service, counts in found.items()}

    def l4_addr(self, at: Address, proto: Protocol) -> dict[str, Any]:
        """Fields of a `struct l4_addr`."""
        return {"addr": self._packed(at[0]), "port": wire_port(at[1]), "proto": proto.number}

    def _counters(self, name: str) -> PerCpuArray:
        table = self.tables[name]
        assert isinstance(table, PerCpuArray)
        return table

    def _array(self, name: str) -> ArrayTable:
        table = self.tables[name]
        assert isinstance(table, ArrayTable)
        return table


def artifacts(cache_dir: Path, **options: Any) -> dict[Family, Artifact]:
    """Compile our unit for both families, as an agent with pods in CLUSTER_CIDRS would; options
    are `node_defines`'.
    """
    kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
    node = {
        family: constants.node_defines(
            family,
            kernel=(kernel[0], kernel[1]),
            **{"cluster_cidrs": CLUSTER_CIDRS, "translate_pods": True, **options},
        )
        for family in Family
    }
    return compiler.obtain(tuple(Family), cache_dir, extra_defines=node)


def _create(name: str, shape: MapShape) -> Table:
    sizes = {
        "sockets": 0,
        "settings": 1,
        "drops": len(Drop),
        "service_counters": COUNTED_SERVICES,
        "held": HELD_ENTRIES,
        "holding": 1,
        "direct": 1 + DIRECT_NOTES,
    }
    fd = bpf.map_create(
        shape.type,
        key_size=shape.key_size,
        value_size=shape.value_size,
        max_entries=sizes.get(name, MAP_ENTRIES),
        flags=shape.flags,
        name=f"test_{name}",
    )
    key = Layout.from_desc(shape.key_desc, shape.key_size, f"{name}_key")
    value = Layout.from_desc(shape.value_desc, shape.value_size, f"{name}_value")
    kind: type[Table] = HashTable
    if shape.type == MapType.SK_STORAGE:
        kind = Table
    elif shape.type == MapType.PERCPU_ARRAY:
        kind = PerCpuArray
    elif shape.flags & MapFlag.MMAPABLE:
        kind = ArrayTable
    return kind(name, fd, key, value)
