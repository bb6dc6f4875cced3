"""The relay: a thread with an event loop, the doors it listens at, and all that passes them.

All state belongs to that thread. Others hand it work through `call`, so nothing here is locked. The
thread lives in the network namespace of the one that starts it.
"""

from __future__ import annotations

import asyncio
import errno
import random
import resource
import socket
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ebpf_svc.config.userspace import UserspaceSettings
from ebpf_svc.dataplane.userspace import stream
from ebpf_svc.dataplane.userspace.addresses import NodeAddresses
from ebpf_svc.dataplane.userspace.affinity import Affinity
from ebpf_svc.dataplane.userspace.choice import Choice
from ebpf_svc.dataplane.userspace.datagram import DATAGRAM_BYTES, Clients, Flow
from ebpf_svc.dataplane.userspace.doors import DoorId, DoorPlan, listen
from ebpf_svc.dataplane.userspace.stream import Stream, called
from ebpf_svc.errors import DataplaneError
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import PlanKey, ServicePlan
from ebpf_svc.model.net import Protocol

FDS = 64_000
"""Open files wanted (U1)."""
SPARE_FDS = 256
"""Kept free for the rest of the agent: its API connections, its files."""
PIPES_UNTIL = 0.75
"""Above this share of the files in use nobody gets a pipe any more."""
ACCEPTS_AT_ONCE = 64
PAUSE_S = 0.1
"""How long a door stays shut when no file can be opened."""
CALL_S = 30.0
SWEEP_S = 60.0
ADDRESSES_S = 10.0
SWITCH_S = 0.0002
"""How long another thread of the agent may go on computing while the relay wants to.

The relay waits anew after each call into the kernel. With Python's 5 ms a connection took 11 ms
beside a thread that plans, instead of half a millisecond.
"""

Own = tuple[str, int, str, int]
"""A socket: its address and port, and those it goes to."""
Result = TypeVar("Result")
log = get_logger(__name__)


@dataclass(slots=True)
class Counts:
    """What happened since the start."""

    retries: int = 0
    """Another backend was tried because one did not answer (U5)."""
    failed: int = 0
    """Flows that found no backend that answers."""
    limited: int = 0
    """Times that a limit made a client wait, or ended the datagrams of the longest silent one."""
    loops: int = 0
    """Flows that had come back to the relay: an endpoint that is a frontend of this node."""


@dataclass(eq=False, slots=True)
class Port:
    """A service port that is served."""

    plan: ServicePlan
    choice: Choice
    connections: int = 0
    packets: int = 0
    """Datagrams; of streams nobody counts packets here."""
    bytes: int = 0
    doors: dict[DoorId, Door] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Door:
    """A socket that listens for one service port."""

    plan: DoorPlan
    port: Port
    listener: socket.socket
    number: int
    """The port it listens at."""
    clients: Clients | None = None
    pause: asyncio.TimerHandle | None = None

    def is_local(self, address: str) -> bool:
        """Whether that client gets the Local list."""
        return self.plan.is_local(address)


class Relay:
    """Use: `start`, then `call(relay.METHOD, …)` for all methods below it, then `stop`."""

    def __init__(self, settings: UserspaceSettings, affinity: Affinity) -> None:
        self._settings, self._affinity = settings, affinity
        self._rng = random.Random()
        self.buffer = memoryview(bytearray(DATAGRAM_BYTES))
        self.counts = Counts()
        self.fds = 0
        """Files that flows have open; doors are counted apart."""
        self.ports: dict[PlanKey, Port] = {}
        self.doors: dict[DoorId, Door] = {}
        self.datagrams: OrderedDict[Flow, None] = OrderedDict()
        """Every client's datagrams, the longest silent first."""
        self._streams: set[Stream] = set()
        self._own: set[Own] = set()
        self._tasks: list[asyncio.Task[Any]] = []
        self._addresses = NodeAddresses()
        self._limit, self._switch_s = 0, 0.0
        self.loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._limit = raise_limit() - SPARE_FDS
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_report)
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End everything: without the relay no connection goes on."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self.loop.call_soon_threadsafe(self.loop.stop)
            thread.join()
            sys.setswitchinterval(self._switch_s)
            self._affinity.close()

    def call(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do work in the relay's thread and wait for it; raises what it raises."""
        if self._thread is None:
            raise DataplaneError("the relay does not run")
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(work(*arguments))
            except BaseException as error:  # handed to the caller, whose thread this is not
                future.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        try:
            return future.result(CALL_S)
        except TimeoutError as error:
            raise DataplaneError("the relay does not answer") from error

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._expire()
        self._forget_addresses()
        # Not at once: which services there are is not known yet.
        self.loop.call_later(SWEEP_S, self._sweep)
        try:
            self.loop.run_forever()
        finally:
            for each in list(self._streams):
                each.abort()
            self.retire()
            self.loop.close()

    # -- what is served; in the relay's thread -----------------------------------------------------

    def take(self, plan: ServicePlan) -> Port:
        """Serve a plan: new flows go to its backends, datagrams to those that left end (C7)."""
        port = self.ports.get(plan.key)
        if port is None:
            choice = Choice(plan.key, self._affinity, self._rng, self._addresses.has)
            port = Port(plan, choice)
            self.ports[plan.key] = port
        port.plan = plan
        port.choice.take(plan)
        return port

    def retain(self, plan: ServicePlan) -> None:
        """End the datagram flows to backends a plan no longer has."""
        backends = frozenset((each.address, each.port) for each in plan.backends)
        for door in self.ports[plan.key].doors.values():
            if door.clients is not None:
                door.clients.retain(backends)

    def open_door(self, wanted: DoorPlan) -> int:
        """Listen, or change what a door that is open does; returns its port. Raises OSError."""
        door = self.doors.get(wanted.id)
        port = self.ports[wanted.key]
        if door is not None:
            door.plan, door.port = wanted, port
            wanted.guard(door.listener)
            return door.number
        listener = listen(wanted, self._settings.port_range)
        door = Door(wanted, port, listener, listener.getsockname()[1])
        if wanted.protocol is Protocol.UDP:
            door.clients = Clients(self, door, listener)
        else:
            self._listen(door)
        self.doors[wanted.id] = port.doors[wanted.id] = door
        return door.number

    def close_door(self, door_id: DoorId) -> None:
        """Stop listening; datagram flows end, connections go on."""
        door = self.doors.pop(door_id, None)
        if door is None:
            return
        door.port.doors.pop(door_id, None)
        if door.pause is not None:
            door.pause.cancel()
        if door.clients is not None:
            door.clients.close()
        else:
            self.loop.remove_reader(door.listener.fileno())
            door.listener.close()

    def forget(self, key: PlanKey) -> None:
        """A service port is gone; its doors must be closed."""
        self.ports.pop(key, None)

    def streams(self) -> Iterable[Stream]:
        return self._streams

    def numbers(self) -> Mapping[DoorId, int]:
        """The port each door listens at."""
        return {door_id: door.number for door_id, door in self.doors.items()}

    def stream_count(self) -> int:
        """Connections that depend on the relay."""
        return len(self._streams)

    def retire(self, *, datagrams: bool = True) -> int:
        """Close every door, or only those of streams; returns how many connections are left."""
        for door_id, door in list(self.doors.items()):
            if datagrams or door.clients is None:
                self.close_door(door_id)
        return self.stream_count()

    def flows_by_port(self) -> Counter[PlanKey]:
        """How many flows each service port has, those that are gone included."""
        found = Counter(stream.door.plan.key for stream in self._streams)
        for door in self.doors.values():
            if door.clients is not None and door.clients.flows:
                found[door.plan.key] += len(door.clients.flows)
        return found

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold on to a task and its result for as long as the relay lives."""
        self._tasks.append(task)

    # -- for streams and datagrams -----------------------------------------------------------------

    def claim(self, upstream: socket.socket, target: tuple[str, int]) -> Own | None:
        """Remember a socket of ours by its ends, to know it should it come in by a door."""
        try:
            own: Own = (*upstream.getsockname()[:2], *target)
        except OSError:
            return None
        self._own.add(own)
        return own

    def disclaim(self, own: Own | None) -> None:
        """Forget a socket that is closed."""
        if own is not None:
            self._own.discard(own)

    def is_own(self, own: Own) -> bool:
        """Whether a client is the relay: an endpoint leads back here, for ever if we let it.

        Its own end is not enough: two connections to different places may share a port.
        """
        return own in self._own

    def has_room(self) -> bool:
        """Whether one more flow may be opened."""
        return self.fds + len(self.doors) + 2 <= self._limit

    def end_longest_silent(self) -> bool:
        """Make room: end the flow of datagrams whose last one is longest ago; False = none is."""
        self.counts.limited += 1
        flow = next(iter(self.datagrams), None)
        if flow is not None:
            flow.end()
        return flow is not None

    def pipe(self) -> tuple[int, int] | None:
        """A pipe, unless files are getting scarce."""
        if self.fds + len(self.doors) > self._limit * PIPES_UNTIL:
            return None
        try:
            pipe = stream.make_pipe()
        except OSError:
            return None
        self.fds += 2
        return pipe

    def ended(self, ended: Stream) -> None:
        """A stream is closed."""
        self._streams.discard(ended)
        self.fds -= 2

    # -- the thread's own --------------------------------------------------------------------------

    def _listen(self, door: Door) -> None:
        door.pause = None
        self.loop.add_reader(door.listener.fileno(), self._accept, door)

    def _pause(self, door: Door) -> None:
        """Leave clients in the queue for a moment: there is no file for them."""
        self.counts.limited += 1
        self.loop.remove_reader(door.listener.fileno())
        door.pause = self.loop.call_later(PAUSE_S, self._listen, door)

    def _accept(self, door: Door) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            if not self.has_room():
                self._pause(door)
                return
            try:
                client, address = door.listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("relay.full", error=str(error))
                    self._pause(door)
                    return
                continue  # that client has gone already
            if self.is_own((*address[:2], *called(client))):
                self.counts.loops += 1
                stream.refuse(client)
                continue
            self.fds += 2
            accepted = stream.accepted(self, door, client, address)
            if accepted is None:
                self.fds -= 2
            elif not accepted.closed:
                self._streams.add(accepted)

    def _expire(self) -> None:
        """End idle datagram flows; each lives at most a quarter longer than it should."""
        idle_s = self._settings.udp_idle_s
        before = self.loop.time() - idle_s
        while self.datagrams and (flow := next(iter(self.datagrams))).used < before:
            flow.end()
        self.loop.call_later(max(idle_s / 4, 0.05), self._expire)

    def _forget_addresses(self) -> None:
        """Addresses come and go."""
        self._addresses.forget()
        self.loop.call_later(ADDRESSES_S, self._forget_addresses)

    def _sweep(self) -> None:
        """Forget affinity that is over: of services, of backends, by time."""
        if len(self._affinity):
            ports = {str(key): port.choice for key, port in self.ports.items()}

            def keep(name: str, backend: str, unused_s: float) -> bool:
                choice = ports.get(name)
                return choice is not None and choice.remembers(backend, unused_s)

            self._affinity.retain(keep)
        self.loop.call_later(SWEEP_S, self._sweep)


def raise_limit() -> int:
    """Let this process have as many files open as it may, up to `FDS`; returns how many (U1)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limits in ((FDS, max(hard, FDS)), (min(FDS, hard), hard)):
        if limits[0] > soft:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                return limits[0]
    return soft


def _report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A flow met what nobody expected: it is lost, the others go on."""
    log.error("relay.broken", error=repr(context.get("exception")), reason=context.get("message"))
