"""What ipvs mode has written, and the steps from one state to another. Pure.

Addresses and elements of sets may belong to several service ports, so they are counted. A change
costs what its own service ports hold, however many there are; a whole comparison happens when the
kernel was read back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ebpf_svc.dataplane.ipvs import sets
from ebpf_svc.dataplane.ipvs.render import Dests, Server, Share
from ebpf_svc.dataplane.ipvs.sets import SetEntry
from ebpf_svc.host.ipset import Entry
from ebpf_svc.host.ipvs import Dest, RealServer, ServerKey, Shape
from ebpf_svc.model.net import Family, Protocol, family_of

KeepsServer = Callable[[ServerKey], bool]
Item = TypeVar("Item")


@dataclass(slots=True)
class Ledger:
    """What the kernel holds, as far as it is ours and was written by us."""

    servers: dict[ServerKey, Server] = field(default_factory=dict)
    resting: dict[ServerKey, set[Dest]] = field(default_factory=dict)
    """Real servers that left while they had connections: there with weight 0 (V11)."""
    addresses: Counter[str] = field(default_factory=Counter)
    """Bound to kube-ipvs0 -> frontends that want it (test 60)."""
    entries: Counter[SetEntry] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    """Elements by set."""

    def add(self, share: Share) -> None:
        """Count one more service port in."""
        self.servers.update(share.servers)
        self.addresses.update(share.addresses)
        for item in share.entries:
            self.entries[item] += 1
            if self.entries[item] == 1:
                self.sizes[item[0]] += 1

    @property
    def occupied(self) -> frozenset[str]:
        """The sets that have elements."""
        return frozenset(name for name, size in self.sizes.items() if size)


@dataclass(slots=True)
class Found:
    """What was read from the kernel."""

    shapes: Mapping[ServerKey, Shape]
    reals: Mapping[ServerKey, list[RealServer]]
    addresses: set[str]
    """On kube-ipvs0."""
    elsewhere: frozenset[str]
    """On other devices."""
    sets: Mapping[str, set[Entry]]
    """By name; a set that is missing is missing here."""

    def is_served(self, key: ServerKey) -> bool:
        """Whether a virtual server is a service's, by its address or by the sets it is in."""
        if key.address in self.addresses:
            return True
        family = family_of(key.address)
        here = Entry(key.address, key.protocol.number, key.port)
        node_port = here if key.protocol is Protocol.SCTP else Entry(port=key.port)
        return node_port in self._set(sets.NODE_PORT[key.protocol], family) or any(
            here in self._set(short, family) for short in sets.ADDRESS_KINDS
        )

    @property
    def occupied(self) -> frozenset[str]:
        """The sets that have elements."""
        return frozenset(name for name, entries in self.sets.items() if entries)

    def _set(self, short: str, family: Family) -> Collection[Entry]:
        return self.sets.get(sets.name_of(short, family), ())


@dataclass(slots=True)
class Steps:
    """What to tell the kernel, in the order of the fields: nothing leads to what is not there."""

    add_entries: list[SetEntry] = field(default_factory=list)
    add_servers: list[tuple[ServerKey, Shape]] = field(default_factory=list)
    set_servers: list[tuple[ServerKey, Shape]] = field(default_factory=list)
    add_dests: list[tuple[ServerKey, Dest, int]] = field(default_factory=list)
    set_dests: list[tuple[ServerKey, Dest, int]] = field(default_factory=list)
    add_addresses: list[str] = field(default_factory=list)
    remove_dests: list[tuple[ServerKey, Dest]] = field(default_factory=list)
    remove_servers: list[ServerKey] = field(default_factory=list)
    remove_addresses: list[str] = field(default_factory=list)
    remove_entries: list[SetEntry] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Messages by kind."""
        return {
            "entries": len(self.add_entries) + len(self.remove_entries),
            "servers": len(self.add_servers) + len(self.set_servers) + len(self.remove_servers),
            "dests": len(self.add_dests) + len(self.set_dests) + len(self.remove_dests),
            "addresses": len(self.add_addresses) + len(self.remove_addresses),
        }

    @property
    def count(self) -> int:
        return sum(self.counts().values())


@dataclass(slots=True)
class Change:
    """Steps for some service ports, and what is known once they are taken."""

    steps: Steps
    servers: dict[ServerKey, Server | None]
    leaving: list[tuple[ServerKey, Dest]]
    """Real servers to be taken away unless they have connections; in no step yet."""
    closing: set[ServerKey]
    """Virtual servers that are left without real ones: they go too, unless some have to rest."""
    addresses: Counter[str]
    entries: Counter[SetEntry]

    def settle_leaving(self, counts: Mapping[ServerKey, Mapping[Dest, int]]) -> None:
        """Decide about those that leave, now that their connections are counted (V11)."""
        for key, dest in self.leaving:
            if counts.get(key, {}).get(dest, 0):
                self.steps.set_dests.append((key, dest, 0))
                self.closing.discard(key)
        gone = [each for each in self.leaving if not counts.get(each[0], {}).get(each[1], 0)]
        steps = self.steps
        steps.remove_dests = [
            each for each in (*steps.remove_dests, *gone) if each[0] not in self.closing
        ]
        steps.remove_servers += sorted(self.closing)

    def commit(self, ledger: Ledger) -> None:
        """Note that the steps were taken."""
        kept = {key for key, _, _ in self.steps.set_dests} | ledger.resting.keys()
        for key, server in self.servers.items():
            resting = ledger.resting.pop(key, set())
            if server is None or key in self.closing or not (server.dests or key in kept):
                ledger.servers.pop(key, None)
                continue
            ledger.servers[key] = server
            resting -= server.dests.keys()
            if resting:
                ledger.resting[key] = resting
        for key, dest in self.leaving:
            if (key, dest, 0) in self.steps.set_dests:
                ledger.resting.setdefault(key, set()).add(dest)
        _shift(ledger.addresses, self.addresses)
        _shift(ledger.entries, self.entries)
        ledger.sizes.update(name for name, _ in self.steps.add_entries)
        ledger.sizes.subtract(name for name, _ in self.steps.remove_entries)


def change(ledger: Ledger, shares: Iterable[tuple[Share, Share]]) -> Change:
    """The steps for service ports of which both shapes are known: before, and now.

    A virtual server may move from one service port to another in between.
    """
    servers: dict[ServerKey, Server | None] = {}
    addresses: Counter[str] = Counter()
    entries: Counter[SetEntry] = Counter()
    pairs = list(shares)
    for old, new in pairs:
        servers.update(dict.fromkeys(old.servers))
        if old.addresses != new.addresses:
            addresses.subtract(old.addresses)
            addresses.update(new.addresses)
        entries.subtract(old.entries)
        entries.update(new.entries)
    for _, new in pairs:
        servers.update(new.servers)
    steps = Steps()
    leaving: list[tuple[ServerKey, Dest]] = []
    closing: set[ServerKey] = set()
    for key, server in servers.items():
        held = ledger.servers.get(key)
        if server is None:
            if held is not None:
                steps.remove_servers.append(key)
            continue
        rests = ledger.resting.get(key, set())
        if not server.dests:
            if held is None:
                continue
            if not rests:
                closing.add(key)
        if held != server:
            leaving += _change_server(steps, key, held, server, rests)
    _split(ledger.addresses, addresses, steps.add_addresses, steps.remove_addresses)
    _split(ledger.entries, entries, steps.add_entries, steps.remove_entries)
    return Change(steps, servers, leaving, closing, addresses, entries)


def _change_server(
    steps: Steps, key: ServerKey, held: Server | None, server: Server, resting: Collection[Dest]
) -> Iterator[tuple[ServerKey, Dest]]:
    """Add what leads to this virtual server; yields TCP's real servers that leave it."""
    if held is None:
        steps.add_servers.append((key, server.shape))
    elif held.shape != server.shape:
        steps.set_servers.append((key, server.shape))
    before: Dests = held.dests if held is not None else {}
    for dest, weight in server.dests.items():
        if dest in resting:
            # It returns while it still has connections: they stay as well (V11).
            steps.set_dests.append((key, dest, weight))
        elif dest not in before:
            steps.add_dests.append((key, dest, weight))
        elif before[dest] != weight:
            steps.set_dests.append((key, dest, weight))
    for dest in before:
        if dest in server.dests:
            continue
        if key.protocol is Protocol.TCP:
            yield key, dest
        else:
            steps.remove_dests.append((key, dest))


def _split(held: Counter[Item], delta: Counter[Item], add: list[Item], remove: list[Item]) -> None:
    """Sort counted things into those that come and those that go."""
    for item, by in delta.items():
        if by:
            before = held[item]
            if before == 0 and by > 0:
                add.append(item)
            elif before > 0 and before + by == 0:
                remove.append(item)


def _shift(held: Counter[Item], delta: Counter[Item]) -> None:
    for item, by in delta.items():
        if by:
            held[item] += by
            if not held[item]:
                del held[item]


# -- after reading back ----------------------------------------------------------------------------


def compare(found: Found, wanted: Ledger, keeps: KeepsServer) -> Steps:
    """The steps from what was read to what is wanted; notes in `wanted` what rests.

    Virtual servers come in the order of their keys. The kernel keeps a real server that was removed
    for two to four minutes, in one list, and for each that is added goes through it from the one
    removed last: fifty thousand that come back in any other order than against that of their
    removal take it minutes.

    Args:
        found: what is there.
        wanted: all service ports counted in, nothing resting.
        keeps: virtual servers that are not to be removed, whatever they are (V12).
    """
    steps = Steps()
    for key in sorted(wanted.servers):
        server, shape = wanted.servers[key], found.shapes.get(key)
        reals = found.reals.get(key) if shape is not None else None
        connections: Mapping[Dest, int] = {}
        held = None
        if shape is not None and reals is not None:
            held = Server(shape, {real.dest: real.weight for real in reals})
            connections = {real.dest: real.connection_count for real in reals}
        if not server.dests and not any(connections.values()):
            del wanted.servers[key]  # found, it is one too many
            continue
        if held == server:
            continue
        for _, dest in _change_server(steps, key, held, server, ()):
            if not connections[dest]:
                steps.remove_dests.append((key, dest))
                continue
            wanted.resting.setdefault(key, set()).add(dest)
            if held is not None and held.dests[dest]:
                steps.set_dests.append((key, dest, 0))
    steps.remove_servers += (
        key
        for key in found.shapes
        if key not in wanted.servers and found.is_served(key) and not keeps(key)
    )
    steps.add_addresses += wanted.addresses.keys() - found.addresses
    steps.remove_addresses += found.addresses - wanted.addresses.keys()
    by_set: dict[str, set[Entry]] = {name: set() for name in sets.SPECS}
    for name, entry in wanted.entries:
        by_set[name].add(entry)
    for name, entries in by_set.items():
        held_entries = found.sets.get(name, set())
        steps.add_entries += ((name, entry) for entry in entries - held_entries)
        steps.remove_entries += ((name, entry) for entry in held_entries - entries)
    return steps


def damages(steps: Steps, before: Ledger) -> list[str]:
    """What somebody changed, in words: steps that lead back to what was written before."""
    found: list[str] = []
    for verb, keys in (
        ("missing", [key for key, _ in steps.add_servers]),
        ("changed", [key for key, _ in steps.set_servers]),
        ("foreign", steps.remove_servers),
    ):
        found += (
            f"virtual server {key.address} port {key.port}/{key.protocol.value} was {verb}"
            for key in keys
        )
    missing = [(key, dest) for key, dest, _ in steps.add_dests if key in before.servers]
    new = {key for key, _ in steps.add_servers}
    found += (
        f"real server {dest.address} of {key.address} port {key.port} was missing"
        for key, dest in missing
        if key not in new
    )
    for what, come, gone in (
        ("addresses of kube-ipvs0", steps.add_addresses, steps.remove_addresses),
        ("elements of ipsets", steps.add_entries, steps.remove_entries),
    ):
        if come:
            found.append(f"{len(come)} {what} were missing")
        if gone:
            found.append(f"{len(gone)} {what} were foreign")
    return found
