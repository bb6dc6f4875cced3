"""The law every dataplane obeys, to be asked of any of them in any kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.testbed.host import Node
from ebpf_svc.testbed.traces import traces


def check_law(make: Callable[[], Dataplane], node: Node, states: Iterable[DesiredState]) -> None:
    """Apply states one after the other, with restarts and resyncs between; then clean up.

    To be called inside the node's network namespace.
    """
    before = traces(node)
    made = make()
    made.open()
    try:
        for number, desired in enumerate(states):
            assert made.apply(desired).failed == ()
            assert made.read() == made.view(desired)
            assert made.apply(desired).writes == 0
            if number % 2:
                made.close()
                made = make()
                made.open()
                report = made.apply(desired)
                assert (report.failed, report.repaired) == ((), ())
            again = made.apply(desired, resync=True)
            assert (again.writes, again.repaired) == (0, ())
            assert made.read() == made.view(desired)
    finally:
        made.cleanup()
    assert traces(node) == before
