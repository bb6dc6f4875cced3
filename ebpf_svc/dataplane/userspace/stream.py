"""Relay TCP connections: accept, find a backend that answers, then carry both directions (U5).

Each direction holds at most one buffer: while the receiver does not take it, the sender is not read
(back-pressure), and the kernel's windows do the rest. The first bytes go through a buffer that all
share; a direction that moves much gets a pipe, through which pages pass without being copied.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import Backend

if TYPE_CHECKING:
    from ebpf_svc.dataplane.userspace.relay import Door, Own, Relay

CONNECT_S = (0.25, 0.5, 1.0, 2.0)
"""How long each attempt to reach a backend may take (U5)."""
BUFFER_BYTES = 1 << 16
PIPE_BYTES = 1 << 18
SPLICE_AFTER_BYTES = 1 << 18
"""A pipe costs two descriptors and as many calls: not worth it for a short answer."""
KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A peer that vanished is noticed after two minutes."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() send a reset."""
ORIGINAL_DST = 80
"""SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, which Python does not name."""
_AGAIN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)

log = get_logger(__name__)


class Stream:
    """One client's connection and the one to its backend."""

    def __init__(
        self, relay: Relay, door: Door, client: socket.socket, address: tuple[Any, ...]
    ) -> None:
        self.relay, self.door, self.client = relay, door, client
        self.address: str
        self.client_port: int
        self.address, self.client_port = address[:2]
        self.loop = relay.loop
        self.backend: Backend | None = None
        self.upstream: socket.socket | None = None
        self.used = self.loop.time()
        self.pumps: tuple[Pump, ...] = ()
        self._own: Own | None = None
        self._failed: list[Backend] = []
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False

    @property
    def state(self) -> str:
        if not self.pumps:
            return "connecting"
        return "closing" if any(pump.done for pump in self.pumps) else "established"

    def connect(self) -> None:
        """Try the next backend."""
        attempt = len(self._failed)
        choice = self.door.port.choice
        backend = None
        if attempt < len(CONNECT_S):
            local = self.door.is_local(self.address)
            backend = choice.pick(self.address, local=local, avoid=self._failed)
        if backend is None:
            self.relay.counts.failed += 1
            log.debug("relay.no-backend", service=str(self.door.plan.key), count=attempt)
            self.abort()
            return
        if attempt:
            self.relay.counts.retries += 1
        self.backend = backend
        family = socket.AF_INET6 if ":" in backend.address else socket.AF_INET
        try:
            self.upstream = upstream = socket.socket(family, socket.SOCK_STREAM)
            _tune(upstream)
            code = upstream.connect_ex((backend.address, backend.port))
        except OSError as error:
            code = error.errno or errno.EIO
        if code in (0, errno.EINPROGRESS):
            assert self.upstream is not None
            # Known before its first packet can come back to us through a frontend.
            self._own = self.relay.claim(self.upstream, (backend.address, backend.port))
            self._timer = self.loop.call_later(CONNECT_S[attempt], self._refused, errno.ETIMEDOUT)
            self.loop.add_writer(self.upstream.fileno(), self._connected)
        else:
            # Not from here: four refusals in a row would recurse, and nobody else had a turn.
            self.loop.call_soon(self._refused, code)

    def _connected(self) -> None:
        assert self.upstream is not None
        code = self.upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._refused(code)
            return
        self.loop.remove_writer(self.upstream.fileno())
        self._stop_timer()
        self.door.port.connections += 1
        self.pumps = (
            Pump(self, self.client, self.upstream),
            Pump(self, self.upstream, self.client),
        )
        for pump in self.pumps:
            pump.start()

    def _refused(self, code: int) -> None:
        """The backend did not answer: another one, or the end."""
        if self.closed:
            return
        assert self.backend is not None
        log.debug("relay.refused", backend=str(self.backend), error=errno.errorcode.get(code, ""))
        self._stop_timer()
        self._drop_upstream()
        self.door.port.choice.failed(self.address)
        self._failed.append(self.backend)
        self.connect()

    def pump_done(self) -> None:
        """A direction has ended in order; after both the connection has."""
        if all(pump.done for pump in self.pumps):
            self.close()

    def abort(self) -> None:
        """End both connections with a reset: something was lost, and both ends must know."""
        for each in (self.client, self.upstream):
            if each is not None:
                with suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._stop_timer()
        for pump in self.pumps:
            pump.close()
        self.loop.remove_reader(self.client.fileno())
        self.loop.remove_writer(self.client.fileno())
        self.client.close()
        self._drop_upstream()
        self.relay.ended(self)

    def _drop_upstream(self) -> None:
        if self.upstream is not None:
            self.loop.remove_reader(self.upstream.fileno())
            self.loop.remove_writer(self.upstream.fileno())
            self.upstream.close()
            self.upstream = None
        if self._own is not None:
            self.relay.disclaim(self._own)
            self._own = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Pump:
    """One direction of a connection."""

    def __init__(self, stream: Stream, source: socket.socket, sink: socket.socket) -> None:
        self._stream, self._source, self._sink = stream, source, sink
        self._from, self._to = source.fileno(), sink.fileno()
        self._loop, self._relay = stream.loop, stream.relay
        self._port = stream.door.port
        self._held = b""
        """What was read and not yet taken, while there is no pipe."""
        self._in_pipe_bytes = 0
        self._pipe: tuple[int, int] | None = None
        self._splices = True
        self._moved_bytes = 0
        self._ended = self._waits = False
        self.done = False

    def start(self) -> None:
        self._loop.add_reader(self._from, self._readable)

    def close(self) -> None:
        if self._pipe is not None:
            for fd in self._pipe:
                os.close(fd)
            self._relay.fds -= 2
            self._pipe = None

    def _readable(self) -> None:
        try:
            count = self._read()
        except OSError as error:
            if error.errno not in _AGAIN:
                self._stream.abort()
            return
        if count:
            self._moved_bytes += count
            self._port.bytes += count
            self._stream.used = self._loop.time()
        else:
            self._ended = True
        self._flush()

    def _read(self) -> int:
        """Take what there is, at most one buffer: others want their turn. 0 = the end."""
        if self._pipe is None and self._splices and self._moved_bytes >= SPLICE_AFTER_BYTES:
            self._pipe = self._relay.pipe()
            self._splices = self._pipe is not None
        if self._pipe is not None:
            try:
                flags = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
                count = os.splice(self._from, self._pipe[1], PIPE_BYTES, flags=flags)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # This kernel does not splice this kind of socket.
                self._splices = False
                self.close()
            else:
                self._in_pipe_bytes += count
                return count
        buffer = self._relay.buffer
        count = self._source.recv_into(buffer)
        view = buffer[:count]
        try:
            # Mostly it is taken at once, and nothing needs to be kept.
            sent = self._sink.send(view) if count else 0
        except BlockingIOError:
            sent = 0
        self._held = bytes(view[sent:])
        return count

    def _flush(self) -> None:
        """Give on what is held; wait for room, or for more, as it takes."""
        try:
            while self._in_pipe_bytes:
                assert self._pipe is not None
                flags = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
                sent = os.splice(self._pipe[0], self._to, self._in_pipe_bytes, flags=flags)
                self._in_pipe_bytes -= sent
            while self._held:
                self._held = self._held[self._sink.send(self._held) :]
        except OSError as error:
            if error.errno not in _AGAIN:
                self._stream.abort()
                return
        if self._held or self._in_pipe_bytes:
            if not self._waits:
                self._waits = True
                self._loop.remove_reader(self._from)
                self._loop.add_writer(self._to, self._flush)
            return
        if self._waits:
            self._waits = False
            self._loop.remove_writer(self._to)
            if not self._ended:
                self._loop.add_reader(self._from, self._readable)
        if self._ended and not self.done:
            self._finish()

    def _finish(self) -> None:
        """Pass the end on; the other direction may go on for as long as it wants."""
        self.done = True
        self._loop.remove_reader(self._from)
        self.close()
        try:
            self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._stream.abort()
            return
        self._stream.pump_done()


def accepted(
    relay: Relay, door: Door, client: socket.socket, address: tuple[Any, ...]
) -> Stream | None:
    """Begin to relay a connection; None when its client has gone already."""
    try:
        _tune(client)
    except OSError:
        client.close()
        return None
    stream = Stream(relay, door, client, address)
    stream.connect()
    return stream


def called(client: socket.socket) -> tuple[str, int]:
    """The address and port a client called, before netfilter translated; `` and 0 when unknown."""
    try:
        if client.family == socket.AF_INET:
            raw = client.getsockopt(socket.IPPROTO_IP, ORIGINAL_DST, 16)
            port, packed = struct.unpack_from("!2xH4s", raw)
        else:
            raw = client.getsockopt(socket.IPPROTO_IPV6, ORIGINAL_DST, 28)
            port, packed = struct.unpack_from("!2xH4x16s", raw)
        return socket.inet_ntop(client.family, packed), port
    except OSError:  # nobody translated
        with suppress(OSError):
            address, port = client.getsockname()[:2]
            return address, port
    return "", 0


def refuse(client: socket.socket) -> None:
    """End a connection with a reset."""
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()


def make_pipe() -> tuple[int, int]:
    """A pipe that never blocks, as large as we may have it; raises OSError."""
    ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with suppress(OSError):  # beyond the user's share of pipe pages
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
