"""What a table is to hold, and the transaction that brings it there. Pure.

The order inside a transaction is the kernel's demand: what is named must be there, what is named
must not go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ebpf_svc.dataplane.nftables import layout as names
from ebpf_svc.host.nf_tables import Chain, Element, Rule, Set, Table
from ebpf_svc.host.nfnetlink import Request
from ebpf_svc.model.desired import PlanKey

Owner = PlanKey | None
"""Who is to blame when the kernel refuses; None = nobody in particular."""
Owned = tuple[Request, Owner]
T = TypeVar("T")


class Chained(NamedTuple):
    """A chain with its rules."""

    chain: Chain
    rules: tuple[Rule, ...]


@dataclass(slots=True)
class Content:
    """Chains, sets and elements by name."""

    chains: dict[str, Chained] = field(default_factory=dict)
    sets: dict[str, Set] = field(default_factory=dict)
    elements: dict[str, dict[bytes, Element]] = field(default_factory=dict)
    """Set -> key -> element; of one service port each."""
    shared: dict[str, set[bytes]] = field(default_factory=dict)
    """Set -> keys others may have as well: they stay until the last one is gone."""

    def put(self, name: str, element: Element) -> None:
        """Add an element of its own."""
        self.elements.setdefault(name, {})[element.key] = element

    def share(self, name: str, key: bytes) -> None:
        """Add a key that others may add."""
        self.shared.setdefault(name, set()).add(key)


@dataclass(slots=True)
class Change:
    """What is to be written, in the order it was found."""

    table_comment: str = ""
    """Not empty: create the table."""
    replace: bool = False
    """Remove what stands there, in the same transaction."""
    sets: dict[str, tuple[Set, Owner]] = field(default_factory=dict)
    chains: dict[str, tuple[Chain, Owner]] = field(default_factory=dict)
    emptied: set[str] = field(default_factory=set)
    """Chains that have rules to be removed."""
    misplaced: set[str] = field(default_factory=set)
    """Base chains in the wrong place, which must be made again."""
    rules: dict[str, tuple[tuple[Rule, ...], Owner]] = field(default_factory=dict)
    gone: dict[str, dict[bytes, Owner]] = field(default_factory=dict)
    """Elements to be removed, by set."""
    put: dict[str, dict[bytes, tuple[Element, Owner]]] = field(default_factory=dict)
    put_keys: dict[str, list[bytes]] = field(default_factory=dict)
    """Set -> elements that are just a key, and nobody's alone."""
    gone_chains: set[str] = field(default_factory=set)
    gone_sets: set[str] = field(default_factory=set)
    retimed: dict[str, int] = field(default_factory=dict)
    """Sets that stand and get another timeout, in seconds."""

    def remove(self, name: str, key: bytes, owner: Owner = None) -> None:
        """Take an element out."""
        self.gone.setdefault(name, {})[key] = owner

    def add(self, name: str, element: Element, owner: Owner = None) -> None:
        """Put an element in."""
        self.put.setdefault(name, {})[element.key] = (element, owner)

    def write_chain(self, chained: Chained, owner: Owner, *, is_new: bool) -> None:
        """Make a chain hold just these rules."""
        name = chained.chain.name
        if is_new:
            self.chains[name] = (chained.chain, owner)
        else:
            self.emptied.add(name)
        self.rules[name] = (chained.rules, owner)

    @property
    def count(self) -> int:
        """Things that are put or removed."""
        return (
            sum(len(keys) for keys in self.gone.values())
            + sum(len(keys) for keys in (*self.put.values(), *self.put_keys.values()))
            + sum(len(rules) for rules, _ in self.rules.values())
            + len(self.sets)
            + len(self.chains)
            + len(self.gone_chains)
            + len(self.gone_sets)
            + bool(self.table_comment)
        )

    def by_kind(self) -> dict[str, int]:
        """The same by kind, for logs."""
        return {
            "chains": len(self.chains) + len(self.gone_chains),
            "rules": sum(len(rules) for rules, _ in self.rules.values()),
            "sets": len(self.sets) + len(self.gone_sets),
            "elements": sum(len(keys) for keys in self.gone.values())
            + sum(len(keys) for keys in (*self.put.values(), *self.put_keys.values())),
        }


class Steps(NamedTuple):
    """Transactions, one after the other. After each a reader sees all of it or nothing."""

    switch: list[Owned]
    """From one state to the other."""
    tidy: list[Owned]
    """Elements a packet under way may still look for."""


def steps(table: Table, change: Change, *, apart: bool = False) -> Steps:
    """The transactions of a change.

    Args:
        table: of the family.
        change: what to write.
        apart: a message for each owner, so that the kernel's refusal names one.
    """
    head: list[Owned] = []
    if change.replace:
        head.append((table.remove(), None))
    if change.table_comment:
        head.append((table.make(change.table_comment), None))
    sets: list[Owned] = [(table.add_set(one), owner) for one, owner in change.sets.values()]
    return Steps(
        [*head, *_taken_away(table, change, apart), *sets, *_put_in(table, change, apart)],
        [
            (request, None)
            for name in change.gone
            for request in table.remove_elements(name, sorted(_late(change, name)))
        ],
    )


def _late(change: Change, name: str) -> set[bytes]:
    """Numbers that get no other endpoint: a packet that has just drawn one may still look."""
    if not name.startswith(names.SERVICE_ENDPOINTS):
        return set()
    return change.gone[name].keys() - change.put.get(name, {}).keys()


def _taken_away(table: Table, change: Change, apart: bool) -> Iterator[Owned]:
    """Chains that are new, then what must go before anything is put."""
    for name in sorted(change.misplaced):
        yield table.flush_chain(name), None
        yield table.remove_chain(name), None
    for chain, owner in change.chains.values():
        yield table.add_chain(chain), owner
    for name, keys in change.gone.items():
        late = _late(change, name)
        items = ((key, owner) for key, owner in keys.items() if key not in late)
        for some, owner in _grouped(items, apart):
            for request in table.remove_elements(name, some):
                yield request, owner
    for name in sorted(change.emptied | change.gone_chains):
        yield table.flush_chain(name), None
    for name in sorted(change.gone_sets):
        yield table.remove_set(name), None


def _put_in(table: Table, change: Change, apart: bool) -> Iterator[Owned]:
    """Rules and elements, then chains nothing leads to any more."""
    # Rules first: for each the kernel looks at all elements of its map.
    for name, (rules, owner) in change.rules.items():
        for request in table.add_rules(name, rules):
            yield request, owner
    for name, elements in change.put.items():
        for some, owner in _grouped(elements.values(), apart):
            for request in table.add_elements(name, some):
                yield request, owner
    for name, keys in change.put_keys.items():
        for request in table.add_elements(name, map(Element, keys)):
            yield request, None
    for name in sorted(change.gone_chains):
        yield table.remove_chain(name), None


def _grouped(items: Iterable[tuple[T, Owner]], apart: bool) -> Iterator[tuple[list[T], Owner]]:
    """All together, or those of each owner."""
    groups: dict[Owner, list[T]] = {}
    for item, owner in items:
        groups.setdefault(owner if apart else None, []).append(item)
    for owner, group in groups.items():
        yield group, owner
