"""Take over what an earlier run left: which endpoint has which number. Pure, but for `timeouts`."""

from __future__ import annotations

from collections.abc import Mapping

from ebpf_svc.dataplane.netfilter.names import nft_name
from ebpf_svc.dataplane.nftables import layout as names
from ebpf_svc.dataplane.nftables.layout import INDEX, Layout, endpoints_map_name
from ebpf_svc.dataplane.nftables.render import Ranges
from ebpf_svc.dataplane.nftables.slots import LEAST, Range, Slots, capacity_for
from ebpf_svc.host.netlink import attribute, attributes
from ebpf_svc.host.nf_dump import Held
from ebpf_svc.host.nf_expr import Lookup, Numgen, decode_name, encode_name
from ebpf_svc.host.nf_tables import GETSET, Rule, Table
from ebpf_svc.host.nfnetlink import Socket
from ebpf_svc.model.desired import PlanKey, ServicePlan


def ranges(
    held: Held, layout: Layout, plans: Mapping[PlanKey, ServicePlan]
) -> tuple[Slots, dict[PlanKey, Ranges]]:
    """The numbers service ports have in a table, where they make sense."""
    slots = Slots()
    found: dict[PlanKey, Ranges] = {}
    taken: set[int] = set()
    """Numbers in use, in blocks of the least size."""
    for key in plans:
        name = nft_name(key.port_name)
        found[key] = Ranges(
            *(
                _range(held, layout, held.rules.get(f"{prefix}-{name}", ()), taken)
                for prefix in ("service", "local")
            )
        )
    if taken:
        slots.claim(max(taken))
    return slots, found


def _range(held: Held, layout: Layout, rules: tuple[Rule, ...], taken: set[int]) -> Range | None:
    balance = balanced(rules)
    if balance is None:
        return None
    name, numbers = balance
    elements = held.elements.get(name, {})
    ends = []
    for number in numbers:
        element = elements.get(INDEX.pack(number))
        if element is None or not isinstance(element.value, bytes):
            return None
        ends.append(layout.unpack_end(element.value))
    capacity = capacity_for(len(ends))
    owned = range(numbers.start // LEAST, (numbers.start + capacity) // LEAST)
    found = Range(numbers.start, capacity, tuple(ends))
    if len(set(ends)) != len(ends) or not taken.isdisjoint(owned):
        return None
    if name != endpoints_map_name(found.shard):
        return None
    taken.update(owned)
    return found


def maps(held: Held) -> set[str]:
    """Maps of endpoints that are there, used or not."""
    return {name for name in held.sets if name.startswith(names.SERVICE_ENDPOINTS)}


def balanced(rules: tuple[Rule, ...]) -> tuple[str, range] | None:
    """The map and the numbers that a chain chooses from; None when it does not."""
    if len(rules) != 1:
        return None
    numbers = None
    for each in rules[0].expressions:
        if isinstance(each, Numgen):
            numbers = range(each.offset, each.offset + each.modulus)
        elif isinstance(each, Lookup) and each.set.startswith(names.SERVICE_ENDPOINTS):
            return None if numbers is None else (each.set, numbers)
    return None


def timeouts(socket: Socket, table: Table) -> dict[str, int]:
    """The timeout of every set, in seconds."""
    found = {}
    for body in socket.list(GETSET, table.family, attribute(1, encode_name(table.name))):
        of = attributes(body)
        found[decode_name(of[2])] = int.from_bytes(of.get(11, b""), "big") // 1000
    return found
