"""The benchmark measures what it says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.bench import packet
from ebpf_svc.bench.packet import EMPTY, MINIMAL, Case
from ebpf_svc.bench.testrun import Rig
from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.net import Family


@pytest.fixture(scope="module", params=list(Family), ids=lambda family: f"ipv{int(family)}")
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Programs and maps with ten services."""
    if os.geteuid() != 0:
        pytest.skip("needs root: programs are loaded into the kernel")
    rig = Rig(request.param, 10, Path(tmp_path_factory.mktemp("artifacts")))
    yield rig
    rig.close()


def test_every_case_goes_the_way_it_is_about(rig: Rig) -> None:
    """Each case ends with the packet the way it claims to measure; runs are complete."""
    for case in packet.cases():
        if case.flows > 2000 and case.flows != packet.ALWAYS_NEW:
            continue  # as the shorter one, only longer
        (row,) = packet.measure({10: rig}, case, rounds=1)
        expected = {EMPTY, case.program} | ({MINIMAL} if case.has_yardstick else set())
        assert set(row.samples_ns) == expected
        assert all(len(samples) == 1 for samples in row.samples_ns.values())


def test_packets_that_go_another_way_are_not_measured(rig: Rig) -> None:
    """A case whose program leaves the packet alone is an error, not a fast result."""
    with pytest.raises(DataplaneError, match="that is not the way"):
        packet.measure({10: rig}, Case("established", "egress"), rounds=1)
