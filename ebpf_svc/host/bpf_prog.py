"""Programs through bpf(2): load, run on a packet of ours, attach to a cgroup.

The tc side of attaching is netlink's business, not this call's.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from dataclasses import dataclass
from enum import IntEnum

from ebpf_svc.errors import VerifierError
from ebpf_svc.host.bpf import NAME_SIZE, Attr, Command, address_of

_LOG_BYTES = 1 << 20
_LOG_TAIL_LINES = 40


class ProgramType(IntEnum):
    """`enum bpf_prog_type`, those in use."""

    SCHED_CLS = 3
    XDP = 6
    CGROUP_SOCK_ADDR = 18


class AttachType(IntEnum):
    """`enum bpf_attach_type`, those in use."""

    NONE = 0
    INET4_CONNECT = 10
    INET6_CONNECT = 11
    UDP4_SENDMSG = 14
    UDP6_SENDMSG = 15
    UDP4_RECVMSG = 19
    UDP6_RECVMSG = 20
    INET4_GETPEERNAME = 29
    INET6_GETPEERNAME = 30


class AttachFlag(IntEnum):
    """Flags of a cgroup attach."""

    ALLOW_MULTI = 2
    REPLACE = 4


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """What the kernel says a program is."""

    type: int
    id: int
    tag: str
    name: str
    map_ids: tuple[int, ...]
    instruction_count: int
    verified_count: int
    """Instructions the verifier walked through, of a million at most; 0 before Linux 5.16."""


@dataclass(frozen=True, slots=True)
class Run:
    """The outcome of a program run on a packet."""

    retval: int
    data: bytes
    context: bytes
    duration_ns: int
    """Mean of one repetition."""


def load(
    instructions: bytes,
    *,
    program_type: int,
    attach_type: int = AttachType.NONE,
    name: str = "",
) -> int:
    """Verify and load a program under the GPL.

    Returns:
        its file descriptor, the caller's to close.

    Raises:
        VerifierError: with the last lines of the verifier's log.
    """
    try:
        return _load(instructions, program_type, attach_type, name, None)
    except OSError as error:
        # The log is only asked for once it is needed: writing it doubles the time of a load.
        log = bytearray(_LOG_BYTES)
        code = error.errno or errno.EINVAL
        try:
            return _load(instructions, program_type, attach_type, name, log)
        except OSError as again:
            code = again.errno or code
        lines = bytes(log).split(b"\0", 1)[0].decode(errors="replace").splitlines()
        tail = "\n".join(lines[-_LOG_TAIL_LINES:]) or os.strerror(code)
        raise VerifierError(name, errno.errorcode.get(code, str(code)), tail) from error


def _load(
    instructions: bytes, program_type: int, attach_type: int, name: str, log: bytearray | None
) -> int:
    licence = b"GPL\0"
    return Attr(
        "2I2Q2IQ2I16s2I",
        *(program_type, len(instructions) // 8, address_of(instructions), address_of(licence)),
        *(1 if log else 0, len(log) if log else 0, address_of(log), 0, 0),
        name.encode()[: NAME_SIZE - 1],
        *(0, attach_type),
    ).call(Command.PROG_LOAD)


def facts(fd: int) -> ProgramFacts:
    """Ask the kernel what program `fd` is, with the ids of its maps."""
    info = bytearray(224)
    Attr("2IQ", fd, len(info), address_of(info)).call(Command.OBJ_GET_INFO_BY_FD)
    count = struct.unpack_from("=I", info, 52)[0]
    ids = bytearray(4 * max(count, 1))
    info = bytearray(224)
    struct.pack_into("=IQ", info, 52, count, address_of(ids))
    Attr("2IQ", fd, len(info), address_of(info)).call(Command.OBJ_GET_INFO_BY_FD)
    program_type, program_id, tag = struct.unpack_from("=2I8s", info)
    name = info[64:80].split(b"\0")[0].decode()
    map_ids = struct.unpack_from(f"={count}I", ids)
    instruction_bytes, verified_count = info[20:24], info[216:220]
    return ProgramFacts(
        program_type,
        program_id,
        tag.hex(),
        name,
        map_ids,
        int.from_bytes(instruction_bytes, sys.byteorder) // 8,
        int.from_bytes(verified_count, sys.byteorder),
    )


def by_id(program_id: int) -> int:
    """Open a program by its id; ENOENT when it is gone. The caller closes the descriptor."""
    return Attr("3I", program_id, 0, 0).call(Command.PROG_GET_FD_BY_ID)


def test_run(
    fd: int,
    data: bytes,
    *,
    repeat: int = 1,
    context: bytes | None = None,
    room: int = 512,
) -> Run:
    """Run a tc or XDP program on a packet, without any device.

    Args:
        fd: the program.
        data: the packet from its Ethernet header on, 14 bytes at least.
        repeat: how often; the kernel reports the mean time.
        context: a `struct __sk_buff` to start from, e.g. with an ifindex or mark; for XDP a
            `struct xdp_md`.
        room: bytes the packet may grow by.
    """
    out = bytearray(len(data) + room)
    context_out = bytearray(len(context) if context else 0)
    attr = Attr(
        "4I2Q4I2Q4I",
        *(fd, 0, len(data), len(out), address_of(data), address_of(out), repeat, 0),
        *(len(context or b""), len(context_out), address_of(context), address_of(context_out)),
        *(0, 0, 0, 0),
    )
    attr.call(Command.PROG_TEST_RUN)
    return Run(
        retval=attr.u32(4),
        data=bytes(out[: attr.u32(12)]),
        context=bytes(context_out[: attr.u32(44)]),
        duration_ns=attr.u32(36),
    )


def cgroup_attach(
    cgroup_fd: int, program_fd: int, attach_type: int, *, replace_fd: int | None = None
) -> None:
    """Attach beside whatever else is there; with `replace_fd`, swap that program in one step."""
    flags = AttachFlag.ALLOW_MULTI | (0 if replace_fd is None else AttachFlag.REPLACE)
    Attr("5I", cgroup_fd, program_fd, attach_type, flags, replace_fd or 0).call(Command.PROG_ATTACH)


def cgroup_detach(cgroup_fd: int, program_fd: int, attach_type: int) -> None:
    """Detach one program; ENOENT when it is not attached there."""
    Attr("5I", cgroup_fd, program_fd, attach_type, 0, 0).call(Command.PROG_DETACH)


def cgroup_query(cgroup_fd: int, attach_type: int) -> tuple[int, ...]:
    """Ids of the programs attached to this very cgroup, in the order they run."""
    room = 64
    while True:
        ids = bytearray(4 * room)
        attr = Attr("4IQ2I", cgroup_fd, attach_type, 0, 0, address_of(ids), room, 0)
        try:
            attr.call(Command.PROG_QUERY)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            room *= 4
            continue
        return struct.unpack_from(f"={attr.u32(24)}I", ids)
