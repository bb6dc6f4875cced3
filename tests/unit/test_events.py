"""Events reach the sink often enough to be seen and seldom enough to be read."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from ebpf_svc.events import BURST, REFILL_S, Event, EventRecorder, EventType, ObjectRef

NODE, WEB = ObjectRef("Node", "", "node1"), ObjectRef("Service", "shop", "web")


@dataclass
class Sink:
    events: list[Event] = field(default_factory=list)

    def send(self, event: Event) -> None:
        self.events.append(event)


class Rig:
    def __init__(self) -> None:
        self.sink, self.now_s = Sink(), 0.0
        self.recorder = EventRecorder(self.sink, clock=lambda: self.now_s)

    def warn(self, regarding: ObjectRef = WEB, reason: str = "Failed", note: str = "why") -> None:
        self.recorder.warn(regarding, reason, note, action="Try")

    @property
    def told(self) -> list[tuple[str, str, int]]:
        return [(str(each.regarding), each.note, each.count) for each in self.sink.events]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_event_reaches_the_sink_whole(rig: Rig) -> None:
    """What, on which object, why, and what was tried."""
    rig.warn()
    rig.recorder.note(NODE, "Starting", "ebpf", action="StartKubeProxy")
    assert rig.sink.events == [
        Event(WEB, EventType.WARNING, "Failed", "why", "Try"),
        Event(NODE, EventType.NORMAL, "Starting", "ebpf", "StartKubeProxy"),
    ]


def test_repeats_are_counted_and_told_later(rig: Rig) -> None:
    """A failure with every sync is one Event in five minutes, with how often it came."""
    for second in range(0, 601, 30):
        rig.now_s = float(second)
        rig.warn(note=f"at {second}")
    assert rig.told == [
        ("Service shop/web", "at 0", 1),
        ("Service shop/web", "at 300", 10),
        ("Service shop/web", "at 600", 10),
    ]


def test_other_reasons_and_objects_are_told_at_once(rig: Rig) -> None:
    """Only the like of what was told waits."""
    rig.warn()
    rig.warn(NODE)
    rig.warn(WEB, "Other")
    assert len(rig.told) == 3


def test_flood_is_cut_and_told_in_time(rig: Rig) -> None:
    """A thousand broken Services are not a thousand Events; those left out come when repeated."""
    for number in range(1000):
        rig.warn(ObjectRef("Service", "shop", f"web{number}"))
    assert len(rig.told) == BURST
    rig.now_s = REFILL_S * 2
    for number in range(900, 1000):
        rig.warn(ObjectRef("Service", "shop", f"web{number}"))
    assert rig.told[BURST:] == [
        ("Service shop/web900", "why", 2),
        ("Service shop/web901", "why", 2),
    ]


def test_without_an_api_server_events_are_log_lines() -> None:
    """Nothing is lost where nobody collects Events."""
    with capture_logs() as lines:
        EventRecorder().warn(WEB, "Failed", "port in use", action="Listen")
    (line,) = lines
    assert (line["log_level"], line["object"], line["reason"], line["details"]) == (
        "warning",
        "Service shop/web",
        "Failed",
        "port in use",
    )
