"""Let UDP flows go that IPVS carried, once its virtual servers are gone.

Such a flow stays in connection tracking as long as its client sends, untranslated from then on: no
rule is asked again for it. Without the entry its next datagram is a new flow, for whoever serves by
then. TCP connections are IPVS's own and end with it (V12).
"""

from __future__ import annotations

from collections.abc import Collection

from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import conntrack_table
from ebpf_svc.host.ipvs import ServerKey
from ebpf_svc.log import get_logger
from ebpf_svc.model.net import Family, Protocol, family_of

log = get_logger(__name__)


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
    flows = conntrack_table.entries(family, Protocol.UDP, lambda to, _: to in gone)
    return conntrack_table.delete(family, [each for each in flows if not each.by_rule])
