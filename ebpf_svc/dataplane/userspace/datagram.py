"""Relay UDP: a socket towards a backend for each client, kept while datagrams come (U6).

Files and ports are finite. A client that comes when there is none left gets those of the client
that has been silent longest.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any

from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import Backend

if TYPE_CHECKING:
    from ebpf_svc.dataplane.userspace.relay import Door, Relay

AT_ONCE = 64
"""Datagrams taken from one socket before others get their turn."""
ANSWERS_S = 1.0
"""How long a backend that is gone may answer what it was asked before."""
AVOIDED_S = 1.0
"""How long new flows avoid a backend that has refused one."""
DATAGRAM_BYTES = 1 << 16
"""More than the largest datagram; kube-proxy cut them at 4096 (U6)."""

DATAGRAM = ("", 0)
"""Stands for the place a datagram socket of ours goes to."""

log = get_logger(__name__)


class Flow:
    """One client's datagrams to one door."""

    def __init__(self, clients: Clients, client: tuple[Any, ...], backend: Backend) -> None:
        """Open the socket; raises OSError."""
        self._clients, self.client, self.backend = clients, client, backend
        family = socket.AF_INET6 if ":" in backend.address else socket.AF_INET
        self.upstream = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self.upstream.setblocking(False)
            self.upstream.connect((backend.address, backend.port))
        except OSError:
            self.upstream.close()
            raise
        relay = clients.relay
        relay.datagrams[self] = None
        self.touch()
        # Of a datagram nobody tells where it was sent to; but no two sockets share a port here.
        self._own = relay.claim(self.upstream, DATAGRAM)
        relay.loop.add_reader(self.upstream.fileno(), self._readable)

    def touch(self) -> None:
        """A datagram passes: of all flows this one is used last."""
        relay = self._clients.relay
        self.used = relay.loop.time()
        if self in relay.datagrams:
            relay.datagrams.move_to_end(self)

    def end(self) -> None:
        """Forget the client."""
        self._clients.end(self)

    def _readable(self) -> None:
        """Answers of the backend."""
        clients = self._clients
        buffer, port = clients.relay.buffer, clients.door.port
        for _ in range(AT_ONCE):
            try:
                count = self.upstream.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # it refuses: the client's next datagram goes elsewhere
                clients.refused(self)
                return
            self.touch()
            port.packets += 1
            port.bytes += count
            clients.answer(buffer[:count], self.client)

    def close(self) -> None:
        relay = self._clients.relay
        relay.datagrams.pop(self, None)
        relay.loop.remove_reader(self.upstream.fileno())
        self.upstream.close()
        relay.disclaim(self._own)


class Clients:
    """The clients of one door."""

    def __init__(self, relay: Relay, door: Door, listener: socket.socket) -> None:
        self.relay, self.door, self._listener = relay, door, listener
        self.flows: dict[tuple[Any, ...], Flow] = {}
        self._leaving: set[Flow] = set()
        """Their backend is gone; what it was asked before it may still answer."""
        self._refusing: dict[Backend, float] = {}
        """Backends that refused, and when."""
        relay.loop.add_reader(listener.fileno(), self._readable)

    def _readable(self) -> None:
        buffer = self.relay.buffer
        for _ in range(AT_ONCE):
            try:
                count, client = self._listener.recvfrom_into(buffer)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # What an earlier answer met on its way; the socket itself is fine.
                log.debug("relay.listener", error=errno.errorcode.get(error.errno or 0, ""))
                continue
            if self.relay.is_own((*client[:2], *DATAGRAM)):
                self.relay.counts.loops += 1
                continue
            self.forward(buffer[:count], client)

    def forward(self, data: memoryview, client: tuple[Any, ...]) -> None:
        """Send a client's datagram to its backend, or to another when that one refuses."""
        for _ in range(2):
            flow = self.flows.get(client) or self._open(client)
            if flow is None:
                return
            try:
                flow.upstream.send(data)
            except (BlockingIOError, InterruptedError):
                return  # no room: datagrams get lost, it is their nature
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    return
                # The refusal of an earlier one, told now.
                self.refused(flow)
                self.relay.counts.retries += 1
                continue
            flow.touch()
            self.door.port.packets += 1
            self.door.port.bytes += len(data)
            return

    def answer(self, data: memoryview, client: tuple[Any, ...]) -> None:
        """Send a backend's answer to its client, from the door it asked."""
        try:
            self._listener.sendto(data, client)
        except OSError as error:
            log.debug("relay.answer", error=errno.errorcode.get(error.errno or 0, ""))

    def _open(self, client: tuple[Any, ...]) -> Flow | None:
        relay, door = self.relay, self.door
        while not relay.has_room():
            if not relay.end_longest_silent():
                return None
        address = client[0]
        since = relay.loop.time() - AVOIDED_S
        self._refusing = {each: at for each, at in self._refusing.items() if at > since}
        local = door.is_local(address)
        backend = door.port.choice.pick(address, local=local, avoid=self._refusing)
        if backend is None:
            relay.counts.failed += 1
            return None
        flow = self._flow(client, backend)
        if flow is None:
            return None
        relay.fds += 1
        door.port.connections += 1
        self.flows[client] = flow
        return flow

    def _flow(self, client: tuple[Any, ...], backend: Backend) -> Flow | None:
        while True:
            try:
                return Flow(self, client, backend)
            except OSError as error:
                # The kernel's word for "every local port is taken" (udp_lib_get_port).
                if error.errno == errno.EAGAIN and self.relay.end_longest_silent():
                    continue
                self.relay.counts.failed += 1
                log.debug("relay.refused", backend=str(backend), error=str(error))
                return None

    def refused(self, flow: Flow) -> None:
        """A backend refuses: its client chooses anew, and not this one if there is another."""
        self._refusing[flow.backend] = self.relay.loop.time()
        self.door.port.choice.failed(flow.client[0])
        self.end(flow)

    def end(self, flow: Flow) -> None:
        """Forget a client."""
        if self.flows.get(flow.client) is flow:
            del self.flows[flow.client]
            self.relay.fds -= 1
            flow.close()

    def retain(self, backends: frozenset[tuple[str, int]]) -> None:
        """End the flows to backends that are gone, behind their answers; draining stay (C5, C7)."""
        for flow in list(self.flows.values()):
            if (flow.backend.address, flow.backend.port) not in backends:
                del self.flows[flow.client], self.relay.datagrams[flow]
                self._leaving.add(flow)
                self.relay.loop.call_later(ANSWERS_S, self._left, flow)

    def _left(self, flow: Flow) -> None:
        if flow in self._leaving:
            self._leaving.remove(flow)
            self.relay.fds -= 1
            flow.close()

    def close(self) -> None:
        """Stop listening and forget every client."""
        self.relay.loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for flow in list(self.flows.values()):
            self.end(flow)
        for flow in list(self._leaving):
            self._left(flow)
