"""Tell the fast path which devices it may send through.

A thread follows links and addresses of the network namespace `start` is called in; what it hears
only makes it look anew. Entries of devices that went are deleted, so that no packet is sent to
whatever gets their index.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.constants import NO_LINK, LinkKind
from ebpf_svc.dataplane.ebpf.devices import DeviceRole, role_of
from ebpf_svc.dataplane.ebpf.options import translates_host_packets
from ebpf_svc.dataplane.ebpf.table import HashTable
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import links, netlink, rtnetlink
from ebpf_svc.host.links import DeviceAddress, Link
from ebpf_svc.log import get_logger
from ebpf_svc.model.net import Family, family_of

GROUPS = (
    rtnetlink.GROUP_LINK,
    rtnetlink.GROUP_IPV4_ADDRESS,
    rtnetlink.GROUP_IPV6_ADDRESS,
)
PAUSE_S = 0.1
"""A new pod brings many messages: they cost one look. Until then its flows take the usual way."""
RETRY_S = 1.0
_TUNNELS = frozenset({"vxlan", "geneve", "gretap", "ip6gretap", "wireguard", "ipip", "sit"})
"""Their packets are wrapped by the stack, which then has seen half of a flow."""
_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}

log = get_logger(__name__)

LinkValues = Mapping[int, tuple[LinkKind, str]]
"""Device index -> what it is, and the address packets leave from; empty = none."""


def link_values(
    devices: Iterable[Link],
    addresses: Iterable[DeviceAddress],
    settings: EbpfSettings,
    family: Family,
) -> LinkValues:
    """Decide what the fast path may use: pods' devices, the bridges they are ports of, NICs. Pure.

    The address of a device is its first; of one without, the first NIC's, as the kernel's
    masquerade has it. Where processes of the node are translated by packet, tunnels are named too,
    and under NO_LINK the address for devices that are not here.
    """
    devices = list(devices)
    kinds: dict[int, LinkKind] = {}
    bridges: set[int] = set()
    nics: list[int] = []
    for link in devices:
        role = role_of(link, settings)
        if role is DeviceRole.POD and link.has_far_peer:
            kinds[link.index] = LinkKind.PEER
            bridges.add(link.master)
        elif role is not None and link.kind in _TUNNELS and translates_host_packets(settings):
            kinds[link.index] = LinkKind.TUNNEL
        elif role is DeviceRole.NODE and link.kind not in _TUNNELS:
            kinds[link.index] = LinkKind.DRIVER if link.xdp_in_driver else LinkKind.NIC
            nics.append(link.index)
    kinds.update(
        (link.index, LinkKind.BRIDGE)
        for link in devices
        if link.kind == "bridge" and link.index in bridges
    )
    own: dict[int, str] = {}
    for each in addresses:
        if family_of(each.address) is family:
            own.setdefault(each.index, each.address)
    usual = next((own[index] for index in nics if index in own), "")
    values = {index: (kind, own.get(index, usual)) for index, kind in kinds.items()}
    if translates_host_packets(settings):
        values[NO_LINK] = (LinkKind.NIC, usual)
    return values


class FastLinks:
    """Keeps the `links` maps of both families in line with the node's devices."""

    def __init__(self, tables: Mapping[Family, HashTable], settings: EbpfSettings) -> None:
        self._tables, self._settings = tables, settings
        self._netlink = rtnetlink.Socket()
        self._notifications = rtnetlink.Notifications(GROUPS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="fast-links", daemon=True)

    def start(self) -> None:
        """Fill the maps, then follow changes; raises DataplaneError."""
        try:
            self._look()
        except OSError as error:
            self.stop()
            raise DataplaneError(f"devices: {error}") from error
        self._thread.start()

    def stop(self) -> None:
        """Stop following; the maps stay (Z2)."""
        self._stopping.set()
        if self._thread.is_alive():
            self._notifications.wake()
            self._thread.join()
        self._notifications.close()
        self._netlink.close()

    def _look(self) -> None:
        devices = links.links(self._netlink)
        addresses = links.addresses(self._netlink)
        for family, table in self._tables.items():
            wanted = {
                _key(index): table.value.pack(kind=int(kind), addr=_packed(address, family))
                for index, (kind, address) in link_values(
                    devices, addresses, self._settings, family
                ).items()
            }
            held = dict(table.items())
            table.update([(key, value) for key, value in wanted.items() if held.get(key) != value])
            table.delete([key for key in held if key not in wanted])

    def _follow(self) -> None:
        late = False
        while not self._stopping.is_set():
            try:
                heard = self._notifications.wait(RETRY_S if late else None)
            except netlink.Overrun:
                heard = []
                late = True
            if not (heard or late) or self._stopping.is_set():
                continue
            time.sleep(PAUSE_S)
            try:
                self._look()
                late = False
            except OSError as error:
                late = True
                log.warning("attach.failed", error=str(error), retry_s=RETRY_S)


def _key(index: int) -> bytes:
    return struct.pack("=I", index)


def _packed(address: str, family: Family) -> bytes:
    if not address:
        return bytes(4 if family is Family.V4 else 16)
    return socket.inet_pton(_AF[family], address)
