"""Run one tc program at a time, with maps of ours; nothing is attached or pinned.

A `World` is one family's programs and maps. Tests fill the maps in the words of Services
(`World.service`) and send packets through a program (`World.run`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from scapy.all import Packet

from ebpf_svc.dataplane.ebpf import compiler, constants, maglev
from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape
from ebpf_svc.dataplane.ebpf.constants import (
    MASQUERADE_SHIFT,
    BackendFlag,
    Drop,
    FrontendFlag,
)
from ebpf_svc.dataplane.ebpf.layout import Layout, wire_port
from ebpf_svc.dataplane.ebpf.programs import DEVICE_PROGRAMS
from ebpf_svc.dataplane.ebpf.table import ArrayTable, HashTable, PerCpuArray, Table
from ebpf_svc.host import bpf, bpf_prog
from ebpf_svc.host.bpf import MapFlag, MapType
from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.packets import CLUSTER_CIDRS, Address, Result, Wire

HASH_SEED = 0x9E3779B9
MAP_ENTRIES = 8192

IPV4_ONLY, IPV6_ONLY = (
    pytest.mark.parametrize("loaded", [family], indirect=True, ids=[f"ipv{int(family)}"])
    for family in Family
)
"""What only one family has: options, extension headers."""

_SK_BUFF_BYTES, _MARK_OFFSET = 192, 8
_PLAIN = FrontendFlag(0)


@dataclass(frozen=True, slots=True)
class Frontend:
    """One address of a service and what its flags say."""

    address: str
    port: int
    local_for: Sources
    masquerade_for: Sources
    flags: FrontendFlag
    ranges: int


class Service:
    """A service port in the maps; its methods do what an agent does when the plan changes."""

    def __init__(self, world: World, service_id: int, proto: Protocol, affinity_s: int) -> None:
        self._world, self.id, self.proto = world, service_id, proto
        self.affinity_s = affinity_s
        self.frontends: list[Frontend] = []
        self._ids: dict[Address, int] = {}
        self._lists: dict[BackendFlag, tuple[int, int]] = {}

    def set_backends(
        self,
        backends: Sequence[Address],
        *,
        local: Sequence[Address] = (),
        draining: Sequence[Address] = (),
        maglev_size: int = 0,
    ) -> None:
        """Put these endpoints in the Cluster and Local lists; any other it had is gone.

        Args:
            draining: still serving, in no list.
            maglev_size: lay the lists out as Maglev tables of that many slots.
        """
        for endpoint in [*backends, *local, *draining]:
            if endpoint not in self._ids:
                self._ids[endpoint] = self._world.add_backend(endpoint, self.proto, self.id)
        for endpoint, backend_id in self._ids.items():
            flags = BackendFlag(0)
            if endpoint in backends:
                flags |= BackendFlag.IN_CLUSTER | BackendFlag.SERVING
            if endpoint in local:
                flags |= BackendFlag.IN_LOCAL | BackendFlag.SERVING
            if endpoint in draining:
                flags |= BackendFlag.SERVING
            self._world.flag_backend(backend_id, flags)
        for flag, members in ((BackendFlag.IN_CLUSTER, backends), (BackendFlag.IN_LOCAL, local)):
            ids = [self._ids[endpoint] for endpoint in members]
            if maglev_size and ids:
                names = [f"{address}:{port}" for address, port in members]
                ids = [ids[i] for i in maglev.table(names, maglev_size, "seed")]
            self._lists[flag] = self._world.add_slots(ids)
        for frontend in self.frontends:
            self._put(frontend)

    def add_frontend(
        self,
        address: str,
        port: int,
        *,
        local_for: Sources = Sources.NONE,
        masquerade_for: Sources = Sources.NONE,
        flags: FrontendFlag = _PLAIN,
        source_ranges: Sequence[str] | None = None,
    ) -> None:
        """Make it reachable at one more address."""
        ranges = 0
        if source_ranges is not None:
            flags |= FrontendFlag.SOURCE_RANGES
            ranges = self._world.add_ranges(source_ranges)
        frontend = Frontend(address, port, local_for, masquerade_for, flags, ranges)
        self.frontends.append(frontend)
        self._put(frontend)

    def drain(self) -> None:
        """The service was deleted; what is connected may go on."""
        self.set_backends([])
        for frontend in self.frontends:
            self._put(replace(frontend, flags=frontend.flags | FrontendFlag.DRAINING))

    def _put(self, frontend: Frontend) -> None:
        cluster = self._lists.get(BackendFlag.IN_CLUSTER, (0, 0))
        local = self._lists.get(BackendFlag.IN_LOCAL, (0, 0))
        self._world.put(
            "frontends",
            self._world.l4_addr((frontend.address, frontend.port), self.proto),
            {
                "service": self.id,
                "flags": int(frontend.local_for)
                | int(frontend.masquerade_for) << MASQUERADE_SHIFT
                | int(frontend.flags),
                "cluster_first": cluster[0],
                "cluster_count": cluster[1],
                "local_first": local[0],
                "local_count": local[1],
                "affinity_s": self.affinity_s,
                "ranges": frontend.ranges,
            },
        )


class World(Wire):
    """One family's programs, maps and cast. `close` gives all of it back to the kernel."""

    ingress_programs = ("pod_ingress", "node_ingress")

    def __init__(self, family: Family, artifact: Artifact) -> None:
        super().__init__(family)
        self._undo = ExitStack()
        self.tables: dict[str, Table] = {}
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
        ):
            self.hash(name).clear()
        backends, slots = self._array("backends"), self._array("slots")
        backends.write(0, bytes((self._backends + 1) * backends.value.size))
        slots.write(0, bytes(self._slots * slots.value.size))
        self._services = self._backends = self._ranges = self._slots = 0
        self.put("settings", {"value": 0}, {"host_netns": 0, "hash_seed": HASH_SEED})
        for reason in range(len(Drop)):
            bpf.update(self.tables["drops"].fd, struct.pack("=I", reason), _ZERO_COUNTERS)

    def run(self, program: str, packet: Packet | bytes, *, mark: int = 0) -> Result:
        """Send a packet through a program; for `_l3` programs it starts with its IP header."""
        sent = bytes(packet)
        context = bytearray(_SK_BUFF_BYTES)
        struct.pack_into("=I", context, _MARK_OFFSET, mark)
        run = bpf_prog.test_run(self.programs[program], sent, context=bytes(context))
        return Result(
            verdict=run.retval,
            data=run.data,
            mark=struct.unpack_from("=I", run.context, _MARK_OFFSET)[0],
            sent=sent,
        )

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
        flags: FrontendFlag = _PLAIN,
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
        backends = self._array("backends")
        fields = backends.value.unpack(backends.read(backend_id, 1))._asdict()
        backends.write(backend_id, backends.value.pack(**{**fields, "flags": int(flags)}))

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
        """Let time pass for the entries of `flows` or `affinity`."""
        table = self.hash(name)
        for key, value in list(table.items()):
            fields = table.value.unpack(value)._asdict()
            fields["seen_s"] = (fields["seen_s"] - seconds) % 2**32
            table.update([(key, table.value.pack(**fields))])

    def drops(self) -> dict[Drop, int]:
        """Counters that are not zero."""
        counters = self.tables["drops"]
        assert isinstance(counters, PerCpuArray)
        return {Drop(i): count for i, count in enumerate(counters.sums()) if count}

    def l4_addr(self, at: Address, proto: Protocol) -> dict[str, Any]:
        """Fields of a `struct l4_addr`."""
        return {"addr": self._packed(at[0]), "port": wire_port(at[1]), "proto": proto.number}

    def _array(self, name: str) -> ArrayTable:
        table = self.tables[name]
        assert isinstance(table, ArrayTable)
        return table


def artifacts(cache_dir: Path) -> dict[Family, Artifact]:
    """Compile our unit for both families, as an agent with pods in CLUSTER_CIDRS would."""
    kernel = tuple(int(part) for part in os.uname().release.split(".")[:2])
    node = {
        family: constants.node_defines(
            family,
            cluster_cidrs=CLUSTER_CIDRS,
            translate_pods=True,
            kernel=(kernel[0], kernel[1]),
        )
        for family in Family
    }
    return compiler.obtain(tuple(Family), cache_dir, extra_defines=node)


_ZERO_COUNTERS = bytes(8 * bpf.possible_cpus())


def _create(name: str, shape: MapShape) -> Table:
    sizes = {"sockets": 0, "settings": 1, "drops": len(Drop)}
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
