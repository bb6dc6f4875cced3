from __future__ import annotations

from collections import Counter

import pytest

from ebpf_svc.demo.report import Asker, Probe, Report, Step
from ebpf_svc.demo.screen import PlainScreen
from ebpf_svc.model.net import Family, Protocol


def _probe(**changes: object) -> Probe:
    fields: dict[str, object] = {
        "frontend": "ClusterIP",
        "address": "10.96.0.1",
        "port": 80,
        "protocol": Protocol.TCP,
        "family": Family.V4,
        "asker": Asker.POD,
        "requests": 3,
        "servers": Counter({"web-1": 3}),
        "failures": (),
        "slowest_ms": 0.5,
        **changes,
    }
    return Probe(**fields)  # type: ignore[arg-type]


HELD = Step("all is well", True, "as it should be")
BROKEN = Step("all is well", False, "it is not")


@pytest.mark.parametrize(
    ("report", "held"),
    [
        (Report([_probe()], [HELD], finished=True), True),
        (Report([_probe(failures=("timeout",))], [HELD], finished=True), False),
        (Report([_probe()], [HELD, BROKEN], finished=True), False),
        (Report([_probe()], [HELD], finished=False), False),
    ],
)
def test_tour_held_only_if_every_row_did(report: Report, held: bool) -> None:
    """One broken row, or a tour cut short, makes the exit code 1."""
    assert report.held is held
    assert report.as_dict()["held"] is held


def test_lines_of_a_pipe_name_what_broke(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal each result is a line, and the end repeats those that did not hold."""
    report = Report([_probe(failures=("timeout ETIMEDOUT",))], [HELD], finished=True)
    screen = PlainScreen(report)
    screen.show_probes(report.probes)
    screen.show_step(HELD)
    screen.finish(1.0)
    lines = capsys.readouterr().out.splitlines()
    broken = "ClusterIP 10.96.0.1:80/TCP from pod: 3 of 3 answered, web-1 3  timeout ETIMEDOUT"
    assert lines[0] == f"FAIL {broken}"
    assert lines[1] == "ok   all is well: as it should be"
    assert lines[-1].strip() == broken
    assert "\x1b" not in "".join(lines)
