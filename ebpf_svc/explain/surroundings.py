"""This node's addresses, routes and devices: by which of them packets come in and leave."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.ebpf.devices import DeviceRole, role_of
from ebpf_svc.dataplane.ebpf.xdp import is_ours
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import links, rtnetlink
from ebpf_svc.host.links import Link, Side


@dataclass(frozen=True, slots=True)
class Device:
    """Where packets of a client come in."""

    name: str
    index: int
    role: DeviceRole | None
    """None: it carries no program of ours."""
    bridge: str = ""
    """The bridge it is a port of."""
    is_guess: bool = False
    """One of several ports of that bridge: which, the neighbour table does not say."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What of this node decides where a packet comes in."""

    local_addresses: frozenset[str]
    device_of: Callable[[str], Device | None]
    """The device through which an address is reached; None = no route."""
    source_to: Callable[[str], str]
    """This node's own address for packets to an address; empty = no route."""
    way_out: Callable[[str, str], Device | None] = lambda *_: None
    """The device by which packets to an address leave, a bridge rather than its port; the other is
    this node's address they come from, or empty."""
    drivers: Callable[[], frozenset[int]] = frozenset
    """Devices whose drivers run our XDP program."""


def look(settings: Settings) -> Surroundings:
    """Look around in this thread's network namespace.

    Raises:
        DataplaneError: netlink does not answer.
    """
    from ebpf_svc.watch.addresses import local_addresses  # noqa: PLC0415  # pyroute2 is slow

    local = frozenset({*local_addresses(), "127.0.0.1", "::1"})
    return Surroundings(
        local_addresses=local,
        device_of=lambda address: device_of(address, settings),
        source_to=source_to,
        way_out=lambda address, source: way_out(address, source, settings),
        drivers=drivers,
    )


def source_to(address: str) -> str:
    """The address routing would choose for a packet of this node."""
    from pyroute2 import IPRoute  # noqa: PLC0415  # slow
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    with IPRoute() as netlink:
        try:
            return netlink.route("get", dst=address)[0].get_attr("RTA_PREFSRC") or ""
        except (NetlinkError, OSError):
            return ""


def way_out(address: str, source: str, settings: Settings) -> Device | None:
    """The device by which packets of this node to an address leave; None = no route, or none from
    that source, if one is given.
    """
    from pyroute2 import IPRoute  # noqa: PLC0415  # slow

    with IPRoute() as netlink:
        link = _devices().get(_route_index(netlink, address, source))
    return None if link is None else Device(link.name, link.index, role_of(link, settings.ebpf))


def device_of(address: str, settings: Settings) -> Device | None:
    """The device through which an address is reached, a bridge's port rather than the bridge."""
    from pyroute2 import IPRoute  # noqa: PLC0415  # slow

    by_index = _devices()
    with IPRoute() as netlink:
        link = by_index.get(_route_index(netlink, address))
        if link is None:
            return None
        if link.kind != "bridge":
            return Device(link.name, link.index, role_of(link, settings.ebpf))
        port = by_index.get(_port(netlink, link.index, address))
    if port is not None:
        return Device(port.name, port.index, role_of(port, settings.ebpf), link.name)
    for other in by_index.values():
        if other.slave_kind == "bridge" and role_of(other, settings.ebpf) is DeviceRole.POD:
            return Device(other.name, other.index, DeviceRole.POD, link.name, is_guess=True)
    return Device(link.name, link.index, None)


def _devices() -> dict[int, Link]:
    opened = rtnetlink.Socket()
    try:
        return {link.index: link for link in links.links(opened)}
    except OSError as error:
        raise DataplaneError(f"netlink: {error}") from error
    finally:
        opened.close()


def _route_index(netlink: Any, address: str, source: str = "") -> int:
    """Index of the device a route leads to; 0 = no route."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    given = {"src": source} if source else {}
    try:
        return int(netlink.route("get", dst=address, **given)[0].get_attr("RTA_OIF"))
    except (NetlinkError, OSError):
        return 0


def drivers() -> frozenset[int]:
    """Devices whose drivers run our XDP program."""
    return frozenset(link.index for link in _devices().values() if is_ours(link))


def _port(netlink: Any, bridge: int, address: str) -> int:
    """Index of the port of a bridge behind which an address was last seen; 0 = not known."""
    family = 2 if ipaddress.ip_address(address).version == 4 else 10
    macs = {
        each.get_attr("NDA_LLADDR")
        for each in netlink.get_neighbours(family=family, ifindex=bridge)
        if each.get_attr("NDA_DST") == address
    }
    for each in netlink.fdb("dump"):
        if each.get_attr("NDA_MASTER") == bridge and each.get_attr("NDA_LLADDR") in macs:
            return int(each["ifindex"])
    return 0


def attached(device: Device, side: Side) -> dict[str, int]:
    """Programs on one side of a device: name -> id."""
    opened = rtnetlink.Socket()
    try:
        return {each.name: each.program_id for each in links.filters(opened, device.index, [side])}
    except OSError:
        return {}
    finally:
        opened.close()
