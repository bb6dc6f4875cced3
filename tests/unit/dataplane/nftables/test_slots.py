"""Numbers of endpoints: who keeps which."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ebpf_svc.dataplane.nftables.slots import SHARD, Range, Slots, capacity_for, rearranged

ends = st.tuples(st.sampled_from([f"10.0.0.{i}" for i in range(12)]), st.just(80))
sets = st.sets(ends)


@given(old=sets, wanted=sets)
def test_endpoints_keep_their_numbers(
    old: set[tuple[str, int]], wanted: set[tuple[str, int]]
) -> None:
    """All wanted ones have a number, from the first on, and one that can stay stays."""
    before = tuple(sorted(old))
    after = rearranged(before, wanted)
    assert sorted(after) == sorted(wanted)
    for number, end in enumerate(before):
        if end in wanted and number < len(wanted):
            assert after[number] == end


def test_one_for_one_is_one_number() -> None:
    """A pod that is replaced costs one element."""
    assert rearranged((("a", 1), ("b", 1), ("c", 1)), {("a", 1), ("c", 1), ("d", 1)}) == (
        ("a", 1),
        ("d", 1),
        ("c", 1),
    )


def test_list_grows_where_it_is_while_it_fits() -> None:
    """Growing by one is one more element, until the numbers run out."""
    slots = Slots()
    first = slots.fit(None, [("a", 1)])
    assert first is not None
    grown = slots.fit(first, [("a", 1), ("b", 1)])
    assert grown == Range(first.start, first.capacity, (("a", 1), ("b", 1)))
    moved = slots.fit(grown, [(str(i), 1) for i in range(5)])
    assert moved is not None
    assert moved.start >= first.start + first.capacity
    assert moved.capacity == capacity_for(5) == 8


def test_numbers_given_back_are_taken_again() -> None:
    """And never those in use."""
    slots = Slots()
    one, two = slots.fit(None, [("a", 1)]), slots.fit(None, [("b", 1)])
    assert one is not None
    assert two is not None
    slots.give_back(one)
    again = slots.fit(None, [("c", 1)])
    assert again is not None
    assert again.start == one.start != two.start


def test_range_lies_in_one_map() -> None:
    """A rule looks into one map only; a list larger than a map's share starts one of its own."""
    slots = Slots()
    for count in (5, 4000, 100, 5000, 1):
        found = slots.fit(None, [(str(i), 1) for i in range(count)])
        assert found is not None
        assert found.start % SHARD + found.capacity <= SHARD or found.start % SHARD == 0


def test_claimed_numbers_are_left_alone() -> None:
    """Those of an earlier run."""
    slots = Slots()
    slots.claim(11)
    found = slots.fit(None, [("a", 1)])
    assert found is not None
    assert found.start == 48
