"""The kernel's virtual servers (IPVS): written over netlink, real servers listed from proc.

A node of five thousand services has fifty thousand real servers: requests are packed by hand, many
in one system call. /proc lists every real server with its connections in one reading, where netlink
would want a request for each virtual server; what proc does not say (seconds of persistence, and
virtual servers it skips) comes from netlink. Knows nothing of services.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import netlink
from ebpf_svc.host.netlink import Failure, attribute, attributes
from ebpf_svc.model.net import Family, Protocol, family_of

PROC = Path("/proc/thread-self/net/ip_vs")
"""Of this thread's network namespace; there is none while the module is not loaded."""
MASQUERADE = "Masq"
"""Proc's word for the way of forwarding that translates addresses."""
_METHODS = (MASQUERADE, "Local", "Tunnel", "Route", "Bypass")
"""Proc's words for all of them, by their numbers."""
PERSISTENT, HASHED = 0x1, 0x2
"""Flags of a virtual server; the second is the kernel's own."""
HASH_PORT = 0x10
"""Scheduler flag: mh takes the source port into account (V5)."""
TEST_SERVER = ("198.51.100.0", 20000, Protocol.TCP)
"""Nobody's: added and removed to see what the kernel can (V1)."""

_GENERIC, _CONTROLLER, _GET_FAMILY = 16, 16, 3
_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST, _SET_CONFIG, _GET_CONFIG = 5, 6, 7, 8, 12, 13
_SERVICE, _DEST = 1, 2
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NETMASK = {Family.V4: struct.unpack("=I", b"\xff" * 4)[0], Family.V6: 128}
"""Persistence counts each address for itself."""
_ID = struct.Struct("=HHHxx HHHxx HH16s HHHxx")
"""Attributes of a virtual server that name it: family, protocol, address, port."""
_SHAPE = struct.Struct("=HHII HHI HHI")
"""Flags with their mask, seconds of persistence, netmask."""
_DEST_ID = struct.Struct("=HH16s HHHxx")
_DEST_SHAPE = struct.Struct("=HHI HHI HHI HHI")
"""Way of forwarding (0 = masquerade), weight, both thresholds (0 = none)."""


class ServerKey(NamedTuple):
    """What names a virtual server."""

    address: str
    port: int
    protocol: Protocol


class Dest(NamedTuple):
    """What names a real server of a virtual server."""

    address: str
    port: int


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """An address IPVS answers for."""

    address: str
    port: int
    protocol: Protocol
    active_count: int = 0
    """Connections that are established, over all its real servers."""


@dataclass(frozen=True, slots=True)
class RealServer:
    """Where a virtual server sends connections."""

    dest: Dest
    weight: int
    active_count: int
    inactive_count: int
    """Not yet or no longer established, and all that are not TCP."""
    method: str = MASQUERADE

    @property
    def connection_count(self) -> int:
        return self.active_count + self.inactive_count


class Shape(NamedTuple):
    """How a virtual server chooses."""

    scheduler: str
    flags: int = 0
    persistence_s: int = 0
    """How long a client keeps its real server; only with PERSISTENT."""


def virtual_servers() -> tuple[VirtualServer, ...]:
    """Every virtual server that has an address; empty without IPVS.

    Those for a mark of the firewall are left out: kube-proxy has none.
    """
    return parse(_proc())


def parse(text: str) -> tuple[VirtualServer, ...]:
    """Read the text of /proc/net/ip_vs."""
    return tuple(
        VirtualServer(*key, sum(real.active_count for real in reals)) for key, reals in _parse(text)
    )


def real_servers() -> dict[ServerKey, list[RealServer]]:
    """Virtual servers that have an address, with their real ones; empty without IPVS.

    Where other network namespaces have virtual servers too, the kernel skips some of ours wherever
    a page of the text ends (seen in 6.1): `Ipvs.real_servers` finds those as well.
    """
    return dict(_parse(_proc()))


def _proc() -> str:
    try:
        return PROC.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _parse(text: str) -> Iterator[tuple[ServerKey, list[RealServer]]]:
    """Real servers are lines below their virtual server's; those of marks are skipped."""
    key: ServerKey | None = None
    reals: list[RealServer] = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["->"]:
            if key is not None and words[1] != "RemoteAddress:Port":
                dest = Dest(*_endpoint(words[1]))
                weight, active, inactive = map(int, words[3:6])
                reals.append(RealServer(dest, weight, active, inactive, words[2]))
            continue
        if key is not None:
            yield key, reals
        key, reals = None, []
        if words and words[0] in Protocol.__members__:
            key = ServerKey(*_endpoint(words[1]), Protocol(words[0]))
    if key is not None:
        yield key, reals


def _endpoint(text: str) -> tuple[str, int]:
    """`0A600001:0050` or `[fd00:0010:…]:0050` as everybody else writes it."""
    address, _, port = text.rpartition(":")
    if address.startswith("["):
        return str(ipaddress.IPv6Address(address[1:-1])), int(port, 16)
    return socket.inet_ntoa(int(address, 16).to_bytes(4, "big")), int(port, 16)


class Ipvs:
    """IPVS of this thread's network namespace; use it as a context manager, or `close()`.

    Each method sends all it is given before it waits, and answers in the same order.
    """

    def __init__(self) -> None:
        """Find IPVS, which loads its module where that is allowed.

        Raises:
            DataplaneError: the kernel has none.
        """
        self._link = netlink.Socket(_GENERIC)
        family = _family_id(self._link)
        if family is None:
            self._link.close()
            raise DataplaneError("the kernel has no IPVS (module ip_vs)")
        self._family: int = family

    def close(self) -> None:
        """Give the descriptor back."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_servers(self, wanted: Iterable[tuple[ServerKey, Shape]]) -> list[Failure | None]:
        """Make virtual servers, yet without real ones; EEXIST for one that is there."""
        return self._send(_NEW_SERVICE, (_service(key, shape) for key, shape in wanted))

    def set_servers(self, wanted: Iterable[tuple[ServerKey, Shape]]) -> list[Failure | None]:
        """Change how virtual servers choose."""
        return self._send(_SET_SERVICE, (_service(key, shape) for key, shape in wanted))

    def remove_servers(self, keys: Iterable[ServerKey]) -> list[Failure | None]:
        """Remove virtual servers with their real ones; one that is gone is fine."""
        return _forgive(self._send(_DEL_SERVICE, map(_service, keys)), errno.ESRCH, errno.ENOENT)

    def add_dests(self, wanted: Iterable[tuple[ServerKey, Dest, int]]) -> list[Failure | None]:
        """Give virtual servers real ones, each with its weight; EEXIST for one that is there."""
        return self._send(_NEW_DEST, _dests(wanted))

    def set_dests(self, wanted: Iterable[tuple[ServerKey, Dest, int]]) -> list[Failure | None]:
        """Change weights; 0 = no new connections."""
        return self._send(_SET_DEST, _dests(wanted))

    def remove_dests(self, unwanted: Iterable[tuple[ServerKey, Dest]]) -> list[Failure | None]:
        """Take real servers away, and with them their connections; one that is gone is fine."""
        bodies = _dests((key, dest, None) for key, dest in unwanted)
        return _forgive(self._send(_DEL_DEST, bodies), errno.ESRCH, errno.ENOENT)

    def shapes(self) -> dict[ServerKey, Shape]:
        """How each virtual server that has an address chooses; raises OSError."""
        found = {}
        for message in self._link.dump(self._family, _header(_GET_SERVICE)):
            given = attributes(attributes(message.body[4:]).get(_SERVICE, b""))
            if 3 not in given:
                continue  # for a mark of the firewall
            (af,) = struct.unpack_from("=H", given[1])
            (protocol,) = struct.unpack_from("=H", given[2])
            address = given[3][:4] if af == socket.AF_INET else given[3][:16]
            (port,) = struct.unpack_from("!H", given[4])
            (flags,) = struct.unpack_from("=I", given[7])
            (persistence_s,) = struct.unpack_from("=I", given[8])
            key = ServerKey(
                str(ipaddress.ip_address(address)), port, Protocol.from_number(protocol)
            )
            scheduler = given.get(6, b"").rstrip(b"\0").decode()
            is_persistent = flags & PERSISTENT
            found[key] = Shape(scheduler, flags & ~HASHED, persistence_s if is_persistent else 0)
        return found

    def real_servers(self, keys: Iterable[ServerKey]) -> dict[ServerKey, list[RealServer]]:
        """The real servers of these virtual servers, and of others that proc tells of.

        Raises:
            OSError: the kernel does not say.
        """
        found = real_servers()
        return found | {key: self._reals_of(key) for key in keys if key not in found}

    def connection_counts(self, keys: Sequence[ServerKey]) -> Mapping[ServerKey, dict[Dest, int]]:
        """Connections of each real server of these virtual servers; one that is gone has none.

        Raises:
            OSError: the kernel does not say.
        """
        return {
            key: {real.dest: real.connection_count for real in self._reals_of(key)} for key in keys
        }

    def _reals_of(self, key: ServerKey) -> list[RealServer]:
        reals = []
        size = 4 if family_of(key.address) is Family.V4 else 16
        for message in self._link.dump(self._family, _header(_GET_DEST) + _service(key)):
            given = attributes(attributes(message.body[4:]).get(_DEST, b""))
            address = str(ipaddress.ip_address(given[1][:size]))
            (port,) = struct.unpack_from("!H", given[2])
            method, weight, active, inactive = (
                struct.unpack_from("=I", given[kind])[0] for kind in (3, 4, 7, 8)
            )
            word = _METHODS[method & 7] if method & 7 < len(_METHODS) else ""
            reals.append(RealServer(Dest(address, port), weight, active, inactive, word))
        return reals

    def set_timeouts(self, tcp_s: int, tcp_fin_s: int, udp_s: int) -> Failure | None:
        """Set how long idle connections are kept; 0 leaves one as it is."""
        body = b"".join(
            attribute(kind, struct.pack("=I", value))
            for kind, value in ((4, tcp_s), (5, tcp_fin_s), (6, udp_s))
        )
        return self._send(_SET_CONFIG, [body])[0]

    def _send(self, command: int, bodies: Iterable[bytes]) -> list[Failure | None]:
        header = _header(command)
        return self._link.requests([(self._family, 0, header + body) for body in bodies])


def try_scheduler(scheduler: str) -> str:
    """Add a virtual server with that scheduler and remove it again (V1).

    Returns:
        why that did not work, in words; empty when it did.
    """
    key = ServerKey(*TEST_SERVER)
    try:
        with Ipvs() as ipvs:
            if any(shape.scheduler == scheduler for shape in ipvs.shapes().values()):
                return ""
            (failure,) = ipvs.add_servers([(key, Shape(scheduler))])
            if failure is not None:
                return failure.reason
            seen = key in ipvs.shapes()
            ipvs.remove_servers([key])
    except (DataplaneError, OSError) as error:
        return str(error)
    return "" if seen else "a virtual server that was added is not listed"


def remove(servers: Iterable[VirtualServer]) -> None:
    """Remove virtual servers; one that is gone already is fine.

    Raises:
        DataplaneError: the kernel refused one.
    """
    wanted = [ServerKey(server.address, server.port, server.protocol) for server in servers]
    if not wanted:
        return
    with Ipvs() as ipvs:
        for key, failure in zip(wanted, ipvs.remove_servers(wanted), strict=True):
            if failure is not None:
                where = f"{key.address} port {key.port}"
                raise DataplaneError(f"virtual server {where}: {failure.reason}")


def _family_id(link: netlink.Socket) -> int | None:
    """The number IPVS has among generic netlink's families; asking by name loads the module."""
    ask = struct.pack("=BBH", _GET_FAMILY, 1, 0)
    if link.requests([(_CONTROLLER, 0, ask + attribute(2, b"IPVS\0"))]) != [None]:
        return None
    for message in link.dump(_CONTROLLER, ask):
        given = attributes(message.body[4:])
        if given.get(2) == b"IPVS\0":
            return int(struct.unpack_from("=H", given[1])[0])
    return None


def _header(command: int) -> bytes:
    return struct.pack("=BBH", command, 1, 0)


def _packed(address: str) -> bytes:
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return socket.inet_aton(address) + bytes(12)


def _service(key: ServerKey, shape: Shape | None = None) -> bytes:
    """The attribute of a virtual server: what names it, and all of it when a shape is given."""
    family = family_of(key.address)
    body = _ID.pack(
        *(6, 1, _AF[family], 6, 2, key.protocol.number),
        *(20, 3, _packed(key.address), 6, 4, socket.htons(key.port)),
    )
    if shape is not None:
        body += attribute(6, shape.scheduler.encode() + b"\0")
        body += _SHAPE.pack(
            *(12, 7, shape.flags, 0xFFFFFFFF),
            *(8, 8, shape.persistence_s, 8, 9, _NETMASK[family]),
        )
    return attribute(_SERVICE, body)


def _dests(wanted: Iterable[tuple[ServerKey, Dest, int | None]]) -> Iterator[bytes]:
    """Attributes that name a real server; all of it unless the weight is None."""
    last, service = None, b""
    for key, dest, weight in wanted:
        if key is not last:
            last, service = key, _service(key)
        body = _DEST_ID.pack(20, 1, _packed(dest.address), 6, 2, socket.htons(dest.port))
        if weight is not None:
            body += _DEST_SHAPE.pack(8, 3, 0, 8, 4, weight, 8, 5, 0, 8, 6, 0)
        yield service + attribute(_DEST, body)


def _forgive(answers: list[Failure | None], *errnos: int) -> list[Failure | None]:
    return [None if one is not None and one.errno in errnos else one for one in answers]


def is_loaded() -> bool:
    """Whether IPVS is in this kernel, without loading anything."""
    return PROC.exists()
