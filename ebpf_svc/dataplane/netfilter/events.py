"""What connection tracking tells: flows whose destination was translated, as they come and go.

What netfilter refuses or drops has no entry and is not told.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Mapping, Sequence

from ebpf_svc.dataplane.inspect import FlowEvent, Happening
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.host import netlink
from ebpf_svc.host.conntrack_table import NETLINK_NETFILTER
from ebpf_svc.host.netlink import Message, attributes
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Protocol

_GROUP_NEW, _GROUP_DESTROY = 1, 3
"""Changes of an entry have a group of their own."""
_NEW, _DESTROY = 0x100, 0x102
"""IPCTNL_MSG_CT_NEW and _DELETE of the subsystem ctnetlink."""
_ORIGINAL, _REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_SOURCES: Mapping[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 3}
_DESTINATIONS: Mapping[int, int] = {socket.AF_INET: 2, socket.AF_INET6: 4}
_PORT = struct.Struct("!H")
End = tuple[str, int]
"""An address and a port."""


class ConntrackEvents:
    """Listens in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        """Begin to listen.

        Raises:
            UnsupportedHost: the kernel does not tell.
        """
        try:
            self._socket = netlink.Notifications(NETLINK_NETFILTER, [_GROUP_NEW, _GROUP_DESTROY])
        except OSError as error:
            raise UnsupportedHost(
                [f"conntrack events: {error.strerror} (modprobe nf_conntrack_netlink)"]
            ) from error
        self.lost = 0
        """At least so many: the kernel says only that it lost some."""

    def wait(self, timeout_s: float) -> Sequence[FlowEvent]:
        """Events since the last call, oldest first; none when time is over."""
        try:
            messages = self._socket.wait(timeout_s)
        except netlink.Overrun:
            self.lost += 1
            return []
        except OSError as error:
            if error.errno == errno.EINTR:
                return []
            raise
        now_s = time.time()
        found = (event_from(message, now_s) for message in messages)
        return [event for event in found if event is not None]

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def event_from(message: Message, now_s: float) -> FlowEvent | None:
    """What a message tells; None when it is not about a translated destination."""
    if message.type not in (_NEW, _DESTROY):
        return None
    family = message.body[0]
    fields = attributes(message.body[4:])
    try:
        number, client, called = _tuple(family, fields[_ORIGINAL])
        _, answers_from, answers_to = _tuple(family, fields[_REPLY])
        protocol = Protocol.from_number(number)
    except (KeyError, struct.error):  # no protocol with ports, or none of the model's
        return None
    if answers_from == called:
        return None
    return FlowEvent(
        time_s=now_s,
        what=Happening.OPENED if message.type == _NEW else Happening.CLOSED,
        client=client[0],
        client_port=client[1],
        netns=0,
        frontend=FrontendKey(*called, protocol),
        backend=answers_from,
        reason="" if message.type == _NEW else "forgotten",
        device=0,
        masquerade=answers_to != client,
        hairpin=answers_from[0] == client[0],
    )


def _tuple(family: int, data: bytes) -> tuple[int, End, End]:
    """Protocol number, source and destination of one direction."""
    parts = attributes(data)
    addresses, ports = attributes(parts[_TUPLE_IP]), attributes(parts[_TUPLE_PROTO])
    ends = [
        (
            socket.inet_ntop(family, addresses[address[family]]),
            int(_PORT.unpack(ports[port])[0]),
        )
        for address, port in ((_SOURCES, _SOURCE_PORT), (_DESTINATIONS, _DESTINATION_PORT))
    ]
    return ports[_NUMBER][0], ends[0], ends[1]
