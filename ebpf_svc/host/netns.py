"""The cookie of this thread's network namespace, as programs see it.

Linux 5.14 tells it to whoever asks (SO_NETNS_COOKIE). Before, only programs can ask: one is put on
a cgroup for the moment of a single connect(2) and passes every other socket by.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from pathlib import Path

from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.host import bpf, bpf_prog
from ebpf_svc.host.bpf import MapType
from ebpf_svc.host.bpf_prog import AttachType, ProgramType

SO_COOKIE, SO_NETNS_COOKIE = 57, 71
"""Not in Python's socket module."""
_MAP_UPDATE_ELEM, _GET_SOCKET_COOKIE, _GET_NETNS_COOKIE = 2, 46, 122
_R0, _R1, _R2, _R3, _R4, _R6, _R10 = 0, 1, 2, 3, 4, 6, 10
_PSEUDO_MAP_FD = 1


def cookie(cgroup: Path) -> int:
    """Ask for the cookie.

    Args:
        cgroup: one that holds this process; needed before Linux 5.14 only.

    Raises:
        UnsupportedHost: the kernel does not tell, and this process is not below `cgroup`.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            told = probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return _ask_by_program(probe, cgroup)
    return int.from_bytes(told, sys.byteorder)


def _ask_by_program(probe: socket.socket, cgroup: Path) -> int:
    mine = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)
    answer = bpf.map_create(MapType.ARRAY, key_size=4, value_size=8, max_entries=1)
    cgroup_fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        program = bpf_prog.load(
            _program(mine, answer),
            program_type=ProgramType.CGROUP_SOCK_ADDR,
            attach_type=AttachType.INET4_CONNECT,
            name="esvc_netns",
        )
        try:
            bpf_prog.cgroup_attach(cgroup_fd, program, AttachType.INET4_CONNECT)
            try:
                # The hook comes before routing, so it may fail; and nothing is sent by it.
                with contextlib.suppress(OSError):
                    probe.connect(("127.0.0.1", 9))
            finally:
                bpf_prog.cgroup_detach(cgroup_fd, program, AttachType.INET4_CONNECT)
        finally:
            os.close(program)
        found = int.from_bytes(bpf.lookup(answer, bytes(4), 8) or b"", sys.byteorder)
    finally:
        os.close(cgroup_fd)
        os.close(answer)
    if not found:
        raise UnsupportedHost([f"netns cookie: this process is in no cgroup of {cgroup}"])
    return found


def _program(socket_cookie: int, answer: int) -> bytes:
    """Store the namespace's cookie when that very socket connects; allow all."""
    store = [
        _instruction(0xBF, _R1, _R6),
        _instruction(0x85, imm=_GET_NETNS_COOKIE),
        _instruction(0x7B, _R10, _R0, -8),  # *(u64 *)(r10 - 8) = r0
        _instruction(0x62, _R10, offset=-12, imm=0),  # *(u32 *)(r10 - 12) = 0
        *_load_64(_R1, answer, _PSEUDO_MAP_FD),
        _instruction(0xBF, _R2, _R10),
        _instruction(0x07, _R2, imm=-12),
        _instruction(0xBF, _R3, _R10),
        _instruction(0x07, _R3, imm=-8),
        _instruction(0xB7, _R4, imm=0),
        _instruction(0x85, imm=_MAP_UPDATE_ELEM),
    ]
    return b"".join(
        [
            _instruction(0xBF, _R6, _R1),
            _instruction(0x85, imm=_GET_SOCKET_COOKIE),
            *_load_64(_R2, socket_cookie),
            _instruction(0x5D, _R0, _R2, len(store)),  # if r0 != r2 skip `store`
            *store,
            _instruction(0xB7, _R0, imm=1),
            _instruction(0x95),
        ]
    )


def _instruction(
    operation: int, target: int = 0, source: int = 0, offset: int = 0, imm: int = 0
) -> bytes:
    return struct.pack("=BBhi", operation, target | source << 4, offset, imm)


def _load_64(target: int, value: int, kind: int = 0) -> list[bytes]:
    """The one instruction of two words: a 64-bit number, or a map by its descriptor."""
    low, high = struct.unpack("=2i", struct.pack("=Q", value))
    return [_instruction(0x18, target, kind, imm=low), _instruction(0, imm=high)]
