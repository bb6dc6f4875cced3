"""A relay on the loopback device, with backends that are plain sockets of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from ebpf_svc.config.userspace import UserspaceSettings
from ebpf_svc.dataplane.userspace.affinity import Affinity
from ebpf_svc.dataplane.userspace.doors import DoorId, DoorPlan
from ebpf_svc.dataplane.userspace.relay import Relay
from ebpf_svc.model.desired import (
    Backend,
    Frontend,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import ServicePortName

TIMEOUT_S = 5.0


def plan_of(
    *ports: int,
    protocol: Protocol = Protocol.TCP,
    affinity_s: int = 0,
    draining: tuple[int, ...] = (),
) -> ServicePlan:
    """A service port with backends at these ports of the loopback device."""
    key = PlanKey(ServicePortName("tests", "web", "", protocol), Family.V4)
    frontend = Frontend(FrontendKey("10.96.0.1", 80, protocol), FrontendKind.CLUSTER_IP)
    backends = [Backend("127.0.0.1", port, port not in draining) for port in sorted(ports)]
    return ServicePlan(key, (frontend,), tuple(backends), bool(ports), affinity_s)


class Site:
    """One service port behind a relay."""

    def __init__(self, settings: UserspaceSettings) -> None:
        self.relay = Relay(settings, Affinity())
        self.relay.start()
        self.stack = ExitStack()
        self.door = DoorId(plan_of().key, "cluster")

    def serve(self, plan: ServicePlan) -> int:
        """Serve a plan; returns the port its clients call."""
        self.door = DoorId(plan.key, "cluster")
        door = DoorPlan(self.door, "127.0.0.1", 0, lambda _: False)
        self.relay.call(self.relay.take, plan)
        number = self.relay.call(self.relay.open_door, door)
        self.relay.call(self.relay.retain, plan)
        return number

    def listen(self, serve: Callable[[socket.socket], None]) -> int:
        """A TCP backend: `serve` gets each connection, in a thread of its own."""
        listener = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))

        def accept() -> None:
            with suppress(OSError):
                while True:
                    conn, _ = listener.accept()
                    threading.Thread(target=_served, args=(serve, conn), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return int(listener.getsockname()[1])

    def echo_datagrams(self, name: bytes) -> int:
        """A UDP backend that answers with its name and what it got."""
        sock = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind(("127.0.0.1", 0))

        def answer() -> None:
            with suppress(OSError):
                while True:
                    data, client = sock.recvfrom(1 << 16)
                    sock.sendto((name + data)[:65_507], client)

        threading.Thread(target=answer, daemon=True).start()
        return int(sock.getsockname()[1])

    def connect(self, port: int) -> socket.socket:
        return self.stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))

    def datagrams(self, port: int) -> socket.socket:
        sock = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.settimeout(TIMEOUT_S)
        sock.connect(("127.0.0.1", port))
        return sock

    def closed_port(self) -> int:
        """A port at which nobody listens, for as long as the test runs."""
        sock = self.stack.enter_context(socket.socket())
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

    def close(self) -> None:
        self.stack.close()
        self.relay.stop()


def _served(serve: Callable[[socket.socket], None], conn: socket.socket) -> None:
    with conn, suppress(OSError):
        serve(conn)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site(UserspaceSettings(udp_idle_s=0.2))
    yield made
    made.close()
