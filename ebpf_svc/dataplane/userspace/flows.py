"""The relay's flows as `show` prints them. In the relay's thread."""

from __future__ import annotations

from collections.abc import Iterator

from ebpf_svc.dataplane.inspect import FlowView
from ebpf_svc.dataplane.userspace.relay import Door, Relay
from ebpf_svc.dataplane.userspace.stream import Stream, called
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Protocol


def flow_views(relay: Relay) -> Iterator[FlowView]:
    """Every connection, then every client that sends datagrams."""
    now = relay.loop.time()
    for stream in relay.streams():
        backend = stream.backend
        yield FlowView(
            client=stream.address,
            client_port=stream.client_port,
            frontend=_called(stream),
            backend=backend.address if backend else "",
            backend_port=backend.port if backend else 0,
            state=stream.state,
            idle_s=int(now - stream.used),
            family=stream.door.plan.key.family,
        )
    for door in relay.doors.values():
        for flow in door.clients.flows.values() if door.clients is not None else ():
            yield FlowView(
                client=flow.client[0],
                client_port=flow.client[1],
                # Of a datagram behind a translation nobody tells; the first address stands for all.
                frontend=_first(door),
                backend=flow.backend.address,
                backend_port=flow.backend.port,
                state="",
                idle_s=int(now - flow.used),
                family=door.plan.key.family,
            )


def _called(stream: Stream) -> FrontendKey:
    """The frontend that a connection came for."""
    address, port = called(stream.client)
    return FrontendKey(address, port, Protocol.TCP) if port else _first(stream.door)


def _first(door: Door) -> FrontendKey:
    plan = door.port.plan
    return plan.frontends[0].key
