"""Answer TCP and UDP requests with a JSON line that says who answered and whom it saw.

One thread and one selector for every socket. A request is a JSON line, for UDP a datagram:
`{"reply_bytes": 3000}`, padded with blanks to the size wanted; the answer is padded likewise.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

IP_PKTINFO = 8  # socket.IP_PKTINFO exists from Python 3.14 only
MAX_DATAGRAM_BYTES = 65_507
HTTP_HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
_PACKET_INFO_BYTES = 64
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def plain(address: str) -> str:
    """An address without the prefix of v4-mapped ones."""
    return address.removeprefix("::ffff:") if "." in address else address


class Server:
    """The listening sockets of one peer."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._sockets: dict[tuple[str, int], list[socket.socket]] = {}
        self._connections: dict[socket.socket, tuple[str, int]] = {}
        self._buffers: dict[socket.socket, bytes] = {}
        self._names: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def serve(self, name: str, protocol: str, port: int, address: str = "") -> None:
        """Answer on a port, of both families when no address is given.

        A port that is served already gets the new name.
        """
        key = (protocol, port)
        with self._lock:
            self._names[key] = name
            if key in self._sockets:
                return
            self._sockets[key] = [
                self._open(family, protocol, port, address)
                for family in _FAMILIES
                if not address or (":" in address) == (family == socket.AF_INET6)
            ]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="server", daemon=True)
                self._thread.start()

    def stop(self, protocol: str, port: int) -> None:
        """Stop answering on a port and break its connections: from now on it refuses."""
        key = (protocol, port)
        with self._lock:
            broken = [conn for conn, of in self._connections.items() if of == key]
            for sock in (*self._sockets.pop(key, ()), *broken):
                self._forget(sock)

    def _open(self, family: int, protocol: str, port: int, address: str) -> socket.socket:
        key = (protocol, port)
        kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.setblocking(False)
        handler: Callable[[socket.socket], None]
        if protocol == "TCP":
            sock.listen(1024)
            handler = lambda listener: self._accept(listener, key)  # noqa: E731
        else:
            _ask_for_packet_info(sock)
            handler = lambda one: self._datagram(one, key)  # noqa: E731
        self._selector.register(sock, selectors.EVENT_READ, handler)
        return sock

    def _run(self) -> None:
        while True:
            for event, _ in self._selector.select(timeout=0.5):
                with self._lock:
                    # Another thread may have stopped the port between select and here.
                    if event.fileobj.fileno() >= 0:  # type: ignore[union-attr]
                        event.data(event.fileobj)

    def _accept(self, listener: socket.socket, key: tuple[str, int]) -> None:
        try:
            conn, _ = listener.accept()
        except OSError:
            return
        conn.setblocking(False)
        self._connections[conn] = key
        self._buffers[conn] = b""
        self._selector.register(conn, selectors.EVENT_READ, self._stream)

    def _stream(self, conn: socket.socket) -> None:
        try:
            data = conn.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(conn)
            return
        *lines, self._buffers[conn] = (self._buffers[conn] + data).split(b"\n")
        try:
            for line in lines:
                answer = self._answer(self._connections[conn], line, conn.getpeername()[:2])
                is_http = line.startswith(b"GET ")
                conn.setblocking(True)
                conn.sendall((HTTP_HEAD if is_http else b"") + answer + b"\n")
                conn.setblocking(False)
                if is_http:  # for people with curl; the rest of their request is headers
                    self._forget(conn)
                    return
        except OSError:
            self._forget(conn)

    def _datagram(self, sock: socket.socket, key: tuple[str, int]) -> None:
        try:
            data, extra, _, client = sock.recvmsg(MAX_DATAGRAM_BYTES, _PACKET_INFO_BYTES)
            answer = self._answer(key, data, client[:2])
            # Answer from the address that was asked: a host may have several.
            sock.sendmsg([answer], _as_source(extra), 0, client)
        except OSError:
            return

    def _answer(self, key: tuple[str, int], request: bytes, client: tuple[str, int]) -> bytes:
        try:
            wanted: dict[str, Any] = json.loads(request)
        except ValueError:
            wanted = {}
        reply = {
            "server": self._names[key],
            "client": plain(client[0]),
            "client_port": client[1],
            "request_bytes": len(request),
        }
        return json.dumps(reply).encode().ljust(wanted.get("reply_bytes", 0))

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        self._connections.pop(sock, None)
        self._buffers.pop(sock, None)
        sock.close()


def _ask_for_packet_info(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def _as_source(extra: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Turn "this came for X" into "send this from X"; the device is left to the route."""
    for level, kind, data in extra:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            _, _, address = struct.unpack("=I4s4s", data)
            return [(level, kind, struct.pack("=I4s4s", 0, address, b"\0" * 4))]
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return [(level, kind, data[:16] + b"\0" * 4)]
    return []
