"""Kube-proxy's idea of a healthy proxy, with clocks that only move when told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ebpf_svc.health.state import HealthState
from ebpf_svc.model.net import Family

V4, V6 = Family.V4, Family.V6
EPOCH_S = 1_790_000_000.0
"""2026-09-21T13:33:20Z."""


@dataclass
class Clocks:
    """What ages changes and what is shown; they move together unless one is set."""

    passed_s: float = 0.0
    jump_s: float = 0.0

    def monotonic(self) -> float:
        return 500.0 + self.passed_s

    def wall(self) -> float:
        return EPOCH_S + self.passed_s + self.jump_s


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def state(clocks: Clocks) -> HealthState:
    """Both families, unhealthy after a minute, the loop started."""
    state = HealthState((V4, V6), timeout_s=60.0, monotonic=clocks.monotonic, wall=clocks.wall)
    for family in (V4, V6):
        state.updated(family)
    return state


def healthy_families(state: HealthState) -> set[Family]:
    return {family for family, each in state.health().families.items() if each.healthy}


def test_idle_stays_healthy_for_ever(state: HealthState, clocks: Clocks) -> None:
    """Nothing to do is no failure (HS3)."""
    clocks.passed_s = 10 * 86_400
    assert state.is_healthy()


def test_change_that_waits_too_long_is_unhealthy(state: HealthState, clocks: Clocks) -> None:
    """From twice the sync period on, not a moment before (HS3)."""
    state.queued(V4)
    clocks.passed_s = 59.9
    assert state.is_healthy()
    clocks.passed_s = 60.0
    assert not state.is_healthy()


def test_oldest_change_counts(state: HealthState, clocks: Clocks) -> None:
    """Changes that keep coming do not hide that none is carried out (HS3)."""
    for second in range(0, 61, 10):
        clocks.passed_s = float(second)
        state.queued(V4)
    assert not state.is_healthy()


def test_sync_heals_what_is_late(state: HealthState, clocks: Clocks) -> None:
    """A success clears everything that waited; a new change ages anew (HS3, HS4)."""
    state.queued(V4)
    clocks.passed_s = 100.0
    state.updated(V4)
    assert state.is_healthy()
    state.queued(V4)
    clocks.passed_s = 159.0
    assert state.is_healthy()


def test_one_family_does_not_heal_the_other(state: HealthState, clocks: Clocks) -> None:
    """Each family answers for itself; one late is all late (HS3, HS4, digest row 52)."""
    state.queued(V4)
    state.queued(V6)
    clocks.passed_s = 61.0
    state.updated(V4)
    assert healthy_families(state) == {V4}
    assert not state.is_healthy()
    state.updated(V6)
    assert healthy_families(state) == {V4, V6}
    assert state.is_healthy()


def test_family_that_never_synced_is_not_judged(clocks: Clocks) -> None:
    """Before its first sync a family is not in the map and cannot be unhealthy (HS3)."""
    state = HealthState((V4, V6), timeout_s=60.0, monotonic=clocks.monotonic, wall=clocks.wall)
    state.updated(V4)
    state.queued(V6)
    clocks.passed_s = 1000.0
    assert list(state.health().families) == [V4]
    assert state.is_healthy()


def test_clock_that_is_set_makes_nobody_unhealthy(state: HealthState, clocks: Clocks) -> None:
    """Changes age by a clock nobody sets."""
    state.queued(V4)
    clocks.jump_s = 86_400.0
    assert state.is_healthy()
    clocks.jump_s = -86_400.0
    clocks.passed_s = 60.0
    assert not state.is_healthy()


def test_body_has_the_fields_of_kube_proxy(state: HealthState, clocks: Clocks) -> None:
    """The JSON of /healthz, byte for byte in kube-proxy's words (HS2); well, it says now (HS5)."""
    state.updated(V4)
    clocks.passed_s = 1.5
    state.updated(V6)
    clocks.passed_s = 10.25
    assert state.health().as_answered(ok=True).body(with_node=True) == {
        "lastUpdated": "2026-09-21T14:13:30.250000Z",
        "currentTime": "2026-09-21T14:13:30.250000Z",
        "nodeEligible": True,
        "healthy": True,
        "status": {
            "IPv4": {"lastUpdated": "2026-09-21T14:13:20Z", "healthy": True},
            "IPv6": {"lastUpdated": "2026-09-21T14:13:21.500000Z", "healthy": True},
        },
    }


def test_unhealthy_body_tells_the_last_real_sync(state: HealthState, clocks: Clocks) -> None:
    """The newest sync of any family, when it answers 503 (HS5)."""
    state.queued(V4)
    clocks.passed_s = 90.0
    state.updated(V6)
    clocks.passed_s = 100.0
    body = state.health().as_answered(ok=False).body(with_node=False)
    assert (body["lastUpdated"], body["currentTime"], body["healthy"]) == (
        "2026-09-21T14:14:50Z",
        "2026-09-21T14:15:00Z",
        False,
    )
    assert "nodeEligible" not in body


def test_never_synced_prints_as_go_does(clocks: Clocks) -> None:
    """A time never set is year 1, which kube-proxy's clients may know."""
    state = HealthState((V4,), timeout_s=60.0, monotonic=clocks.monotonic, wall=clocks.wall)
    body = state.health().as_answered(ok=False).body(with_node=False)
    assert (body["lastUpdated"], body["status"]) == ("0001-01-01T00:00:00Z", {})


def test_ineligible_node_does_not_make_the_proxy_unhealthy(state: HealthState) -> None:
    """Only /healthz looks at the node; its `healthy` stays true (HS6, N6)."""
    state.set_node_eligible(False)
    health = state.health()
    assert (health.healthy, health.node_eligible) == (True, False)
