"""Maglev tables against the published algorithm, and what they promise to clients."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_svc.dataplane.ebpf import maglev
from ebpf_svc.dataplane.ebpf.maglev import SIZES, TableCache, table, table_size


def names(count: int) -> list[str]:
    return [f"10.0.{index // 250}.{index % 250}:8080" for index in range(count)]


def as_published(backends: list[str], size: int, seed: str) -> list[int]:
    """The paper's pseudocode word for word: whole permutations, populated turn by turn."""
    order = sorted(backends)
    permutation = []
    for name in order:
        digest = hashlib.blake2b(name.encode(), digest_size=16, key=seed.encode()).digest()
        offset = int.from_bytes(digest[:8], "little") % size
        skip = int.from_bytes(digest[8:], "little") % (size - 1) + 1
        permutation.append([(offset + j * skip) % size for j in range(size)])
    next_ = [0] * len(order)
    entry = [-1] * size
    n = 0
    while True:
        for i in range(len(order)):
            c = permutation[i][next_[i]]
            while entry[c] >= 0:
                next_[i] += 1
                c = permutation[i][next_[i]]
            entry[c] = i
            next_[i] += 1
            n += 1
            if n == size:
                return [backends.index(order[owner]) for owner in entry]


def owners(backends: list[str], size: int, seed: str = "s") -> list[str]:
    return [backends[index] for index in table(backends, size, seed)]


@pytest.mark.parametrize(("count", "size"), [(1, 251), (3, 251), (7, 509), (250, 251), (251, 251)])
def test_table_equals_the_published_algorithm(count, size):
    """Any other implementation of the paper with the same hash routes the same clients."""
    assert list(table(names(count), size, "ebpf-svc")) == as_published(
        names(count), size, "ebpf-svc"
    )


def test_table_stays_what_it_was():
    """A new version on one node must not route differently from an old one on the next."""
    digest = hashlib.sha256(table(names(10), 1021, "ebpf-svc").tobytes()).hexdigest()

    assert digest == "eaeb29cbd580c5a7c2778bf55d3b8650959534e21da15cf05bc0927e8b160e49"


@given(st.permutations(names(9)))
def test_order_of_backends_does_not_matter(shuffled):
    """Nodes that learn endpoints in another order send a client to the same backend."""
    assert owners(shuffled, 251) == owners(names(9), 251)


def test_other_seed_gives_another_table():
    """Two clusters behind one router need not share their collisions."""
    assert owners(names(9), 251, "one") != owners(names(9), 251, "two")


def test_seed_longer_than_a_hash_key_is_used_whole():
    """A long seed is not cut: its last letter counts."""
    assert owners(names(9), 251, "x" * 99 + "a") != owners(names(9), 251, "x" * 99 + "b")


@pytest.mark.parametrize("count", [3, 10, 100])
def test_hundred_slots_a_backend_share_evenly(count):
    """Every backend gets its share, within 3 % of the mean or two slots."""
    size = table_size(count, 100)
    shares = Counter(table(names(count), size, "ebpf-svc"))
    mean = size / count

    assert len(shares) == count
    assert max(abs(share - mean) for share in shares.values()) <= max(2.0, 0.03 * mean)


@pytest.mark.parametrize(("count", "moved_max"), [(3, 0.01), (10, 0.05), (100, 0.03)])
def test_removing_a_backend_moves_few_other_clients(count, moved_max):
    """Clients of the backends that stay keep them, but for a few percent."""
    size = table_size(count, 100)
    before = owners(names(count), size)
    for gone in names(count)[:3]:
        after = owners([name for name in names(count) if name != gone], size)
        moved = sum(was not in (now, gone) for was, now in zip(before, after, strict=True))

        assert moved / size <= moved_max


def test_no_backend_gives_no_table():
    """Nothing to choose, nothing to write."""
    assert len(table([], 251, "s")) == 0


def test_more_backends_than_slots_are_refused():
    """Some backend would silently get no traffic."""
    with pytest.raises(ValueError, match="252 backends do not fit 251 slots"):
        table(names(252), 251, "s")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_primes(size):
    """Only with a prime does every skip visit every slot."""
    assert all(size % divisor for divisor in range(2, int(size**0.5) + 1))


@pytest.mark.parametrize(
    ("count", "slots", "size"),
    [
        (0, 100, 251),
        (2, 100, 251),
        (3, 100, 509),
        (10, 100, 1_021),
        (11, 100, 2_039),
        (1_000, 100, 131_071),
        (5_000, 100, 131_071),
        (20_000, 100, 262_139),
    ],
)
def test_size_follows_the_count_in_coarse_steps(count, slots, size):
    """A size change moves every client, so a deployment may double before it comes."""
    assert table_size(count, slots) == size


def test_service_beyond_every_size_is_refused():
    """The caller can fall back to random choice; it is not left with a table that is too small."""
    with pytest.raises(ValueError, match="do not fit the largest table"):
        table_size(SIZES[-1], 100)


def test_cache_returns_what_it_built(monkeypatch):
    """A resync builds nothing anew."""
    cache = TableCache()
    first = cache.table(names(3), 251, "s")
    monkeypatch.setattr(maglev, "table", None)

    assert cache.table(names(3), 251, "s") is first


def test_cache_forgets_the_least_recently_used():
    """Memory stays bounded by slots, whatever the number of services."""
    cache = TableCache(slots_max=502)
    kept = cache.table(names(1), 251, "s")
    dropped = cache.table(names(2), 251, "s")
    cache.table(names(1), 251, "s")
    cache.table(names(3), 251, "s")

    assert cache.slots == 502
    assert cache.table(names(1), 251, "s") is kept
    assert cache.table(names(2), 251, "s") is not dropped


def test_cache_does_not_keep_a_table_larger_than_itself():
    """One huge service does not push out everything else."""
    cache = TableCache(slots_max=300)
    kept = cache.table(names(1), 251, "s")
    cache.table(names(1), 509, "s")

    assert cache.table(names(1), 251, "s") is kept
