"""Who may ask a server that is away, and when."""

from __future__ import annotations

import threading
import time

import pytest

from ebpf_svc.watch.kube import outage
from ebpf_svc.watch.kube.outage import Outage

NEVER = threading.Event()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(outage.time, "monotonic", lambda: now[0])
    return now


def test_server_that_answers_is_asked_at_once() -> None:
    """No pause without a failure."""
    away = Outage(10)
    away.wait_turn(NEVER)
    assert (away.is_on, away.over()) == (False, None)


def test_pauses_double_up_to_the_longest(clock: list[float]) -> None:
    """Jittered downwards, never below half."""
    away = Outage(0.8, jitter=lambda: 0.0)
    pauses = []
    for _ in range(6):
        pause_s = away.failed()
        assert pause_s is not None
        pauses.append(round(pause_s, 3))
        clock[0] += pause_s
        away.wait_turn(NEVER)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 0.8, 0.8]
    assert Outage(0.8, jitter=lambda: 0.999).failed() == pytest.approx(0.05, rel=0.01)


def test_failures_of_others_at_the_same_time_are_one(clock: list[float]) -> None:
    """Four kinds lose their connections together: that is one outage, one pause."""
    away = Outage(0.8)
    assert away.failed() is not None
    assert [away.failed() for _ in range(3)] == [None, None, None]
    assert away.failures == 1


def test_server_may_ask_for_a_longer_pause(clock: list[float]) -> None:
    """Retry-After of a 503."""
    assert Outage(0.8).failed(5.0) == 5.0


def test_length_of_an_outage_is_told_at_its_end(clock: list[float]) -> None:
    """From the first failure on."""
    away = Outage(0.8)
    away.failed()
    clock[0] += 3600
    away.wait_turn(NEVER)
    away.failed()
    clock[0] += 5
    away.wait_turn(NEVER)
    assert away.over() == pytest.approx(3605)
    assert away.over() is None


def test_one_tries_while_others_wait_and_follow_at_once() -> None:
    """The first answer lets everyone go."""
    away = Outage(0.05)
    away.failed()
    through: list[int] = []

    def ask(number: int) -> None:
        away.wait_turn(NEVER)
        through.append(number)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + 5
    while not through and time.monotonic() < deadline_s:
        time.sleep(0.005)
    time.sleep(0.15)
    assert len(through) == 1, "longer than any pause, yet only one was let go"
    away.over()
    for thread in threads:
        thread.join(5)
    assert sorted(through) == [0, 1, 2, 3]


def test_stopping_wakes_whoever_waits() -> None:
    """An agent that ends does not sit an outage out."""
    away, stopping = Outage(60, jitter=lambda: 0.0), threading.Event()
    away.failed(60.0)
    thread = threading.Thread(target=away.wait_turn, args=(stopping,))
    thread.start()
    stopping.set()
    away.wake()
    thread.join(2)
    assert not thread.is_alive()
