"""Who holds which id and which range of slots; what is given back rests before it is used again.

No kernel and no clock: the caller says what time it is. Nothing is freed at once, because a program
that runs this moment may have read the number already: `release` puts it aside, the next `recycle`
notes the time, and a `recycle` at least the grace period later frees it.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from ebpf_svc.errors import DataplaneError

Item = TypeVar("Item")

GRACE_S = 2.0
"""How long what is given back rests before it is given out again: a program that has read a number
is done with it within microseconds."""

_FREE, _FIRST, _REST, _RESTING = range(4)
"""What a byte of a pool says: free, first of a taken range, further on in one, given back."""


class _Quarantine(Generic[Item]):
    """What was given back, oldest first."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._fresh: list[Item] = []
        self._aging: deque[tuple[float, list[Item]]] = deque()

    def add(self, item: Item) -> None:
        self._fresh.append(item)

    def ripe(self, now_s: float) -> list[Item]:
        """Remove and return what has rested enough; start the clock for what came since."""
        ripe: list[Item] = []
        while self._aging and now_s - self._aging[0][0] >= self._grace_s:
            ripe += self._aging.popleft()[1]
        if self._fresh:
            self._aging.append((now_s, self._fresh))
            self._fresh = []
        return ripe


class IdPool:
    """Dense ids `1..limit`, the lowest free one first, so that arrays stay compact.

    Args:
        name: what the ids stand for and the setting that bounds them, for messages.
        limit: the largest id.
        grace_s: how long a released id rests.
    """

    def __init__(self, name: str, limit: int, *, grace_s: float) -> None:
        self._name, self._limit = name, limit
        self._state = bytearray(limit + 1)
        self._state[0] = _FIRST
        self._lowest = 1
        """No id below is free."""
        self._used = 0
        self._quarantine: _Quarantine[int] = _Quarantine(grace_s)

    def __len__(self) -> int:
        """Ids in use, resting ones not counted."""
        return self._used

    def take(self) -> int:
        """Hand out the lowest free id; raises DataplaneError when there is none."""
        found = self._state.find(_FREE, self._lowest)
        if found < 0:
            raise DataplaneError(
                f"{self._name}: no id is free, {self._used} of {self._limit} in use and the others "
                "not yet past their grace period"
            )
        self._state[found] = _FIRST
        self._lowest = found + 1
        self._used += 1
        return found

    def adopt(self, number: int) -> None:
        """Take the id an earlier run left in use.

        Raises:
            DataplaneError: it is out of range or in use already.
        """
        if not 0 < number <= self._limit or self._state[number] != _FREE:
            raise DataplaneError(
                f"{self._name}: id {number} of an earlier run cannot be taken over"
            )
        self._state[number] = _FIRST
        self._used += 1

    def release(self, number: int) -> None:
        """Give an id back; it rests until `recycle`. Raises ValueError when it is not in use."""
        if not 0 < number <= self._limit or self._state[number] != _FIRST:
            raise ValueError(f"{self._name}: id {number} is not in use")
        self._state[number] = _RESTING
        self._used -= 1
        self._quarantine.add(number)

    def recycle(self, now_s: float) -> list[int]:
        """Free what has rested long enough, by a monotonic clock; returns the ids."""
        ripe = self._quarantine.ripe(now_s)
        for number in ripe:
            self._state[number] = _FREE
        if ripe:
            self._lowest = min(self._lowest, *ripe)
        return ripe


class RangePool:
    """Ranges of an array of slots, first fit.

    One byte a slot says who has it, and searching is `bytearray.find` for a run of free bytes:
    neighbours merge by themselves, and for each count asked for the pool remembers where no room
    was found below.

    Args:
        name: what the slots are for and the setting that bounds them, for messages.
        size: slots `0..size-1`.
        grace_s: how long a released range rests.
    """

    def __init__(self, name: str, size: int, *, grace_s: float) -> None:
        self._name, self._size = name, size
        self._state = bytearray(size)
        self._room_from: dict[int, int] = {}
        """By count: no range of that many free slots starts below."""
        self._used = 0
        self._quarantine: _Quarantine[tuple[int, int]] = _Quarantine(grace_s)

    def __len__(self) -> int:
        """Slots in use, resting ones not counted."""
        return self._used

    def take(self, count: int) -> int:
        """Hand out `count` neighbouring slots.

        Returns:
            The first slot; 0 for a count of 0, which takes nothing.

        Raises:
            DataplaneError: there is no such room.
        """
        if count == 0:
            return 0
        start = self._room_from.get(count)
        if start is None:
            # Where fewer did not fit, more do not either.
            start = max((at for less, at in self._room_from.items() if less < count), default=0)
        first = self._state.find(bytes(count), start)
        if first < 0:
            self._room_from[count] = self._size
            raise DataplaneError(
                f"{self._name}: no room for {count} neighbouring slots, "
                f"{self._used} of {self._size} in use"
            )
        self._occupy(first, count)
        self._room_from[count] = first + count
        return first

    def adopt(self, first: int, count: int) -> None:
        """Take the range an earlier run left in use; a count of 0 takes nothing.

        Raises:
            DataplaneError: it leaves the array, or some of it is in use already.
        """
        end = first + count
        if first < 0 or end > self._size or self._state[first:end].strip(b"\0"):
            raise DataplaneError(
                f"{self._name}: slots {first}..{end - 1} of an earlier run cannot be taken over"
            )
        if count:
            self._occupy(first, count)

    def release(self, first: int, count: int) -> None:
        """Give a range back as it was taken; it rests until `recycle`.

        Raises:
            ValueError: it is not in use, or only part of what was taken.
        """
        if count == 0:
            return
        end = first + count
        if (
            first < 0
            or self._state[first:end] != _range(count)
            or (end < self._size and self._state[end] == _REST)
        ):
            raise ValueError(f"{self._name}: {first}..{end - 1} is not a range in use")
        self._state[first:end] = bytes((_RESTING,)) * count
        self._used -= count
        self._quarantine.add((first, count))

    def recycle(self, now_s: float) -> int:
        """Free what has rested long enough, by a monotonic clock; returns how many slots."""
        ripe = self._quarantine.ripe(now_s)
        for first, count in ripe:
            self._state[first : first + count] = bytes(count)
        if ripe:
            lowest = min(ripe)[0]
            for count, start in self._room_from.items():
                # What was free before it counts as well.
                self._room_from[count] = min(start, max(0, lowest - count + 1))
        return sum(count for _, count in ripe)

    def _occupy(self, first: int, count: int) -> None:
        self._state[first : first + count] = _range(count)
        self._used += count


def _range(count: int) -> bytes:
    """What the bytes of a taken range say."""
    return b"\x01" + b"\x02" * (count - 1)
