"""Make requests and say precisely how each ended."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections import defaultdict
from contextlib import suppress
from typing import Any

from ebpf_svc.testbed.peer.server import MAX_DATAGRAM_BYTES, plain

SHARES = 8
"""Hosts whose packets leave with one address, as a node's and its pods', have ports apart."""
SPENT_PORTS = 10_000 // SHARES
"""So many ports are not used again, then all may be: for TCP a kernel offers 14,000."""
SPENT: defaultdict[tuple[bool, str], set[int]] = defaultdict(set)
"""(whether IPv6, protocol) -> the ports of sockets that had to have one of their own."""
_UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL}


class Channel:
    """A socket towards one address: a TCP connection, or a UDP socket that is connected or not.

    Args:
        target: keys address, port, protocol, timeout_s, source_port (0 = any), connected (UDP),
            mapped (an IPv6 socket to the v4-mapped address), own_port, request_bytes, reply_bytes.
    """

    share = 0
    """Of the ports, this host's."""

    def __init__(self, target: dict[str, Any]) -> None:
        self._target = target
        mapped = bool(target.get("mapped"))
        self._address = (
            f"::ffff:{target['address']}" if mapped else target["address"],
            target["port"],
        )
        self._family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        self._stream = target["protocol"] == "TCP"
        self._connected = self._stream or bool(target.get("connected", True))
        self._peer: tuple[Any, ...] = ()
        self._buffer = b""
        wants_own = target.get("own_port") and not target.get("source_port")
        self._socket = self._make_unlike_others() if wants_own else self._make()
        try:
            self._open()
        except BaseException:
            self._socket.close()
            raise

    def _make(self) -> socket.socket:
        return socket.socket(
            self._family, socket.SOCK_STREAM if self._stream else socket.SOCK_DGRAM
        )

    def _make_unlike_others(self) -> socket.socket:
        """A socket on a port that no other had which was made here or has on a host of another
        share, of those the kernel offers: for TCP odd ones alone.
        """
        spent = SPENT[":" in self._target["address"], self._target["protocol"]]
        if len(spent) > SPENT_PORTS:
            spent.clear()
        while True:
            made = self._make()
            made.bind(("", 0))
            port = made.getsockname()[1]
            if port // 2 % SHARES == self.share and port not in spent:
                spent.add(port)
                return made
            made.close()

    def _open(self) -> None:
        self._socket.settimeout(self._target.get("timeout_s", 1.0))
        if self._target.get("source_port"):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(("", self._target["source_port"]))
        if self._connected:
            self._socket.connect(self._address)

    def close(self) -> None:
        if self._stream and self._target.get("source_port"):
            # Somebody may want the port for the same server at once. The kernel gives it while the
            # connection is in TIME_WAIT, but not as long as the other end has not closed, too.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
                while self._socket.recv(65_536):
                    pass
        self._socket.close()

    def exchange(self) -> dict[str, Any]:
        """One request and its answer; raises OSError."""
        wanted = {"reply_bytes": self._target.get("reply_bytes", 0)}
        request = json.dumps(wanted).encode().ljust(self._target.get("request_bytes", 0))
        if self._stream:
            self._socket.sendall(request + b"\n")
            reply = self._read_line()
        elif self._connected:
            self._socket.send(request)
            reply = self._socket.recv(MAX_DATAGRAM_BYTES)
        else:
            self._socket.sendto(request, self._address)
            reply, self._peer = self._socket.recvfrom(MAX_DATAGRAM_BYTES)
        if self._connected:
            self._peer = self._socket.getpeername()
        answer: dict[str, Any] = json.loads(reply)
        return {
            **answer,
            "peer": plain(self._peer[0]),
            "peer_port": self._peer[1],
            "reply_bytes": len(reply),
        }

    def _read_line(self) -> bytes:
        while b"\n" not in self._buffer:
            data = self._socket.recv(65_536)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "closed before the answer")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def ask(target: dict[str, Any]) -> dict[str, Any]:
    """One request on a socket of its own; never raises for what the network does."""
    begun = time.perf_counter()
    try:
        channel = Channel(target)
        try:
            answer = channel.exchange()
        finally:
            channel.close()
    except OSError as error:
        return {**failure(error), "latency_ms": _ms_since(begun)}
    return {**answer, "outcome": "ok", "latency_ms": _ms_since(begun)}


def ping(channel: Channel) -> dict[str, Any]:
    """One request on a socket that is already open."""
    begun = time.perf_counter()
    try:
        answer = channel.exchange()
    except OSError as error:
        return {**failure(error), "latency_ms": _ms_since(begun)}
    return {**answer, "outcome": "ok", "latency_ms": _ms_since(begun)}


def failure(error: OSError) -> dict[str, Any]:
    """An error of a socket in the words of `traffic.Outcome`."""
    if isinstance(error, ConnectionRefusedError):
        outcome = "refused"
    elif isinstance(error, TimeoutError):
        outcome = "timeout"
    elif error.errno in _UNREACHABLE:
        outcome = "unreachable"
    else:
        outcome = "error"
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return {"outcome": outcome, "detail": name}


def _ms_since(begun: float) -> float:
    return round((time.perf_counter() - begun) * 1e3, 3)
