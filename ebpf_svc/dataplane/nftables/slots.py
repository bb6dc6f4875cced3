"""Numbers of endpoints: which belong to whom, and which endpoint has which. Pure.

A list of endpoints owns a range of numbers. An endpoint keeps its number as long as it can, so that
one that comes for one that goes is one element, whatever the size of the list.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

End = tuple[str, int]
"""An endpoint's address and port."""
LEAST = 4
SHARD = 4096
"""Numbers whose endpoints share a map. The kernel's work for one element grows with the rules that
look into its map, and for one such rule with the map's elements: 0.2 s for 100,000 endpoints of
10,000 services, where a single map takes 15 s.
"""


class Range(NamedTuple):
    """A list of endpoints and the numbers it owns."""

    start: int
    capacity: int
    ends: tuple[End, ...]
    """The first has number `start`, and so on."""

    @property
    def shard(self) -> int:
        """The number of its map."""
        return self.start // SHARD


class Slots:
    """The numbers of one table. They are plenty: nothing is ever moved to save some."""

    def __init__(self) -> None:
        self._free: dict[int, list[int]] = {}
        """Capacity -> starts of ranges given back."""
        self._next = 0

    def fit(self, old: Range | None, wanted: Collection[End]) -> Range | None:
        """The range for these endpoints: the old one as far as it fits; None for none.

        A range that is not the old one is taken at once; give the old one back when it is no
        longer used.
        """
        if not wanted:
            return None
        if old is not None and len(old.ends) == len(wanted) and set(old.ends) == set(wanted):
            return old
        ends = rearranged(old.ends if old else (), wanted)
        if old is not None and len(ends) <= old.capacity:
            return old._replace(ends=ends)
        capacity = capacity_for(len(ends))
        free = self._free.get(capacity)
        if free:
            return Range(free.pop(), capacity, ends)
        start = self._next
        if start % SHARD + capacity > SHARD:
            start += -start % SHARD
        self._next = start + capacity
        return Range(start, capacity, ends)

    def give_back(self, unused: Range) -> None:
        """Let the numbers of a range be taken again."""
        self._free.setdefault(unused.capacity, []).append(unused.start)

    def claim(self, block: int) -> None:
        """Never hand out numbers up to these: they are in use since before this run."""
        self._next = max(self._next, (block + 1) * LEAST)


def capacity_for(count: int) -> int:
    """How many numbers a list of that length gets: room to grow, and few sizes to reuse."""
    return max(LEAST, 1 << (count - 1).bit_length())


def rearranged(old: tuple[End, ...], wanted: Collection[End]) -> tuple[End, ...]:
    """The wanted endpoints, each where it was if it can stay."""
    missing = set(wanted)
    places: list[End | None] = []
    for end in old:
        places.append(end if end in missing else None)
        missing.discard(end)
    count = len(wanted)
    movers = [end for end in places[count:] if end is not None]
    arriving = iter(sorted(missing) + movers)
    filled = [end if end is not None else next(arriving) for end in places[:count]]
    return (*filled, *arriving)
