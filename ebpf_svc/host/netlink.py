"""Raw netlink sockets: framing, attributes, requests, dumps, notifications.

Raw, because three things matter here that a general library hides: many requests in one system
call (a node has a thousand devices), what of an answer we read at all, and being told when the
kernel dropped notifications. A socket belongs to the network namespace of the thread that opened
it, whoever uses it later.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

REQUEST, ACK, DUMP, CREATE, EXCL, REPLACE = 0x1, 0x4, 0x300, 0x400, 0x200, 0x100

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SOL_NETLINK, _EXT_ACK, _CAP_ACK, _STRICT_CHECK = 270, 11, 10, 12
_HEADER = struct.Struct("=IHHII")
_RECEIVE_BYTES = 1 << 18
_QUEUE_BYTES = 8 << 20
_QUEUE_MESSAGES = 2 * _QUEUE_BYTES // 512
"""The kernel doubles what is asked for, and counts at least so many bytes for a message."""
_MESSAGES_AT_ONCE = 64
"""Acknowledgements of that many fit the least receive queue."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its type and what follows the header."""

    type: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the kernel refused a request."""

    errno: int
    reason: str
    """The kernel's own words where it gave any."""


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode one attribute, padded."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Decode attributes; of a repeated kind the last counts."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += length + (-length % 4)
    return found


class Socket:
    """A request socket of one of netlink's protocols: one thread at a time."""

    def __init__(self, protocol: int) -> None:
        self._socket = _open(protocol)
        self._sequence = 0

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()

    def requests(self, wanted: Sequence[tuple[int, int, bytes]]) -> list[Failure | None]:
        """Send requests (type, flags, body), many at a time.

        Returns:
            for each in order None, or why the kernel refused it; one refusal does not stop others.
        """
        results: list[Failure | None] = []
        for start in range(0, len(wanted), _MESSAGES_AT_ONCE):
            chunk = wanted[start : start + _MESSAGES_AT_ONCE]
            first = self._sequence + 1
            self._sequence += len(chunk)
            self._socket.send(
                b"".join(
                    encode(kind, flags | REQUEST | ACK, first + i, body)
                    for i, (kind, flags, body) in enumerate(chunk)
                )
            )
            answers: dict[int, Failure | None] = {}
            while len(answers) < len(chunk):
                for kind, _, sequence, body in messages(self._socket.recv(_RECEIVE_BYTES)):
                    if kind == _NLMSG_ERROR and sequence >= first:
                        answers[sequence] = failure_of(body)
            results += [answers[first + i] for i in range(len(chunk))]
        return results

    def get(self, kind: int, body: bytes) -> bytes:
        """Ask for one object: its body; raises OSError when the kernel refuses or has none."""
        self._sequence += 1
        self._socket.send(encode(kind, REQUEST, self._sequence, body))
        while True:
            for got, _, sequence, payload in messages(self._socket.recv(_RECEIVE_BYTES)):
                if sequence != self._sequence:
                    continue
                failure = failure_of(payload) if got == _NLMSG_ERROR else None
                if failure is not None:
                    raise OSError(failure.errno, failure.reason)
                return payload

    def dump(self, kind: int, body: bytes) -> list[Message]:
        """Ask for every object of a kind.

        Raises:
            OSError: the kernel refused, or things changed so often that no list came out whole.
        """
        for _ in range(10):
            try:
                return list(self.stream(kind, body))
            except Interrupted:
                continue
        raise OSError(errno.EAGAIN, "the list changes faster than it can be read")

    def stream(self, kind: int, body: bytes) -> Iterator[Message]:
        """The same for lists too long to hold: each object as it comes. Read it to its end.

        Raises:
            Interrupted: at the end; objects came or went meanwhile, so some may be missing.
            OSError: the kernel refused.
        """
        self._sequence += 1
        self._socket.send(encode(kind, REQUEST | DUMP, self._sequence, body))
        interrupted = False
        while True:
            for got, flags, sequence, payload in messages(self._socket.recv(_RECEIVE_BYTES)):
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(flags & 0x10)  # NLM_F_DUMP_INTR
                if got == _NLMSG_DONE:
                    if interrupted:
                        raise Interrupted
                    return
                if got == _NLMSG_ERROR:
                    failure = failure_of(payload)
                    if failure is not None:
                        raise OSError(failure.errno, failure.reason)
                else:
                    yield Message(got, payload)


class Interrupted(Exception):
    """A list changed while it was read."""


class Overrun(Exception):
    """The kernel dropped notifications: what is known may be stale."""


class Notifications:
    """A socket that hears of changes; `wake` ends a `wait` from another thread."""

    def __init__(self, protocol: int, groups: Sequence[int]) -> None:
        """Join multicast groups, given as numbers."""
        self._socket = _open(protocol)
        for size in (33, socket.SO_RCVBUF):  # SO_RCVBUFFORCE, which goes beyond rmem_max
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, size, _QUEUE_BYTES)
                break
            except PermissionError:
                continue
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, 1, group)  # NETLINK_ADD_MEMBERSHIP
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def wait(self, timeout_s: float | None = None) -> list[Message]:
        """All that came in; empty when woken or out of time.

        Raises:
            Overrun: notifications were lost.
        """
        ready = dict(self._poll.poll(None if timeout_s is None else timeout_s * 1000))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._socket.fileno() not in ready:
            return []
        found: list[Message] = []
        try:
            # Each is a datagram of its own. The limit is for a flood: more than a queue holds.
            while len(found) < _QUEUE_MESSAGES:
                data = self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
                found += [Message(kind, body) for kind, _, _, body in messages(data)]
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self._drain()
                raise Overrun from error
            raise
        return found

    def _drain(self) -> None:
        """Empty the queue: until then the kernel drops what comes without telling again."""
        while True:
            try:
                self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def wake(self) -> None:
        """End the current or next `wait`."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Give the descriptors back."""
        self._socket.close()
        os.close(self._wake)


def _open(protocol: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    for option in (_CAP_ACK, _EXT_ACK, _STRICT_CHECK):
        opened.setsockopt(_SOL_NETLINK, option, 1)
    opened.bind((0, 0))
    return opened


def encode(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """A message with its header, padded."""
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, kind, flags, sequence, 0) + body + bytes(-length % 4)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split a datagram: (type, flags, sequence, body)."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, flags, sequence, data[at + _HEADER.size : at + length]
        at += length + (-length % 4)


def failure_of(body: bytes) -> Failure | None:
    """What an NLMSG_ERROR says; None = an acknowledgement."""
    code = -struct.unpack_from("=i", body)[0]
    if code == 0:
        return None
    # With CAP_ACK only the header of the request comes back, then the kernel's words.
    words = attributes(body[4 + _HEADER.size :]).get(1, b"")
    return Failure(code, words.rstrip(b"\0").decode(errors="replace") or os.strerror(code))
