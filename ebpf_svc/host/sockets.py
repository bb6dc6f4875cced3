"""Destroy sockets whose peer is gone, in every network namespace of a cgroup; find who receives.

A connected socket that the socket hooks translated talks to its backend without asking anybody
again. When that backend goes, the socket must learn it: SOCK_DESTROY makes its next call fail with
ECONNABORTED, and a client connects anew. Both calls are sock_diag(7) messages, written here as
structs: a dump of ten thousand sockets then costs milliseconds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeVar

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import netlink
from ebpf_svc.model.net import Family, Protocol, family_of

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
CLONE_NEWNET = 0x40000000
LIVE_STATES = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))
"""States with a peer to lose: all but TIME_WAIT, CLOSE, LISTEN; a connected UDP socket is in 1."""

_REQUEST = struct.Struct("=BBBBI48s")
"""inet_diag_req_v2: family, protocol, extensions, pad, states, socket id."""
_ANSWER = struct.Struct("=BBBB48s20x")
"""inet_diag_msg: family, state, timer, retransmits, socket id, counters."""
_ID = struct.Struct("!HH16s16sI8s")
"""inet_diag_sockid: both ends' ports, both addresses, device, cookie."""
_ANY_COOKIE = b"\xff" * 8
_PEER = struct.Struct("!2xH16s16s")
_COOKIE = struct.Struct("=40xQ")
"""Parts of inet_diag_sockid: the peer's port, both addresses (wire order), the cookie (host order).
"""
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_MAPPED = bytes(10) + b"\xff\xff"

Result = TypeVar("Result")


class Peer(NamedTuple):
    """The other end of a socket."""

    family: Family
    """That of `address`: an IPv6 socket that talks IPv4 counts as IPv4."""
    protocol: Protocol
    address: str
    port: int
    cookie: int
    """The kernel's number of the socket, as bpf_get_socket_cookie gives it."""
    own_address: str = ""
    """The socket's, in the same family."""


def destroy_sockets(
    matches: Callable[[Peer], bool], *, protocols: Sequence[Protocol] = (Protocol.UDP,)
) -> int:
    """Destroy the matching connected sockets of this thread's network namespace.

    Args:
        matches: asked once for each socket that has a peer.
        protocols: kinds of sockets looked at.

    Returns:
        How many were destroyed; one that closed by itself meanwhile does not count.

    Raises:
        DataplaneError: the kernel refuses, e.g. it was built without INET_DIAG_DESTROY.
    """
    destroyed = 0
    with closing(netlink.Socket(NETLINK_SOCK_DIAG)) as link:
        for protocol in protocols:
            for family in _AF.values():
                doomed = [
                    socket_id
                    for socket_id in _dump(link, family, protocol)
                    if matches(_peer(family, protocol, socket_id))
                ]
                destroyed += _destroy(link, family, protocol, doomed)
    return destroyed


def destroy_below(
    cgroup: Path,
    matches: Callable[[Peer], bool],
    *,
    protocols: Sequence[Protocol] = (Protocol.UDP,),
) -> int:
    """Destroy matching sockets in every network namespace a process below a cgroup lives in.

    Returns:
        How many were destroyed. Raises like `destroy_sockets`.
    """
    return sum(
        in_namespace(path, lambda: destroy_sockets(matches, protocols=protocols)) or 0
        for path in network_namespaces(cgroup)
    )


def is_connected_receiver(source: tuple[str, int], to: tuple[str, int]) -> bool | None:
    """Whether the socket that would get a datagram is connected: the kernel searches as it would.

    Args:
        source: who sends.
        to: where to, in this thread's network namespace.

    Returns:
        None when no socket gets it, or this kernel cannot be asked.
    """
    family = _AF[family_of(to[0])]
    ends = [socket.inet_pton(family, address).ljust(16, b"\0") for address in (source[0], to[0])]
    # As a datagram has them: of UDP's sockets the kernel takes the first end for the other's.
    wanted = _ID.pack(source[1], to[1], *ends, 0, _ANY_COOKIE)
    request = _REQUEST.pack(family, Protocol.UDP.number, 0, 0, 0xFFFFFFFF, wanted)
    with closing(netlink.Socket(NETLINK_SOCK_DIAG)) as link:
        try:
            found = link.get(SOCK_DIAG_BY_FAMILY, request)
        except OSError:
            return None
    port, *_ = _PEER.unpack_from(_ANSWER.unpack_from(found)[4])
    return bool(port)


def network_namespaces(cgroup: Path) -> list[Path]:
    """One path below /proc for each network namespace of the processes below a cgroup."""
    found: dict[tuple[int, int], Path] = {}
    for processes in cgroup.rglob("cgroup.procs"):
        try:
            pids = processes.read_text().split()
        except OSError:  # the cgroup went, or is threaded and lists its processes higher up
            continue
        for pid in pids:
            path = Path("/proc", pid, "ns/net")
            try:
                status = path.stat()
            except OSError:  # the process went
                continue
            found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def in_namespace(namespace: Path, work: Callable[[], Result]) -> Result | None:
    """Do work in another network namespace, in a thread of its own that ends with it.

    Returns:
        What `work` returned; None when the namespace is gone.

    Raises:
        Exception: what `work` raised.
    """
    try:
        fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def enter_and_work() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(namespace))
            outcome.append(work())
        except BaseException as exc:  # handed to the caller, whose thread this is not
            failure.append(exc)

    try:
        thread = threading.Thread(target=enter_and_work, name="netns")
        thread.start()
        thread.join()
    finally:
        os.close(fd)
    if failure:
        raise failure[0]
    return outcome[0]


def _dump(link: netlink.Socket, family: int, protocol: Protocol) -> list[bytes]:
    """The socket ids of that family and protocol that have a peer."""
    request = _REQUEST.pack(family, protocol.number, 0, 0, LIVE_STATES, bytes(48))
    try:
        found = link.dump(SOCK_DIAG_BY_FAMILY, request)
    except OSError as error:
        if error.errno == errno.ENOENT:  # this kernel knows no sockets of that kind
            return []
        raise DataplaneError(f"sockets cannot be listed: {error.strerror}") from error
    return [_ANSWER.unpack_from(message.body)[4] for message in found]


def _destroy(
    link: netlink.Socket, family: int, protocol: Protocol, socket_ids: Sequence[bytes]
) -> int:
    """Destroy sockets; returns how many were not gone already."""
    outcomes = link.requests(
        [
            (SOCK_DESTROY, 0, _REQUEST.pack(family, protocol.number, 0, 0, LIVE_STATES, each))
            for each in socket_ids
        ]
    )
    for failure in outcomes:
        if failure is not None and failure.errno not in (errno.ENOENT, errno.ESTALE):
            reason = failure.reason
            raise DataplaneError(f"sockets cannot be destroyed (INET_DIAG_DESTROY): {reason}")
    return outcomes.count(None)


def _peer(family: int, protocol: Protocol, socket_id: bytes) -> Peer:
    port, own, other = _PEER.unpack_from(socket_id)
    (cookie,) = _COOKIE.unpack(socket_id)
    kind, part = Family.V6, slice(16)
    if family == socket.AF_INET:
        kind, part = Family.V4, slice(4)
    elif other.startswith(_MAPPED):
        kind, part = Family.V4, slice(12, 16)
    address, own_address = (socket.inet_ntop(_AF[kind], each[part]) for each in (other, own))
    return Peer(kind, protocol, address, port, cookie, own_address)
