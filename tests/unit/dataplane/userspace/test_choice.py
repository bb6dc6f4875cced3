"""Whose turn it is, and whom affinity holds."""

from __future__ import annotations

import random
from pathlib import Path

from ebpf_svc.dataplane.userspace import affinity as module
from ebpf_svc.dataplane.userspace.affinity import Affinity
from ebpf_svc.dataplane.userspace.choice import Choice
from ebpf_svc.model.desired import ServicePlan
from tests.lib.plans import make_backend, make_plan


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def plan(*addresses: str, affinity_s: int = 0, local: str = "") -> ServicePlan:
    backends = [make_backend(each, in_local=each == local) for each in addresses]
    return make_plan("web", backends=backends, affinity_s=affinity_s)


def choice(of: ServicePlan, affinity: Affinity | None = None) -> Choice:
    made = Choice(of.key, affinity or Affinity(), random.Random(1))
    made.take(of)
    return made


def picks(made: Choice, count: int, client: str = "c", *, local: bool = False) -> list[str]:
    found = [made.pick(client, local=local) for _ in range(count)]
    return [each.address if each is not None else "" for each in found]


def test_backends_take_turns_in_a_shuffled_order() -> None:
    """U4: each once a round, in an order of this node's own."""
    made = choice(plan("a", "b", "c"))
    first = picks(made, 3)
    assert sorted(first) == ["a", "b", "c"]
    assert picks(made, 3) == first
    orders = set()
    for seed in range(20):
        other = Choice(plan("a").key, Affinity(), random.Random(seed))
        other.take(plan("a", "b", "c"))
        orders.add(tuple(picks(other, 3)))
    assert len(orders) == 6


def test_local_list_is_another_list() -> None:
    """The Local list has its own members; an empty one gives nobody."""
    made = choice(plan("a", "b", local="b"))
    assert set(picks(made, 4, local=True)) == {"b"}
    made.take(plan("a"))
    assert picks(made, 2, local=True) == ["", ""]


def test_failed_backend_is_passed_over() -> None:
    """U5: another one, unless there is no other."""
    of = plan("a", "b")
    made = choice(of)
    avoid = [of.backends[0]]
    assert {made.pick("c", local=False, avoid=avoid) for _ in range(4)} == {of.backends[1]}
    assert made.pick("c", local=False, avoid=of.backends) in of.backends


def test_affinity_slides_and_ends() -> None:
    """P13: renewed by each use; over after the timeout, or when the backend goes."""
    clock = Clock()
    made = choice(plan("a", "b", affinity_s=10), Affinity(clock=clock))
    (kept,) = set(picks(made, 1))
    for _ in range(5):
        clock.now += 9
        assert picks(made, 1) == [kept]
    assert picks(made, 1, client="d") != [kept]
    clock.now += 11
    assert picks(made, 1) != picks(made, 1, client="d")
    made.take(plan("e", "f", affinity_s=10))
    assert len(set(picks(made, 4))) == 1
    made.take(plan("e", "f"))
    assert len(set(picks(made, 4))) == 2


def test_failed_dial_ends_affinity() -> None:
    """U5: a client is not held to a backend that does not answer."""
    of = plan("a", "b", affinity_s=10)
    made = choice(of)
    first = made.pick("c", local=False)
    assert first is not None
    made.failed("c")
    other = made.pick("c", local=False, avoid=[first])
    assert other != first
    assert made.pick("c", local=False) == other


def test_processes_of_the_node_are_one_client() -> None:
    """P14: whatever source address the route gives them."""
    of = plan("a", "b", "c", affinity_s=10)
    made = Choice(of.key, Affinity(), random.Random(1), lambda address: address != "pod")
    made.take(of)
    assert len({*picks(made, 1, "127.0.0.1"), *picks(made, 1, "192.168.0.1")}) == 1
    assert picks(made, 1, "pod") != picks(made, 1, "127.0.0.1")


def test_affinity_survives_the_agent(tmp_path: Path) -> None:
    """What was chosen is in the file at once, a torn last line harms nothing."""
    path, clock = tmp_path / module.FILE, Clock()
    first = Affinity(path, clock)
    first.put("web", "c", "a", 10)
    first.put("web", "d", "b", 10)
    first.forget("web", "d")
    # No close: the agent was killed.
    with path.open("a") as file:
        file.write("web\te\tb")
    clock.now += 5
    second = Affinity(path, clock)
    assert second.get("web", "c", 10) == "a"
    assert second.get("web", "d", 10) is None
    clock.now += 6
    assert second.get("web", "c", 10) is None


def test_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    """Renewals reach it now and then only, and it is written anew when mostly outdated."""
    path, clock = tmp_path / module.FILE, Clock()
    made = Affinity(path, clock)
    for step in range(5000):
        clock.now += 0.1
        made.put("web", "c", "ab"[step // 20 % 2], 10)
    assert len(path.read_text().splitlines()) <= module.SPARE_LINES + 3
    assert Affinity(path, clock).get("web", "c", 10) == "b"


def test_oldest_client_makes_room() -> None:
    """Many clients cost a bounded memory."""
    made = Affinity()
    for number in range(module.ENTRIES + 10):
        made.put("web", str(number), "a", 10)
    assert len(made) == module.ENTRIES
    assert made.get("web", "5", 10) is None
    assert made.get("web", str(module.ENTRIES), 10) == "a"
