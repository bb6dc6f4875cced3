"""The relay's flows as `show` prints them. In the relay's thread."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from ebpf_svc.dataplane.inspect import FlowView
from ebpf_svc.dataplane.userspace.relay import Door, Relay
from ebpf_svc.dataplane.userspace.stream import Stream
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol

_ORIGINAL_DST = 80
"""SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST: where a client went before netfilter translated."""


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
    client = stream.client
    try:
        if stream.door.plan.key.family is Family.V4:
            raw = client.getsockopt(socket.IPPROTO_IP, _ORIGINAL_DST, 16)
            port, packed = struct.unpack_from("!2xH4s", raw)
            return FrontendKey(socket.inet_ntop(socket.AF_INET, packed), port, Protocol.TCP)
        raw = client.getsockopt(socket.IPPROTO_IPV6, _ORIGINAL_DST, 28)
        port, packed = struct.unpack_from("!2xH4x16s", raw)
        return FrontendKey(socket.inet_ntop(socket.AF_INET6, packed), port, Protocol.TCP)
    except OSError:
        try:
            address, port = client.getsockname()[:2]
        except OSError:  # it ends just now
            return _first(stream.door)
        return FrontendKey(address, port, Protocol.TCP)


def _first(door: Door) -> FrontendKey:
    plan = door.port.plan
    return plan.frontends[0].key
