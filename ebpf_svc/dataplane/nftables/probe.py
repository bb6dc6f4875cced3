"""Whether this kernel can do what the tables need: told by a transaction that undoes itself.

The last message of it removes the table that the first one made, so no packet and no other program
ever sees it. No version is asked for: what works is enough (X1).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from ebpf_svc.dataplane.base import Check
from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.dataplane.nftables.compare import Whole, compare
from ebpf_svc.dataplane.nftables.content import steps
from ebpf_svc.dataplane.nftables.frame import frame
from ebpf_svc.dataplane.nftables.layout import Layout
from ebpf_svc.dataplane.nftables.render import Ranges, cluster_ends, local_ends, maps_of, render
from ebpf_svc.dataplane.nftables.slots import Slots
from ebpf_svc.host.netlink import attributes
from ebpf_svc.host.nf_expr import decode_name
from ebpf_svc.host.nf_tables import NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM, Table
from ebpf_svc.host.nfnetlink import Refused, Request, Socket, header
from ebpf_svc.model.desired import (
    Backend,
    Frontend,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.model.service import ServicePortName

NAME = "nf_tables"
_MODULES = "modprobe -a nf_tables nft_chain_nat nft_nat nft_masq nft_numgen nft_fib_inet nft_ct"
_ADDRESSES = {
    Family.V4: ("192.0.2.1", "192.0.2.2", "192.0.2.0/28"),
    Family.V6: ("2001:db8::1", "2001:db8::2", "2001:db8::/34"),
}
_WHAT = {NEWCHAIN: "chain", NEWRULE: "rule of chain", NEWSET: "set", NEWSETELEM: "element of set"}
_NAME_AT = {NEWCHAIN: 3}


def checks(layouts: Sequence[Layout]) -> Iterator[Check]:
    """What of it this network namespace can do, a check for each family."""
    for layout in layouts:
        yield _check(layout)


def _check(layout: Layout) -> Check:
    name = f"{NAME} {layout.family.label}"
    requests = _requests(layout)
    try:
        with closing(Socket()) as socket:
            socket.commit(requests)
    except Refused as refused:
        index, failure = refused.failures[0]
        if failure.errno == errno.EPERM:
            return Check(name, False, "may not be changed by us", "run as root (CAP_NET_ADMIN)")
        where = "" if index is None else f" ({_words(requests[index])})"
        return Check(name, False, f"the kernel says: {failure.reason}{where}", _MODULES)
    except OSError as error:
        return Check(name, False, f"cannot be reached: {error.strerror}", _MODULES)
    return Check(name, True, "NAT, maps, numgen, fib, affinity and intervals work")


def _requests(layout: Layout) -> list[Request]:
    """A table with one of each thing, and its removal."""
    layout = replace(layout, table=Table(layout.table.family, f"ebpf-svc-probe-{os.getpid()}"))
    _, _, prefix = _ADDRESSES[layout.family]
    pods = PodMatch(prefix=prefix)
    slots, whole = Slots(), Whole()
    whole.include(
        frame(layout, mark=1, pods=pods, masquerade_all=False, service_cidrs=(prefix,)), None
    )
    for affinity_s in (0, 1):
        plan = _plan(layout.family, affinity_s)
        ranges = Ranges(slots.fit(None, cluster_ends(plan)), slots.fit(None, local_ends(plan)))
        whole.include(render(plan, layout, ranges=ranges, pods=pods), plan.key)
        for name in maps_of([ranges]):
            whole.sets[name] = (layout.endpoints_map(name), None)
    change, _ = compare(None, whole, can_retime=True)
    made = [request for step in steps(layout.table, change) for request, _ in step]
    return [*made, layout.table.remove()]


def _plan(family: Family, affinity_s: int) -> ServicePlan:
    """A service port with all a table may need."""
    vip, endpoint, prefix = _ADDRESSES[family]
    port = 80 + affinity_s
    kind = FrontendKind.LOAD_BALANCER
    key = FrontendKey(vip, port, Protocol.TCP)
    return ServicePlan(
        PlanKey(ServicePortName("probe", f"port{port}", "", Protocol.TCP), family),
        (Frontend(key, kind, Sources.EXTERNAL, Sources.NODE, (prefix,)),),
        (Backend(endpoint, 80, in_cluster=True, in_local=True),),
        has_endpoints=True,
        affinity_s=affinity_s,
    )


def _words(request: Request) -> str:
    """What a message is about."""
    found = attributes(request.body[len(header(0)) :])
    name = decode_name(found.get(_NAME_AT.get(request.kind, 2), b""))
    return f"{_WHAT.get(request.kind, 'table')} {name}".strip()
