"""Which programs there are, and loading them: artifact plus maps make kernel programs.

Kernel names carry our prefix and the family, so that what an earlier run attached is recognised
without any state of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import bpf_prog
from ebpf_svc.host.bpf_prog import AttachType, ProgramType
from ebpf_svc.model.net import Family

NAME_PREFIX = "esvc"
"""Programs of ours are named `esvc4_*` and `esvc6_*` in the kernel."""


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """What a C function is to the kernel."""

    kernel_name: str
    """Behind `esvc4_` or `esvc6_`; a kernel name has 15 characters at most."""
    type: ProgramType
    attach_types: Mapping[Family, AttachType]
    """By family of the unit; a unit whose family is not here has no such function."""

    def name(self, family: Family) -> str:
        """The name in the kernel."""
        return f"{NAME_PREFIX}{int(family)}_{self.kernel_name}"


def _device(kernel_name: str, kind: ProgramType = ProgramType.SCHED_CLS) -> ProgramSpec:
    none = {Family.V4: AttachType.NONE, Family.V6: AttachType.NONE}
    return ProgramSpec(kernel_name, kind, none)


def _socket(kernel_name: str, v4: AttachType, v6: AttachType) -> ProgramSpec:
    return ProgramSpec(kernel_name, ProgramType.CGROUP_SOCK_ADDR, {Family.V4: v4, Family.V6: v6})


def _mapped(kernel_name: str, attach_type: AttachType) -> ProgramSpec:
    return ProgramSpec(kernel_name, ProgramType.CGROUP_SOCK_ADDR, {Family.V4: attach_type})


DEVICE_PROGRAMS = {
    "pod_ingress": _device("pod_in"),
    "node_ingress": _device("node_in"),
    "node_ingress_l3": _device("node_in3"),
    "egress": _device("out"),
    "egress_l3": _device("out3"),
}
XDP_PROGRAM = "xdp"
SOCKET_PROGRAMS = {
    "connect": _socket("connect", AttachType.INET4_CONNECT, AttachType.INET6_CONNECT),
    "sendmsg": _socket("sendmsg", AttachType.UDP4_SENDMSG, AttachType.UDP6_SENDMSG),
    "recvmsg": _socket("recvmsg", AttachType.UDP4_RECVMSG, AttachType.UDP6_RECVMSG),
    "getpeername": _socket("peername", AttachType.INET4_GETPEERNAME, AttachType.INET6_GETPEERNAME),
    # IPv4 spoken by IPv6 sockets: hooked where those are, answered from the IPv4 maps.
    "connect_mapped": _mapped("mconnect", AttachType.INET6_CONNECT),
    "sendmsg_mapped": _mapped("msendmsg", AttachType.UDP6_SENDMSG),
    "recvmsg_mapped": _mapped("mrecvmsg", AttachType.UDP6_RECVMSG),
    "getpeername_mapped": _mapped("mpeername", AttachType.INET6_GETPEERNAME),
}
PEER_PROGRAMS = frozenset(
    name for name in SOCKET_PROGRAMS if name.startswith(("recvmsg", "getpeername"))
)
"""Socket programs that only say who a socket talks to, and choose nothing."""
PROGRAMS: Mapping[str, ProgramSpec] = {
    **DEVICE_PROGRAMS,
    **SOCKET_PROGRAMS,
    XDP_PROGRAM: _device("xdp", ProgramType.XDP),
}
"""C function name -> what it is."""


@dataclass(frozen=True, slots=True)
class LoadedProgram:
    """A program in the kernel, held by its descriptor."""

    name: str
    """The C function."""
    kernel_name: str
    family: Family
    fd: int
    id: int
    attach_type: AttachType


class Programs:
    """The loaded programs of some families; `close` gives the descriptors back."""

    def __init__(self, loaded: Mapping[tuple[Family, str], LoadedProgram]) -> None:
        self._loaded = dict(loaded)

    @classmethod
    def load(
        cls, artifacts: Mapping[Family, Artifact], fds: Mapping[Family, Mapping[str, int]]
    ) -> Programs:
        """Relocate and load every program of the artifacts.

        Args:
            artifacts: by family.
            fds: by family, the descriptor of each map by its C name.

        Raises:
            VerifierError: the kernel refused one; none stay loaded.
            DataplaneError: the C has a function this module does not know.
        """
        wanted = [
            (family, name, program)
            for family, artifact in artifacts.items()
            for name, program in artifact.programs.items()
        ]
        for family, name, _ in wanted:
            if name not in PROGRAMS or family not in PROGRAMS[name].attach_types:
                raise DataplaneError(f"function {name} of the C source has no use here")
        # The verifier takes most of a restart, and verifies side by side.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            futures = [
                pool.submit(_load, family, name, program.relocated(fds[family]))
                for family, name, program in wanted
            ]
        loaded = [future.result() for future in futures if future.exception() is None]
        programs = cls({(program.family, program.name): program for program in loaded})
        for future in futures:
            failure = future.exception()
            if failure is not None:
                programs.close()
                raise failure
        return programs

    def get(self, family: Family, name: str) -> LoadedProgram | None:
        """The program of a C function, or None when that unit has none."""
        return self._loaded.get((family, name))

    def fd(self, family: Family, name: str) -> int:
        """Its descriptor; KeyError when that unit has no such function."""
        return self._loaded[family, name].fd

    def __iter__(self) -> Iterator[LoadedProgram]:
        return iter(self._loaded.values())

    @property
    def families(self) -> tuple[Family, ...]:
        """Families with any program."""
        return tuple(sorted({program.family for program in self}))

    def close(self) -> None:
        """Give the descriptors back; what is attached stays."""
        for program in self._loaded.values():
            os.close(program.fd)
        self._loaded.clear()


def _load(family: Family, name: str, instructions: bytes) -> LoadedProgram:
    spec = PROGRAMS[name]
    attach_type, kernel_name = spec.attach_types[family], spec.name(family)
    fd = bpf_prog.load(
        instructions, program_type=spec.type, attach_type=attach_type, name=kernel_name
    )
    program_id = bpf_prog.facts(fd).id
    return LoadedProgram(name, kernel_name, family, fd, program_id, attach_type)
