"""Programs and maps to measure, unpinned and unattached: ours, a minimal one, an empty one.

A `Rig` holds one family's programs with maps for a large cluster, filled with services of two
endpoints each. Three of them are special and named in `Called`.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import compiler, constants, maglev, source
from ebpf_svc.dataplane.ebpf.artifact import Artifact, MapShape
from ebpf_svc.dataplane.ebpf.constants import MASQUERADE_SHIFT, BackendFlag, FrontendFlag
from ebpf_svc.dataplane.ebpf.layout import Layout, wire_port
from ebpf_svc.dataplane.ebpf.table import ArrayTable, HashTable, Table
from ebpf_svc.dataplane.ebpf.tables import max_entries
from ebpf_svc.host import bpf, bpf_prog
from ebpf_svc.host.bpf import MapFlag, MapType
from ebpf_svc.host.bpf_prog import ProgramFacts, ProgramType
from ebpf_svc.model.net import Family, Sources

TCP = 6
SERVICE_PORT, NODE_PORT, BACKEND_PORT = 80, 30080, 8080
ENDPOINTS = 2
"""Of every service but the one replies are measured with."""
SYN, ACK = 0x02, 0x10
ALWAYS_NEW = 0xFFFFFFFF
"""So many flows that none comes back."""

SETTINGS = EbpfSettings(
    flow_entries=262_144, frontend_entries=131_072, backend_entries=262_144, slot_entries=524_288
)
"""Table sizes, the same whatever is in them."""

_DRIVER_FILES = ("bench/driver.c", "bench/minimal.c")
_PROG_ARRAY = 3
_ETHERNET_BYTES, _SK_BUFF_BYTES = 14, 192
_OURS = ("pod_ingress", "node_ingress", "egress")
_CLUSTER_CIDRS = ("10.244.0.0/16", "fd00:10:244::/48")
_MINIMAL_SIZES = {
    "least_services": "frontends",
    "least_flows": "flows",
    "least_slots": "slots",
    "least_backends": "backends",
}


@dataclass(frozen=True, slots=True)
class Addresses:
    """First addresses of each kind; others follow by counting up."""

    vip: int
    backend: int
    client: int
    node: int
    stranger: int

    @classmethod
    def of(cls, family: Family) -> Addresses:
        """Those of a family."""
        v4 = ("10.96.0.0", "10.128.0.0", "10.244.0.1", "172.18.0.2", "192.0.2.9")
        v6 = ("fd00:10:96::", "fd00:10:128::", "fd00:10:244::1", "fd00:18::2", "2001:db8::9")
        texts = v4 if family is Family.V4 else v6
        return cls(*(int(ipaddress.ip_address(text)) for text in texts))


@dataclass(frozen=True, slots=True)
class Called:
    """The addresses packets are sent to."""

    cluster_ip: int
    """One in the middle of all services, with two endpoints."""
    single: int
    """A service of one endpoint, so that it is known who answers."""
    single_backend: int
    node: int
    """Its NodePort leads to the endpoints of `cluster_ip`, masqueraded, by a Maglev table."""
    stranger: int
    """No service at all."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of many packets."""

    duration_ns: int
    """Of one, the driver's own part included."""
    verdict: int
    """Of the last one, as are the ports it left with."""
    sport: int
    dport: int


class Rig:
    """One family's programs and maps. `close` gives all of it back to the kernel."""

    def __init__(self, family: Family, service_count: int, cache_dir: Path) -> None:
        self.family = family
        self._undo = ExitStack()
        self._tables: dict[str, Table] = {}
        self._programs: dict[str, int] = {}
        try:
            ours, bench = _artifacts(family, cache_dir)
            for artifact, names in ((ours, _OURS), (bench, ("minimal", "drive", "nothing"))):
                self._load(artifact, names)
            self.called = self._fill(service_count)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give every descriptor back."""
        self._undo.close()

    def _load(self, artifact: Artifact, names: tuple[str, ...]) -> None:
        for name, shape in artifact.maps.items():
            self._tables[name] = _create(name, shape)
            self._undo.callback(self._tables[name].close)
        fds = {name: self._tables[name].fd for name in artifact.maps}
        for name in names:
            code = artifact.programs[name].relocated(fds)
            fd = bpf_prog.load(code, program_type=ProgramType.SCHED_CLS, name=f"bench_{name}")
            self._programs[name] = fd
            self._undo.callback(os.close, fd)

    def facts(self) -> dict[str, ProgramFacts]:
        """What the kernel says of our programs."""
        return {name: bpf_prog.facts(self._programs[name]) for name in _OURS}

    # Filling.

    def _fill(self, count: int) -> Called:
        first = Addresses.of(self.family)
        called = Called(
            cluster_ip=first.vip + count // 2,
            single=first.vip + count,
            single_backend=first.backend + count * ENDPOINTS,
            node=first.node,
            stranger=first.stranger,
        )
        members = [[i * ENDPOINTS + 1 + j for j in range(ENDPOINTS)] for i in range(count)]
        members.append([count * ENDPOINTS + 1])
        self._write_backends(first.backend, members)
        slots = array("I", [backend for ids in members for backend in ids])
        table = maglev.table(["a", "b"], maglev.table_size(ENDPOINTS, 100), "bench")
        chosen = array("I", [members[count // 2][i] for i in table])
        self._array("slots").write(0, (slots + chosen).tobytes())
        self._write_frontends(first, members, (len(slots), len(chosen)), called)
        self._write_minimal(first, members)
        settings = self._hash("settings")
        settings.update([(bytes(4), settings.value.pack(host_netns=0, hash_seed=1))])
        return called

    def _write_backends(self, first: int, members: list[list[int]]) -> None:
        table, index = self._array("backends"), self._hash("backend_index")
        flags = int(BackendFlag.SERVING | BackendFlag.IN_CLUSTER)
        order = ("at_addr", "at_port", "at_proto", "service", "next", "flags")
        pack, pack_key = table.value.packer(*order), index.key.packer("addr", "port", "proto")
        port = wire_port(BACKEND_PORT)
        values, keys = [table.value.pack(**dict.fromkeys(order[1:], 0), at_addr=self._wire(0))], []
        for service, ids in enumerate(members, start=1):
            for backend in ids:
                address = self._wire(first + backend - 1)
                values.append(pack(address, port, TCP, service, constants.NO_BACKEND, flags))
                keys.append((pack_key(address, port, TCP), struct.pack("=I", backend)))
        table.write(0, b"".join(values))
        index.update(keys)

    def _write_frontends(
        self,
        first: Addresses,
        members: list[list[int]],
        chosen: tuple[int, int],
        called: Called,
    ) -> None:
        table = self._hash("frontends")
        order = ("service", "flags", "cluster_first", "cluster_count", "local_first")
        pack = table.value.packer(*order, "local_count", "affinity_s", "ranges")
        items = []
        at = 0
        for i, ids in enumerate(members):
            flags = int(Sources.NODE | Sources.EXTERNAL) << MASQUERADE_SHIFT
            value = pack(i + 1, flags, at, len(ids), 0, 0, 0, 0)
            items.append((self._key(table, first.vip + i, SERVICE_PORT), value))
            at += len(ids)
        flags = int(Sources.ALL) << MASQUERADE_SHIFT | int(FrontendFlag.MAGLEV)
        service = called.cluster_ip - first.vip + 1
        value = pack(service, flags, *chosen, 0, 0, 0, 0)
        table.update([*items, (self._key(table, called.node, NODE_PORT), value)])

    def _write_minimal(self, first: Addresses, members: list[list[int]]) -> None:
        backends, slots = self._array("least_backends"), self._array("least_slots")
        pack = backends.value.packer("addr", "port", "proto")
        port = wire_port(BACKEND_PORT)
        count = sum(len(ids) for ids in members)
        packed = [pack(self._wire(first.backend + i), port, TCP) for i in range(count)]
        backends.write(0, b"".join(packed))
        slots.write(0, array("I", range(count)).tobytes())
        services = self._hash("least_services")
        items, at = [], 0
        for i, ids in enumerate(members):
            value = struct.pack("=2I", at, len(ids))
            items.append((self._key(services, first.vip + i, SERVICE_PORT), value))
            at += len(ids)
        services.update(items)

    def _key(self, table: HashTable, address: int, port: int) -> bytes:
        return table.key.pack(addr=self._wire(address), port=wire_port(port), proto=TCP)

    def _wire(self, address: int) -> bytes:
        return address.to_bytes(4 if self.family is Family.V4 else 16, "big")

    def _hash(self, name: str) -> HashTable:
        table = self._tables[name]
        assert isinstance(table, HashTable)
        return table

    def _array(self, name: str) -> ArrayTable:
        table = self._tables[name]
        assert isinstance(table, ArrayTable)
        return table

    # Running.

    def wear_in(self) -> None:
        """Fill both flow tables and empty them again.

        A fresh table hands out its entries in the order they lie in memory, which flatters
        whoever walks many flows; one in use does not.
        """
        client = (Addresses.of(self.family).client, 0)
        to = (self.called.cluster_ip, SERVICE_PORT)
        self.aim(src=client, dst=to, flags=SYN, flows=ALWAYS_NEW)
        for program in ("pod_ingress", "minimal"):
            self.run(program, SETTINGS.flow_entries * 2)
        self.forget_flows()

    def forget_flows(self) -> None:
        """Empty the flow tables of both."""
        for name in ("flows", "least_flows"):
            self._hash(name).clear()

    def aim(
        self,
        *,
        src: tuple[int, int],
        dst: tuple[int, int],
        flags: int,
        flows: int,
        is_reply: bool = False,
    ) -> None:
        """Set what packets the next runs send.

        Args:
            src, dst: addresses and ports; the client's are the first of many, its port is ignored.
            flags: TCP's.
            flows: how many clients take turns.
            is_reply: the client is `dst`.
        """
        ports = (0 if not is_reply else src[1], 0 if is_reply else dst[1])
        transport = struct.pack("!2H2I2B3H", *ports, 1, 1, 5 << 4, flags, 512, 0, 0)
        if self.family is Family.V4:
            head = struct.pack("!2B3H2BH", 0x45, 0, 40, 0, 0x4000, 64, TCP, 0)
        else:
            head = struct.pack("!IH2B", 6 << 28, 20, TCP, 64)
        words = head + self._wire(src[0]) + self._wire(dst[0]) + transport
        self._packet = b"\2\0\0\0\0\1\2\0\0\0\0\2" + _ETHERTYPE[self.family] + words
        driver = self._hash("driver")
        driver.update([(bytes(4), words + struct.pack("=3I", flows, 0, int(is_reply)))])

    def run(self, program: str, repeat: int) -> Sent:
        """Send `repeat` packets through a program."""
        target = struct.pack("=I", self._programs[program])
        bpf.update(self._tables["target"].fd, bytes(4), target)
        run = bpf_prog.test_run(
            self._programs["drive"], self._packet, repeat=repeat, context=bytes(_SK_BUFF_BYTES)
        )
        at = _ETHERNET_BYTES + (20 if self.family is Family.V4 else 40)
        return Sent(run.duration_ns, run.retval, *struct.unpack_from("!2H", run.data, at))


_ETHERTYPE = {Family.V4: b"\x08\x00", Family.V6: b"\x86\xdd"}


def prepare(families: Iterable[Family], cache_dir: Path, kernel: tuple[int, int]) -> None:
    """Compile into a cache what a machine of that kernel will load."""
    for family in families:
        _artifacts(family, cache_dir, kernel)


def _artifacts(
    family: Family, cache_dir: Path, kernel: tuple[int, int] | None = None
) -> tuple[Artifact, Artifact]:
    """Our unit as an agent compiles it, and the yardsticks'; for this kernel unless told."""
    if kernel is None:
        major, minor, *_ = os.uname().release.split(".")
        kernel = int(major), int(minor)
    node = constants.node_defines(
        family, cluster_cidrs=_CLUSTER_CIDRS, translate_pods=True, kernel=kernel
    )
    root = source.source_dir()
    text = source.join([root / name for name in _DRIVER_FILES], root)
    ours, bench = (
        compiler.obtain((family,), cache_dir, extra_defines={family: node}, text=unit)[family]
        for unit in (None, text)
    )
    return ours, bench


def _create(name: str, shape: MapShape) -> Table:
    """An unpinned map."""
    if name in ("driver", "target"):
        size = 1
    else:
        size = max_entries(_MINIMAL_SIZES.get(name, name), SETTINGS)
    fd = bpf.map_create(
        shape.type,
        key_size=shape.key_size,
        value_size=shape.value_size,
        max_entries=size,
        flags=shape.flags,
        name=f"bench_{name}",
    )
    key = Layout.from_desc(shape.key_desc, shape.key_size, f"{name}_key")
    value = Layout.from_desc(shape.value_desc, shape.value_size, f"{name}_value")
    if shape.type in (MapType.SK_STORAGE, MapType.PERCPU_ARRAY, _PROG_ARRAY):
        return Table(name, fd, key, value)
    if shape.flags & MapFlag.MMAPABLE:
        return ArrayTable(name, fd, key, value)
    return HashTable(name, fd, key, value)
