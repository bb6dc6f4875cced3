"""Transactions of nf_tables: many messages that take effect together, or not at all.

What the messages say is `nf_tables`' matter. The kernel works through a batch while it is sent, so
every answer waits in the socket when `send` returns.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ebpf_svc.host import netlink
from ebpf_svc.host.netlink import Failure

NETLINK_NETFILTER = 12
SUBSYSTEM = 10
"""NFNL_SUBSYS_NFTABLES."""

_BATCH_BEGIN, _BATCH_END = 16, 17
_GENERATION_ID = 1
_NEW_GENERATION, _GET_GENERATION = 15, 16
_NLMSG_ERROR = 2
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ANSWER_BYTES = 8 << 20
"""Room for the refusals of some ten thousand messages."""
_HEADER = struct.Struct(">BBH")


class Request(NamedTuple):
    """One message of a transaction."""

    kind: int
    """NFT_MSG_*."""
    flags: int
    body: bytes


class Refused(Exception):
    """The kernel refused a transaction and changed nothing."""

    def __init__(self, failures: Sequence[tuple[int | None, Failure]]) -> None:
        super().__init__("; ".join(failure.reason for _, failure in failures[:3]))
        self.failures = tuple(failures)
        """Index of each message that failed, and why; None = the transaction as a whole."""

    def has_only(self, number: int) -> bool:
        """Whether every failure is this errno."""
        return all(failure.errno == number for _, failure in self.failures)


class GenerationPassed(Exception):
    """Somebody else's transaction came first, so nothing was changed."""


def header(family: int, resource: int = 0) -> bytes:
    """The extra header every message of netfilter starts with."""
    return _HEADER.pack(family, 0, resource)


class Socket(netlink.Socket):
    """A socket for lists and transactions of the calling thread's network namespace."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)
        self._make_room(_SO_RCVBUFFORCE, socket.SO_RCVBUF, _ANSWER_BYTES)
        self._send_bytes = 0

    def commit(self, wanted: Sequence[Request], *, generation: int | None = None) -> None:
        """Do all of it, or nothing.

        Args:
            wanted: the messages, in order.
            generation: what `generation()` said; with it, nothing is done if another transaction
                took place since.

        Raises:
            Refused: the kernel did nothing, and says about which messages.
            GenerationPassed: it did nothing, as another transaction took place.
            OSError: the batch could not be sent.
        """
        if not wanted:
            return
        first = self._sequence + 1
        last = first + len(wanted) - 1
        self._sequence = last + 1
        begin = header(0, SUBSYSTEM)
        if generation is not None:
            begin += netlink.attribute(_GENERATION_ID, struct.pack(">I", generation))
        parts = [netlink.encode(_BATCH_BEGIN, netlink.REQUEST, first - 1, begin)]
        for sequence, (kind, flags, body) in enumerate(wanted, start=first):
            # The last message alone is acknowledged: a batch of a million would drown us.
            more = netlink.ACK if sequence == last else 0
            parts.append(
                netlink.encode(
                    SUBSYSTEM << 8 | kind, flags | more | netlink.REQUEST, sequence, body
                )
            )
        parts.append(netlink.encode(_BATCH_END, netlink.REQUEST, last + 1, header(0, SUBSYSTEM)))
        data = b"".join(parts)
        self._grow(len(data))
        self._socket.send(data)
        self._heed_answers(first, last)

    def generation(self) -> int:
        """A number that grows by one with every transaction, whoever's it is."""
        self._sequence += 1
        self._socket.send(
            netlink.encode(
                SUBSYSTEM << 8 | _GET_GENERATION, netlink.REQUEST, self._sequence, header(0)
            )
        )
        while True:
            for kind, _, sequence, body in netlink.messages(self._socket.recv(1 << 16)):
                if sequence != self._sequence:
                    continue
                if kind == SUBSYSTEM << 8 | _NEW_GENERATION:
                    value = netlink.attributes(body[_HEADER.size :])[1]
                    return int.from_bytes(value, "big")
                failure = netlink.failure_of(body)
                if failure is not None:
                    raise OSError(failure.errno, failure.reason)

    def list(self, kind: int, family: int, attributes: bytes = b"") -> list[bytes]:
        """Every object of a kind: what follows the headers.

        Raises:
            OSError: the kernel refused, or things changed so often that no list came out whole.
        """
        found = self.dump(SUBSYSTEM << 8 | kind, header(family) + attributes)
        return [message.body[_HEADER.size :] for message in found]

    def _heed_answers(self, first: int, last: int) -> None:
        failures: list[tuple[int | None, Failure]] = []
        is_done = False
        while True:
            try:
                data = self._socket.recv(1 << 18, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                failures.append((None, Failure(error.errno, "more refusals than fit")))
                continue
            for kind, _, sequence, body in netlink.messages(data):
                if kind != _NLMSG_ERROR or not first - 1 <= sequence <= last + 1:
                    continue
                failure = netlink.failure_of(body)
                if failure is not None:
                    index = sequence - first if first <= sequence <= last else None
                    failures.append((index, failure))
                elif sequence == last:
                    is_done = True
        if any(failure.errno == errno.ERESTART for _, failure in failures):
            raise GenerationPassed
        if failures or not is_done:
            raise Refused(failures or [(None, Failure(errno.EIO, "no answer"))])

    def _grow(self, length: int) -> None:
        """Let a batch of that many bytes be sent at once."""
        if length > self._send_bytes:
            self._send_bytes = max(length + (1 << 16), 1 << 20)
            self._make_room(_SO_SNDBUFFORCE, socket.SO_SNDBUF, self._send_bytes)

    def _make_room(self, force: int, usual: int, length: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, force, length)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, usual, length)
