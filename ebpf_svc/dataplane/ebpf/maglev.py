"""Maglev tables: which backend owns which slot, the same on every node.

Pure: a table follows from the backends' names, its size and the seed, and from nothing else,
neither their order nor what was built before. So two nodes that know the same endpoints send one
client to the same backend.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
section 3.4.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

SIZES = (
    *(251, 509, 1_021, 2_039, 4_093, 8_191, 16_381, 32_749, 65_521, 131_071),
    *(262_139, 524_287, 1_048_573, 2_097_143),
)
"""The largest primes below powers of two. The ladder is coarse because a change of size moves every
client."""
COMFORTABLE_SIZE = 131_071
"""Beyond it a table gets fewer slots a backend: building more takes long enough to hold up other
services."""
SLOTS_PER_BACKEND_MIN = 10

_HALVES = struct.Struct("<2Q")
_KEY_BYTES_MAX = 64
"""BLAKE2b takes no longer key."""


def table_size(backend_count: int, slots_per_backend: int) -> int:
    """Say how many slots a service with that many backends gets: a prime of `SIZES`.

    The first that holds `slots_per_backend` for each; a service so large that this exceeds
    `COMFORTABLE_SIZE` makes do with that, but not with fewer than `SLOTS_PER_BACKEND_MIN` a
    backend.

    Raises:
        ValueError: so many backends that even this exceeds the largest size.
    """
    enough = max(COMFORTABLE_SIZE, backend_count * SLOTS_PER_BACKEND_MIN)
    wanted = min(backend_count * slots_per_backend, enough)
    for size in SIZES:
        if size >= wanted:
            return size
    raise ValueError(f"{backend_count} backends do not fit the largest table of {SIZES[-1]} slots")


Fill = Callable[["array[int]", "array[int]", "array[int]", int], "array[int]"]
"""Lets backends take turns: `fill_in_python`, or the same as machine code."""


def fill_in_python(
    turns: array[int], current: array[int], skips: array[int], size: int
) -> array[int]:
    """Let backends take turns until every slot has an owner.

    Args:
        turns: indices of the backends, in the order of their turns.
        current: the slot each of them tries next; consumed.
        skips: how far each goes on from a slot that is taken.
    """
    # Each backend's place in its own permutation is kept as the slot it tries next: adding the skip
    # and subtracting the size once costs a fraction of a multiplication and a remainder per probe.
    owner = [-1] * size
    left = size
    at = current.tolist()
    players = [(turn, index, skips[turn]) for turn, index in enumerate(turns)]
    while True:
        for turn, index, skip in players:
            slot = at[turn]
            while owner[slot] >= 0:
                slot += skip
                if slot >= size:
                    slot -= size
            owner[slot] = index
            at[turn] = slot
            left -= 1
            if not left:
                return array("I", owner)


def table(
    backends: Sequence[str], size: int, seed: str, *, fill: Fill = fill_in_python
) -> array[int]:
    """Give each of `size` slots the index of a backend, as evenly as can be.

    A backend's offset and skip are the two little-endian 64-bit halves of the 16-byte BLAKE2b of
    its name, keyed with the seed (or with the seed's own BLAKE2b when that is longer than 64
    bytes): `offset = first % size`, `skip = second % (size - 1) + 1`. Backends take turns in the
    order of their names.

    Args:
        backends: distinct names, `address:port`, in any order.
        size: a prime, at least the number of backends.
        seed: same seed, same table.

    Returns:
        Indices into `backends`, by slot; empty when there is no backend.

    Raises:
        ValueError: fewer slots than backends.
    """
    if size < len(backends):
        raise ValueError(f"{len(backends)} backends do not fit {size} slots")
    if not backends:
        return array("I")
    turns = array("I", sorted(range(len(backends)), key=backends.__getitem__))
    current, skips = _permutations([backends[index] for index in turns], size, seed)
    return fill(turns, current, skips, size)


def _permutations(names: Sequence[str], size: int, seed: str) -> tuple[array[int], array[int]]:
    """Offsets and skips of the backends, in the order of `names`."""
    key = seed.encode()
    if len(key) > _KEY_BYTES_MAX:
        key = hashlib.blake2b(key).digest()
    keyed = hashlib.blake2b(digest_size=16, key=key)
    halves = _HALVES.unpack
    offsets, skips = array("I"), array("I")
    for name in names:
        one = keyed.copy()
        one.update(name.encode())
        first, second = halves(one.digest())
        offsets.append(first % size)
        skips.append(second % (size - 1) + 1)
    return offsets, skips


class TableCache:
    """Tables built lately, by content: an endpoint that comes back, or a resync, costs no building.

    Bounded by the slots of all tables together; the least recently used go first. Arrays are
    shared: do not write to them.
    """

    def __init__(self, slots_max: int = 1_048_576, *, fill: Fill = fill_in_python) -> None:
        self._fill = fill
        self._slots_max = slots_max
        self._slots = 0
        self._tables: OrderedDict[tuple[tuple[str, ...], int, str], array[int]] = OrderedDict()

    def table(self, backends: Sequence[str], size: int, seed: str) -> array[int]:
        """Return what the function `table` returns, from memory when it is there."""
        key = (tuple(backends), size, seed)
        found = self._tables.get(key)
        if found is not None:
            self._tables.move_to_end(key)
            return found
        built = table(backends, size, seed, fill=self._fill)
        if len(built) <= self._slots_max:
            self._tables[key] = built
            self._slots += len(built)
            while self._slots > self._slots_max:
                _, oldest = self._tables.popitem(last=False)
                self._slots -= len(oldest)
        return built

    @property
    def slots(self) -> int:
        """Slots of all tables held, 4 bytes each."""
        return self._slots
