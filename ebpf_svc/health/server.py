"""Serve HTTP on many addresses with one thread, whatever clients do.

One `HttpServer` is one thread and any number of listening sockets, which come and go while it runs:
`serve` says what is wanted, the thread makes it so, and goes on trying where an address cannot be
had yet (HS8). Nobody who calls `serve` waits for the network. A client that is slow, silent or one
of many costs a descriptor for a few seconds and no other client anything.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus

from ebpf_svc.health.http import (
    BadRequest,
    Handler,
    Response,
    parse,
    render,
    text_response,
)
from ebpf_svc.log import get_logger

RETRY_S = 5.0
"""How often an address that cannot be had is tried again, as kube-proxy does (HS8)."""
READ_S = 5.0
"""How long a client may take to send its request."""
WRITE_S = 30.0
"""How long a client may take to read the answer."""
LINGER_S = 1.0
"""How long to wait for a client that was answered to hang up: closing first would reset the
connection if it sent more than was read, and lose the answer."""
CONNECTIONS_MAX = 256
"""Beyond, the oldest connection goes for the new one."""
ANSWERS_MAX_BYTES = 16 << 20
"""Beyond, of the clients that do not read the oldest goes: a page of metrics may be a megabyte."""
BACKLOG = 128

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Site:
    """One address and port to answer at; two are the same if their name and address are."""

    name: str
    """Whose it is, so that two that want the same address are told apart."""
    address: str
    port: int
    handler: Handler = field(compare=False)
    on_failure: Callable[[Site, OSError], None] | None = field(default=None, compare=False)
    """Called by the server's thread when the address cannot be had: once, until it can or the
    reason changes."""

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


class HttpServer:
    """A thread that answers at every site it is told to; `start` and `stop` it once."""

    def __init__(
        self,
        name: str,
        *,
        read_s: float = READ_S,
        write_s: float = WRITE_S,
        retry_s: float = RETRY_S,
        connections_max: int = CONNECTIONS_MAX,
        answers_max_bytes: int = ANSWERS_MAX_BYTES,
    ) -> None:
        self._read_s, self._write_s, self._retry_s = read_s, write_s, retry_s
        self._connections_max, self._answers_max_bytes = connections_max, answers_max_bytes
        self._lock = threading.Lock()
        self._wanted: dict[str, dict[Site, Site]] = {}
        self._is_stale = self._is_closing = False
        self._sites: dict[Site, socket.socket] = {}
        self._failing: dict[Site, str] = {}
        self._retry_at = 0.0
        self._connections: dict[int, _Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Close everything; connections are cut. Returns once the thread has ended."""
        self._is_closing = True
        self._rouse()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            if self._wake >= 0:
                self._close()

    def serve(self, owner: str, sites: Collection[Site]) -> None:
        """Replace what an owner serves; those that failed before are tried again at once."""
        with self._lock:
            self._wanted[owner] = {site: site for site in sites}
            self._is_stale = True
        self._rouse()

    def retry(self) -> None:
        """Try addresses that failed again now rather than when the pause is over."""
        if self._failing:
            self._retry_at = 0.0
            self._rouse()

    def _rouse(self) -> None:
        """Make the thread look at what it was told."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closing:
            for key, _ in self._selector.select(self._pause_s()):
                key.data()
            now = time.monotonic()
            if self._is_stale or (self._failing and now >= self._retry_at):
                self._reconcile()
            for connection in [each for each in self._connections.values() if each.end_at <= now]:
                self._drop(connection)

    def _pause_s(self) -> float | None:
        """Until something is due; None = nothing is."""
        due = [connection.end_at for connection in self._connections.values()]
        if self._failing:
            due.append(self._retry_at)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _reconcile(self) -> None:
        with self._lock:
            self._is_stale = False
            wanted = {site: now for sites in self._wanted.values() for site, now in sites.items()}
        # Close first: a port may move from one owner to another.
        for site in [site for site in self._sites if site not in wanted]:
            listener = self._sites.pop(site)
            self._selector.unregister(listener)
            listener.close()
        self._failing = {site: why for site, why in self._failing.items() if site in wanted}
        for site in wanted:
            if site not in self._sites:
                self._open(site)
        self._retry_at = time.monotonic() + self._retry_s

    def _open(self, site: Site) -> None:
        try:
            listener = _listen(site.address, site.port)
        except OSError as error:
            why = error.strerror or str(error)
            if self._failing.get(site) != why:
                self._failing[site] = why
                if site.on_failure is not None:
                    site.on_failure(site, error)
            return
        if self._failing.pop(site, None) is not None:
            log.info("http.listening", source=site.name, address=str(site))
        self._sites[site] = listener
        self._selector.register(
            listener, selectors.EVENT_READ, lambda: self._accept(listener, site.handler)
        )

    def _accept(self, listener: socket.socket, handler: Handler) -> None:
        for _ in range(BACKLOG):
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and not self._drop_oldest():
                    # Whoever holds the descriptors is not here: let it go on.
                    time.sleep(0.05)
                return
            if len(self._connections) >= self._connections_max:
                self._drop_oldest()
            accepted.setblocking(False)
            connection = _Connection(accepted, handler, time.monotonic() + self._read_s)
            self._connections[accepted.fileno()] = connection
            self._selector.register(
                accepted, selectors.EVENT_READ, lambda each=connection: self._advance(each)
            )

    def _advance(self, connection: _Connection) -> None:
        before = connection.phase
        try:
            connection.advance()
        except BlockingIOError:
            pass
        except OSError:  # it hung up, or was cut off
            connection.phase = _Phase.OVER
        if connection.phase is before:
            return
        if connection.phase is _Phase.OVER:
            self._drop(connection)
            return
        is_writing = connection.phase is _Phase.WRITING
        connection.end_at = time.monotonic() + (self._write_s if is_writing else LINGER_S)
        events = selectors.EVENT_WRITE if is_writing else selectors.EVENT_READ
        self._selector.modify(
            connection.socket, events, self._selector.get_key(connection.socket).data
        )
        if is_writing:
            self._bound_answers()

    def _bound_answers(self) -> None:
        """Keep what clients have not read yet from filling the memory."""
        writing = [each for each in self._connections.values() if each.unread_bytes]
        excess = sum(each.unread_bytes for each in writing) - self._answers_max_bytes
        for each in writing[:-1]:
            if excess <= 0:
                return
            excess -= each.unread_bytes
            self._drop(each)

    def _drop_oldest(self) -> bool:
        """Make room for a connection; False when there is none to drop."""
        # Whoever waits for nothing but its client goes before one that is being answered.
        ranked = sorted(self._connections.values(), key=lambda each: each.phase is _Phase.WRITING)
        if not ranked:
            return False
        self._drop(ranked[0])
        return True

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.socket.fileno(), None) is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _close(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        for listener in self._sites.values():
            listener.close()
        self._sites.clear()
        self._selector.close()
        os.close(self._wake)
        self._wake = -1


class _Phase(Enum):
    READING = auto()
    WRITING = auto()
    LINGERING = auto()
    OVER = auto()


class _Connection:
    """One client, from its first byte to its last."""

    def __init__(self, accepted: socket.socket, handler: Handler, end_at: float) -> None:
        self.socket, self._handler = accepted, handler
        self.phase = _Phase.READING
        self.end_at = end_at
        """Monotonic time at which patience ends."""
        self._received = bytearray()
        self._left = memoryview(b"")

    @property
    def unread_bytes(self) -> int:
        """What is left of the answer."""
        return len(self._left)

    def advance(self) -> None:
        """Go as far as the socket lets us; raises OSError, BlockingIOError among them."""
        if self.phase is _Phase.READING:
            self._read()
        if self.phase is _Phase.WRITING:
            self._write()
        if self.phase is _Phase.LINGERING and not self.socket.recv(65536):
            self.phase = _Phase.OVER

    def _read(self) -> None:
        data = self.socket.recv(4096)
        if not data:
            self.phase = _Phase.OVER
            return
        self._received += data
        try:
            request = parse(self._received)
        except BadRequest as bad:
            self._answer(text_response(f"{bad}\n", bad.status), "GET")
            return
        if request is None:
            return
        try:
            response = self._handler(request)
        except Exception:
            # A bug in one page must not take the health checks along.
            log.error("http.failed", path=request.path, error=traceback.format_exc())
            response = text_response("internal error\n", HTTPStatus.INTERNAL_SERVER_ERROR)
        self._answer(response, request.method)

    def _answer(self, response: Response, method: str) -> None:
        self._left = memoryview(render(response, method))
        self.phase = _Phase.WRITING

    def _write(self) -> None:
        while self._left:
            self._left = self._left[self.socket.send(self._left) :]
        self.socket.shutdown(socket.SHUT_WR)
        self.phase = _Phase.LINGERING


def _listen(address: str, port: int) -> socket.socket:
    """Open a listening socket of the address's family alone; raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # A restart must not wait for connections of the agent before to fade.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
