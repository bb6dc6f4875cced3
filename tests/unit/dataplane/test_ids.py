"""Ids and slot ranges: never held twice, rested before reuse, all returned in the end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ebpf_svc.dataplane.ebpf.ids import IdPool, RangePool
from ebpf_svc.errors import DataplaneError

GRACE_S = 5.0


def test_ids_are_dense_from_one():
    """Arrays indexed by id stay as short as they can be, and 0 (no backend) is never given out."""
    pool = IdPool("backends", 4, grace_s=GRACE_S)

    assert [pool.take() for _ in range(4)] == [1, 2, 3, 4]


def test_released_id_rests_until_grace_is_over():
    """A program that has just read an id never finds another backend behind it."""
    pool = IdPool("backends", 2, grace_s=GRACE_S)
    pool.take(), pool.take()
    pool.release(1)

    assert pool.recycle(100.0) == []
    assert pool.recycle(100.0 + GRACE_S - 0.1) == []
    with pytest.raises(DataplaneError, match="no id is free, 1 of 2 in use"):
        pool.take()
    assert pool.recycle(100.0 + GRACE_S) == [1]
    assert pool.take() == 1


def test_adopted_ids_are_not_given_out():
    """After a restart the ids the kernel already holds keep their meaning, whatever the order."""
    pool = IdPool("backends", 8, grace_s=GRACE_S)
    pool.adopt(5)
    pool.adopt(2)

    assert [pool.take() for _ in range(4)] == [1, 3, 4, 6]
    assert len(pool) == 6


@pytest.mark.parametrize("number", [0, 2, 9, -1])
def test_id_that_cannot_be_adopted_is_refused(number):
    """A corrupt id of an earlier run is an error of that run's leftovers, not a silent sharing."""
    pool = IdPool("backends", 8, grace_s=GRACE_S)
    pool.adopt(2)

    with pytest.raises(DataplaneError, match=f"id {number} of an earlier run"):
        pool.adopt(number)


@pytest.mark.parametrize("number", [0, 1, 9, -1])
def test_id_released_twice_or_never_taken_is_refused(number):
    """A broken caller stops at once instead of sharing an id later."""
    pool = IdPool("backends", 8, grace_s=GRACE_S)
    pool.take()
    pool.release(1)

    with pytest.raises(ValueError, match="not in use"):
        pool.release(number)


def test_ranges_fill_the_array_without_gaps():
    """First fit: the array is used from its start."""
    pool = RangePool("slots", 10, grace_s=GRACE_S)

    assert [pool.take(3), pool.take(2), pool.take(5)] == [0, 3, 5]
    with pytest.raises(DataplaneError, match="slots: no room for 1 neighbouring slots, 10 of 10"):
        pool.take(1)


def test_empty_range_takes_nothing():
    """A service port without endpoints needs no slots."""
    pool = RangePool("slots", 1, grace_s=GRACE_S)
    pool.adopt(0, 0)
    assert pool.take(0) == 0
    pool.release(0, 0)

    assert pool.take(1) == 0


def test_released_neighbours_merge():
    """Room given back in pieces serves a bigger table, once the grace period is over."""
    pool = RangePool("slots", 10, grace_s=GRACE_S)
    starts = [pool.take(2) for _ in range(5)]
    pool.release(starts[3], 2)
    pool.release(starts[1], 2)
    pool.release(starts[2], 2)
    pool.recycle(0.0)
    with pytest.raises(DataplaneError, match="no room for 6"):
        pool.take(6)
    assert pool.recycle(GRACE_S) == 6

    assert pool.take(6) == 2


def test_adopted_range_is_not_given_out():
    """After a restart the slots running programs read stay theirs."""
    pool = RangePool("slots", 12, grace_s=GRACE_S)
    pool.adopt(6, 3)
    pool.adopt(2, 1)

    assert [pool.take(3), pool.take(2), pool.take(3)] == [3, 0, 9]
    assert len(pool) == 12


@pytest.mark.parametrize(("first", "count"), [(4, 1), (0, 5), (5, 3), (11, 2), (-1, 1)])
def test_range_that_cannot_be_adopted_is_refused(first, count):
    """Leftovers that overlap or leave the array are reported, not shared."""
    pool = RangePool("slots", 12, grace_s=GRACE_S)
    pool.adopt(4, 2)

    with pytest.raises(DataplaneError, match="of an earlier run"):
        pool.adopt(first, count)


@pytest.mark.parametrize(("first", "count"), [(0, 2), (0, 4), (1, 2), (3, 3), (6, 1), (-1, 1)])
def test_range_released_otherwise_than_taken_is_refused(first, count):
    """A broken caller stops at once instead of sharing slots later."""
    pool = RangePool("slots", 12, grace_s=GRACE_S)
    pool.take(3), pool.take(2)

    with pytest.raises(ValueError, match="not a range in use"):
        pool.release(first, count)


class IdsInUse(RuleBasedStateMachine):
    """Take, adopt and give back ids in any order; a set is the model."""

    LIMIT = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = IdPool("ids", self.LIMIT, grace_s=GRACE_S)
        self.used: set[int] = set()
        self.resting: dict[int, float | None] = {}
        self.now_s = 0.0

    @rule()
    def take(self) -> None:
        free = set(range(1, self.LIMIT + 1)) - self.used - set(self.resting)
        if free:
            taken = self.pool.take()
            assert taken == min(free)
            self.used.add(taken)
        else:
            with pytest.raises(DataplaneError):
                self.pool.take()

    @rule(number=st.integers(1, LIMIT))
    def adopt(self, number: int) -> None:
        if number in self.used or number in self.resting:
            with pytest.raises(DataplaneError):
                self.pool.adopt(number)
        else:
            self.pool.adopt(number)
            self.used.add(number)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.used)))
        self.pool.release(number)
        self.used.remove(number)
        self.resting[number] = None

    @rule(later_s=st.sampled_from([0.0, 1.0, GRACE_S]))
    def recycle(self, later_s: float) -> None:
        self.now_s += later_s
        ripe = {
            number
            for number, since_s in self.resting.items()
            if since_s is not None and self.now_s - since_s >= GRACE_S
        }
        assert set(self.pool.recycle(self.now_s)) == ripe
        self.resting = {
            number: self.now_s if since_s is None else since_s
            for number, since_s in self.resting.items()
            if number not in ripe
        }

    @invariant()
    def counts_what_is_used(self) -> None:
        assert len(self.pool) == len(self.used)


class RangesInUse(RuleBasedStateMachine):
    """Take, adopt and give back ranges in any order; a list of owners is the model."""

    SIZE = 24

    def __init__(self) -> None:
        super().__init__()
        self.pool = RangePool("slots", self.SIZE, grace_s=GRACE_S)
        self.held: dict[int, int] = {}
        self.resting: list[tuple[int, int]] = []
        self.aging: list[tuple[float, int, int]] = []
        self.now_s = 0.0

    def taken(self) -> set[int]:
        ranges = [*self.held.items(), *self.resting, *((at, n) for _, at, n in self.aging)]
        return {slot for first, count in ranges for slot in range(first, first + count)}

    def room(self, count: int) -> int | None:
        taken = self.taken()
        for first in range(self.SIZE - count + 1):
            if taken.isdisjoint(range(first, first + count)):
                return first
        return None

    @rule(count=st.integers(1, 9))
    def take(self, count: int) -> None:
        expected = self.room(count)
        if expected is None:
            with pytest.raises(DataplaneError):
                self.pool.take(count)
        else:
            assert self.pool.take(count) == expected
            self.held[expected] = count

    @rule(first=st.integers(0, SIZE - 1), count=st.integers(1, 9))
    def adopt(self, first: int, count: int) -> None:
        fits = first + count <= self.SIZE
        if fits and self.taken().isdisjoint(range(first, first + count)):
            self.pool.adopt(first, count)
            self.held[first] = count
        else:
            with pytest.raises(DataplaneError):
                self.pool.adopt(first, count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        first = data.draw(st.sampled_from(sorted(self.held)))
        count = self.held.pop(first)
        self.pool.release(first, count)
        self.resting.append((first, count))

    @rule(later_s=st.sampled_from([0.0, 1.0, GRACE_S]))
    def recycle(self, later_s: float) -> None:
        self.now_s += later_s
        ripe = [entry for entry in self.aging if self.now_s - entry[0] >= GRACE_S]
        assert self.pool.recycle(self.now_s) == sum(count for _, _, count in ripe)
        self.aging = [entry for entry in self.aging if entry not in ripe]
        self.aging += [(self.now_s, first, count) for first, count in self.resting]
        self.resting = []

    @invariant()
    def counts_what_is_used(self) -> None:
        assert len(self.pool) == sum(self.held.values())

    def teardown(self) -> None:
        for first, count in self.held.items():
            self.pool.release(first, count)
        self.pool.recycle(self.now_s)
        self.pool.recycle(self.now_s + GRACE_S)
        assert self.pool.take(self.SIZE) == 0, "not all slots came back"


IdsInUse.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
RangesInUse.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestIdsInUse = IdsInUse.TestCase
TestRangesInUse = RangesInUse.TestCase
