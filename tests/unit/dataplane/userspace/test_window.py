"""What `show` gets from a running agent."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given

from ebpf_svc.dataplane.inspect import FlowView
from ebpf_svc.dataplane.userspace import window
from ebpf_svc.dataplane.userspace.doors import DoorId
from ebpf_svc.dataplane.userspace.window import NOTHING, Sight
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.net import Family
from tests.lib.strategies import desired_states


@given(desired_states())
def test_everything_is_read_as_it_was_written(desired: DesiredState) -> None:
    """Plans, doors and flows pass through JSON unharmed."""
    plans = dict(desired.plans)
    flows = tuple(
        FlowView("10.0.0.1", 5, plan.frontends[0].key, "10.1.0.1", 80, "established", 3, Family.V4)
        for plan in plans.values()
    )
    sight = Sight(plans, {DoorId(key, "local"): 3000 for key in plans}, flows)
    assert window.decode(window.encode(sight)) == sight


def test_without_an_agent_there_is_nothing(tmp_path: Path) -> None:
    """No directory, no socket, or one of an agent that died."""
    assert window.look(tmp_path / "no") == NOTHING
    assert window.look(tmp_path) == NOTHING
