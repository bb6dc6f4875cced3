"""What has to change from one content to another, and from what a table holds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ebpf_svc.dataplane.nftables.content import Chained, Change, Content, Owner
from ebpf_svc.host.nf_dump import Held
from ebpf_svc.host.nf_owner import COMMENT, is_signed
from ebpf_svc.host.nf_tables import DYNAMIC, Element, Set


def difference(
    old: Content, new: Content, change: Change, owner: Owner, *, can_retime: bool
) -> bool:
    """Add to a change what turns one content into the other, but for what is shared.

    Args:
        old: what was written.
        new: what is wanted.
        change: is added to.
        owner: of both.
        can_retime: this kernel gives a set that stands another timeout.

    Returns:
        Whether anything differs.
    """
    before = change.count
    is_remade = _sets(old, new, change, owner, can_retime=can_retime)
    for name, chained in new.chains.items():
        last = old.chains.get(name)
        if last is None or last.rules != chained.rules or is_remade:
            change.write_chain(chained, owner, is_new=last is None)
    change.gone_chains |= old.chains.keys() - new.chains.keys()
    for name in old.elements.keys() | new.elements.keys():
        mine, theirs = new.elements.get(name, {}), old.elements.get(name, {})
        _elements(theirs, mine, name, change, owner)
    return change.count != before


def _sets(old: Content, new: Content, change: Change, owner: Owner, *, can_retime: bool) -> bool:
    """Sets that come, go or get another timeout; returns whether one must be made again (X19)."""
    is_remade = False
    for name, one in new.sets.items():
        last = old.sets.get(name)
        if last == one:
            continue
        change.sets[name] = (one, owner)
        if last is not None:
            if can_retime:
                change.retimed[name] = one.timeout_s
            else:
                change.gone_sets.add(name)
                is_remade = True
    change.gone_sets |= old.sets.keys() - new.sets.keys()
    return is_remade


def _elements(
    old: Mapping[bytes, Element],
    new: Mapping[bytes, Element],
    name: str,
    change: Change,
    owner: Owner,
) -> None:
    for key, element in new.items():
        last = old.get(key)
        if last == element:
            continue
        if last is not None:
            change.remove(name, key, owner)
        change.add(name, element, owner)
    for key in old:
        if key not in new:
            change.remove(name, key, owner)


@dataclass(slots=True)
class Whole:
    """All a table is to hold, each thing with its owner."""

    chains: dict[str, tuple[Chained, Owner]] = field(default_factory=dict)
    sets: dict[str, tuple[Set, Owner]] = field(default_factory=dict)
    elements: dict[str, dict[bytes, tuple[Element, Owner]]] = field(default_factory=dict)
    shared: dict[str, dict[bytes, int]] = field(default_factory=dict)
    """Set -> key -> how many have that element."""

    def include(self, content: Content, owner: Owner) -> None:
        """Add one owner's part."""
        for name, chained in content.chains.items():
            self.chains[name] = (chained, owner)
        for name, one in content.sets.items():
            self.sets[name] = (one, owner)
        for name, elements in content.elements.items():
            into = self.elements.setdefault(name, {})
            for key, element in elements.items():
                into[key] = (element, owner)
        for name, keys in content.shared.items():
            counts = self.shared.setdefault(name, {})
            for key in keys:
                counts[key] = counts.get(key, 0) + 1


def compare(
    held: Held | None, wanted: Whole, *, can_retime: bool, waiting: Iterable[str] = ()
) -> tuple[Change, tuple[str, ...]]:
    """What makes a table hold what is wanted, and what was wrong with it, in words.

    Args:
        held: what it holds; None = there is no table.
        wanted: what it is to hold.
        can_retime: this kernel gives a set that stands another timeout.
        waiting: chains of ours that are to go as soon as the kernel lets them.
    """
    change = Change()
    wrong: list[str] = []
    if held is None:
        change.table_comment = COMMENT
        wrong.append("the table was missing")
        held = Held()
    elif is_strange(held, wanted):
        change.table_comment, change.replace = COMMENT, True
        wrong.append("the table was somebody else's")
        held = Held()
    elif held.flags:
        change.table_comment = COMMENT
        wrong.append("the table was switched off")
    is_empty = not held.chains and not held.sets
    found = [] if is_empty else wrong
    is_remade = _compare_sets(held, wanted, change, found, can_retime=can_retime)
    _compare_chains(held, wanted, change, found, frozenset(waiting), is_remade=is_remade)
    for name, (one, _) in wanted.sets.items():
        if one.data:
            _compare_elements(held, wanted, name, change, found)
        elif not one.flags & DYNAMIC:
            _compare_keys(held, wanted, name, change, found)
    return change, tuple(wrong)


def is_strange(held: Held, wanted: Whole) -> bool:
    """Whether a table is not of our making, or of a make that cannot be mended."""
    if not is_signed(held):
        return True
    return any(
        name in held.sets and _shape(held.sets[name]) != _shape(one)
        for name, (one, _) in wanted.sets.items()
    )


def _shape(one: Set) -> tuple[object, ...]:
    return one.key, one.data, one.flags


def _compare_sets(
    held: Held, wanted: Whole, change: Change, wrong: list[str], *, can_retime: bool
) -> bool:
    is_remade = False
    for name, (one, owner) in wanted.sets.items():
        last = held.sets.get(name)
        if last == one:
            continue
        change.sets[name] = (one, owner)
        wrong.append(f"set {name} was {'missing' if last is None else 'changed'}")
        if last is not None:
            if can_retime:
                change.retimed[name] = one.timeout_s
            else:
                change.gone_sets.add(name)
                is_remade = True
    for name in held.sets.keys() - wanted.sets.keys():
        change.gone_sets.add(name)
        wrong.append(f"set {name} was foreign")
    return is_remade


def _compare_chains(
    held: Held,
    wanted: Whole,
    change: Change,
    wrong: list[str],
    waiting: frozenset[str],
    *,
    is_remade: bool,
) -> None:
    for name, (chained, owner) in wanted.chains.items():
        last = held.chains.get(name)
        if last is not None and last.hook != chained.chain.hook:
            change.misplaced.add(name)
            last = None
        if last is None or is_remade or held.rules.get(name, ()) != chained.rules:
            change.write_chain(chained, owner, is_new=last is None)
            wrong.append(f"chain {name} was {'missing' if last is None else 'changed'}")
    for name in held.chains.keys() - wanted.chains.keys() - waiting:
        change.gone_chains.add(name)
        wrong.append(f"chain {name} was foreign")


def _compare_elements(
    held: Held, wanted: Whole, name: str, change: Change, wrong: list[str]
) -> None:
    before = held.elements.get(name, {})
    elements = wanted.elements.get(name, {})
    if not before:
        if elements:
            change.put[name] = elements
            wrong.append(f"{len(elements)} of {name} were missing")
        return
    counts = dict.fromkeys(("missing", "changed", "foreign"), 0)
    for key, owned in elements.items():
        last = before.get(key)
        if last == owned[0]:
            continue
        if last is not None:
            change.remove(name, key, owned[1])
        counts["missing" if last is None else "changed"] += 1
        change.put.setdefault(name, {})[key] = owned
    for key in before.keys() - elements.keys():
        change.remove(name, key)
        counts["foreign"] += 1
    wrong += (f"{count} of {name} were {how}" for how, count in counts.items() if count)


def _compare_keys(held: Held, wanted: Whole, name: str, change: Change, wrong: list[str]) -> None:
    before, keys = held.elements.get(name, {}), wanted.shared.get(name, {})
    missing = [key for key in keys if key not in before]
    foreign = before.keys() - keys.keys()
    if missing:
        change.put_keys[name] = missing
        wrong.append(f"{len(missing)} of {name} were missing")
    if foreign:
        change.gone[name] = dict.fromkeys(foreign)
        wrong.append(f"{len(foreign)} of {name} were foreign")
