"""Let UDP flows go that IPVS carried, before and after its virtual servers go.

Such a flow stays in connection tracking as long as its client sends, and no rule is asked again for
it: with its virtual server gone its datagrams are dropped. Without the entry its next datagram is a
new flow, for whoever serves by then. TCP connections are IPVS's own and end with it (V12).

An entry also holds as whom a client is masqueraded: an answer to it that is under way just then is
lost, whenever that is.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import conntrack_table, sockets
from ebpf_svc.host.ipvs import ServerKey
from ebpf_svc.log import get_logger
from ebpf_svc.model.net import Family, Protocol, family_of

LOOKS, PAUSE_S = 5, 0.05

log = get_logger(__name__)


def hand_on(servers: Collection[ServerKey]) -> None:
    """Let the flows of virtual servers that are still there go to whoever serves beside them.

    An answer that was under way meets IPVS without an entry, and makes one that leads back there;
    so this ends once a look finds none. Where nobody else serves IPVS takes each flow again.
    """
    for _ in range(LOOKS):
        if not forget(servers):
            return
        time.sleep(PAUSE_S)


def end_sockets(addresses: Collection[str]) -> int:
    """Let the node's own connections fail at once whose addresses go.

    The kernel gives a socket that calls an address of the node's that address for its own, whoever
    carries the connection. Without it nothing is sent and no answer arrives, and TCP would wait for
    a quarter of an hour.

    Returns:
        How many; a kernel that does not end sockets is logged.
    """
    try:
        return sockets.destroy_sockets(
            lambda peer: peer.own_address in addresses, protocols=(Protocol.TCP, Protocol.UDP)
        )
    except (DataplaneError, OSError) as error:
        log.warning("sockets.left", error=str(error))
        return 0


def forget(servers: Collection[ServerKey]) -> int:
    """Delete the entries of flows through these virtual servers that no rule translated.

    Returns:
        How many; a table that cannot be read is logged.
    """
    count = 0
    for family in Family:
        gone = {
            (key.address, key.port)
            for key in servers
            if key.protocol is Protocol.UDP and family_of(key.address) is family
        }
        if not gone:
            continue
        try:
            count += _forget(family, gone)
        except DataplaneError as error:
            log.warning("conntrack.unread", family=family.label, error=str(error))
    return count


def _forget(family: Family, gone: Collection[tuple[str, int]]) -> int:
    flows = conntrack_table.entries(family, Protocol.UDP, lambda to, _: to in gone, answers_to=gone)
    return conntrack_table.delete(family, [each for each in flows if not each.by_rule])
