"""The chains every table has whatever is served (X4, X7, X12, X13). Pure."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterable, Iterator

from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.dataplane.nftables import layout as names
from ebpf_svc.dataplane.nftables.content import Chained, Content
from ebpf_svc.dataplane.nftables.layout import Layout, find_verdict, goto, jump, protocol_and_port
from ebpf_svc.host import nf_expr as nf
from ebpf_svc.host.nf_expr import (
    Bitwise,
    Cmp,
    Ct,
    Expression,
    Immediate,
    Lookup,
    Masquerade,
    Meta,
    Payload,
    Reject,
)
from ebpf_svc.host.nf_owner import SIGN_CHAIN
from ebpf_svc.host.nf_tables import Chain, Rule
from ebpf_svc.model.net import Family, Protocol, family_of

_JUMPS = {
    "filter-prerouting-pre-dnat": (names.FIREWALL_CHECK,),
    "filter-output-pre-dnat": (names.FIREWALL_CHECK,),
    "filter-input": (names.NODEPORT_CHECK, names.SERVICE_CHECK),
    "filter-forward": (names.SERVICE_CHECK, names.CLUSTER_IPS_CHECK),
    "filter-output": (names.SERVICE_CHECK, names.CLUSTER_IPS_CHECK),
    "nat-prerouting": (names.SERVICES,),
    "nat-output": (names.SERVICES,),
    "nat-postrouting": (names.MASQUERADING,),
}
"""X4; those of type filter are for new connections only."""
_FIRST = "filter-prerouting-pre-dnat"
_ALL_BITS = 0xFFFFFFFF
_DEVICE_BYTES = 16
POD_TRAFFIC = "short-circuit pod traffic"


def frame(
    layout: Layout,
    *,
    mark: int,
    pods: PodMatch | None,
    masquerade_all: bool,
    service_cidrs: Iterable[str] = (),
    localhost: bool = False,
) -> Content:
    """The sets, and all chains that are not a service port's.

    Args:
        layout: of the family.
        mark: the bit that asks for masquerading.
        pods: how a pod is told; None = it cannot be.
        masquerade_all: masquerade all that goes to cluster IPs (D3).
        service_cidrs: where cluster IPs come from; what goes there and is none is dropped (X13).
        localhost: node ports may be on 127.0.0.1.
    """
    content = Content()
    for one in layout.sets():
        content.sets[one.name] = one
    content.chains[SIGN_CHAIN.name] = Chained(SIGN_CHAIN, ())
    rules = dict(_inner_chains(layout, mark, pods, masquerade_all, service_cidrs))
    for name, of_chain in rules.items():
        content.chains[name] = Chained(Chain(name), of_chain)
    is_new = _has_bits(Ct(nf.CT_STATE), nf.STATE_NEW)
    for name, hook in names.BASE_CHAINS.items():
        match = () if hook.type == names.NAT else is_new
        jumps = tuple(Rule((*match, Immediate(jump(to)))) for to in _JUMPS[name])
        if localhost and name == _FIRST and layout.family is Family.V4:
            jumps = (*_guard_loopback(layout), *jumps)
        content.chains[name] = Chained(Chain(name, hook=hook), jumps)
    return content


def _inner_chains(
    layout: Layout,
    mark: int,
    pods: PodMatch | None,
    masquerade_all: bool,
    service_cidrs: Iterable[str],
) -> Iterator[tuple[str, tuple[Rule, ...]]]:
    to_service = layout.destination_end()
    to_node_port = (
        *(layout.destination(), Lookup(names.NODEPORT_IPS)),
        *protocol_and_port(0),
    )
    masquerade: tuple[Rule, ...] = ()
    if masquerade_all or pods is not None:
        outside = () if masquerade_all or pods is None else match_pods(layout, pods, invert=True)
        masquerade = (
            Rule(
                (
                    *(layout.destination(), Lookup(names.CLUSTER_IPS)),
                    *outside,
                    Immediate(jump(names.MARK)),
                )
            ),
        )
    yield (
        names.SERVICES,
        (
            *masquerade,
            Rule(find_verdict(names.SERVICE_IPS, *to_service)),
            Rule(find_verdict(names.SERVICE_NODEPORTS, *to_node_port)),
        ),
    )
    yield (
        names.SERVICE_CHECK,
        (Rule(find_verdict(names.NO_ENDPOINT_SERVICES, *to_service)),),
    )
    yield (
        names.NODEPORT_CHECK,
        (Rule(find_verdict(names.NO_ENDPOINT_NODEPORTS, *to_node_port)),),
    )
    yield names.FIREWALL_CHECK, (Rule(find_verdict(names.FIREWALL_IPS, *to_service)),)
    # A reset is no ICMP error, of which the kernel sends a peer but one a second.
    is_tcp = (Meta(nf.META_L4PROTO), Cmp(bytes((Protocol.TCP.number,))))
    yield (
        names.REJECT,
        (Rule((*is_tcp, Reject(None, nf.TCP_RESET))), Rule((Reject(layout.reject_code),))),
    )
    yield (
        names.CLUSTER_IPS_CHECK,
        (
            Rule(
                (
                    *(layout.destination(), Lookup(names.CLUSTER_IPS)),
                    Immediate(goto(names.REJECT)),
                ),
                "Reject traffic to invalid ports of ClusterIPs",
            ),
            *(
                Rule(
                    (
                        *match_prefix(layout, layout.destination_at, cidr),
                        Immediate(names.DROP),
                    ),
                    "Drop traffic to unallocated ClusterIPs",
                )
                for cidr in sorted(set(service_cidrs))
                if family_of(cidr) is layout.family
            ),
        ),
    )
    yield names.MARK, (Rule(_change_mark(_ALL_BITS & ~mark, mark)),)
    yield names.MASQUERADING, _masquerading(layout, mark)


def _masquerading(layout: Layout, mark: int) -> tuple[Rule, ...]:
    """X12. The mark goes with the packet it was put on, or a tunnel would meet it again."""
    is_hairpin = (
        *_has_bits(Ct(nf.CT_STATUS), nf.STATUS_DNAT),
        layout.source(),
        layout.destination(nf.register(layout.address.length)),
        *protocol_and_port(2 * layout.address.length),
        Lookup(names.HAIRPIN),
    )
    return (
        Rule(
            (
                *_has_bits(Meta(nf.META_MARK), mark),
                *_change_mark(_ALL_BITS & ~mark, 0),
                Masquerade(),
            )
        ),
        Rule((*is_hairpin, Masquerade()), "masquerade hairpin traffic"),
    )


def _guard_loopback(layout: Layout) -> Iterator[Rule]:
    """With route_localnet the kernel no longer minds loopback addresses from elsewhere; we do.

    What answers a node port on 127.0.0.1 has no such address before it is translated back.
    """
    elsewhere = (Meta(nf.META_IIFNAME), Cmp(b"lo".ljust(_DEVICE_BYTES, b"\0"), nf.NOT_EQUAL))
    for offset in (layout.source_at, layout.destination_at):
        match = match_prefix(layout, offset, "127.0.0.0/8")
        yield Rule((*elsewhere, *match, Immediate(names.DROP)), "loopback is the node's own")


def match_pods(layout: Layout, pods: PodMatch, *, invert: bool = False) -> tuple[Expression, ...]:
    """Match packets of pods (D1), or all others."""
    operation = nf.NOT_EQUAL if invert else nf.EQUAL
    if pods.prefix:
        return match_prefix(layout, layout.source_at, pods.prefix, operation)
    if pods.device:
        name = pods.device.encode().ljust(_DEVICE_BYTES, b"\0")
    else:
        name = pods.device_prefix.encode()
    return (Meta(nf.META_IIFNAME), Cmp(name, operation))


def match_prefix(
    layout: Layout, offset: int, prefix: str, operation: int = nf.EQUAL
) -> tuple[Expression, ...]:
    """Match an address in the header against a prefix, as short as `nft` would."""
    network = ipaddress.ip_network(prefix)
    address = network.network_address.packed
    if network.prefixlen == 0:
        length = 1
        mask = Bitwise(bytes(1), bytes(1), 1)
        return (Payload(nf.NETWORK_HEADER, offset, length), mask, Cmp(bytes(1), operation))
    if network.prefixlen % 8 == 0:
        length = network.prefixlen // 8
        return (Payload(nf.NETWORK_HEADER, offset, length), Cmp(address[:length], operation))
    length = layout.address.length
    return (
        Payload(nf.NETWORK_HEADER, offset, length),
        Bitwise(network.netmask.packed, bytes(length), length),
        Cmp(address, operation),
    )


def _has_bits(load: Expression, bits: int) -> tuple[Expression, ...]:
    return (load, Bitwise(_host(bits), bytes(4), 4), Cmp(bytes(4), nf.NOT_EQUAL))


def _change_mark(keep: int, flip: int) -> tuple[Expression, ...]:
    return (
        Meta(nf.META_MARK),
        Bitwise(_host(keep), _host(flip), 4),
        Meta(nf.META_MARK, register=None, source=1),
    )


def _host(number: int) -> bytes:
    """A number as registers have it."""
    return number.to_bytes(4, sys.byteorder)
