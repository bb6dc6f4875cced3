"""What a host's peer is told to ask."""

from __future__ import annotations

import pytest

from ebpf_svc.testbed import traffic
from ebpf_svc.testbed.traffic import Target


def test_slow_machine_waits_longer_for_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stack takes a second where a real one takes fifty milliseconds."""
    monkeypatch.setattr(traffic, "PATIENCE", 6.0)
    asked = Target("10.96.0.1", 80, timeout_s=0.5)
    assert asked.raw()["timeout_s"] == asked.waits_s == 3.0
    assert asked.raw()["address"] == "10.96.0.1"
