"""The benchmark measures what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.bench import packet
from ebpf_svc.bench.packet import EMPTY, MINIMAL, Case
from ebpf_svc.bench.testrun import ALWAYS_NEW, Rig
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.net import Family

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module", params=list(Family), ids=lambda family: f"ipv{int(family)}")
def rig(
    request: pytest.FixtureRequest, compiled: dict[Family, Artifact], artifact_cache: Path
) -> Iterator[Rig]:
    """Programs and maps with ten services; `compiled` are those of the cache."""
    rig = Rig(request.param, 10, artifact_cache)
    yield rig
    rig.close()


def test_every_case_goes_the_way_it_is_about(rig: Rig) -> None:
    """Each case ends with the packet the way it claims to measure; runs are complete."""
    for case in packet.cases():
        if case.flows > 2000 and case.flows != ALWAYS_NEW:
            continue  # as the shorter one, only longer
        (row,) = packet.measure({10: rig}, case, rounds=1)
        expected = {EMPTY, case.program} | ({MINIMAL} if case.has_yardstick else set())
        assert set(row.samples_ns) == expected
        assert all(len(samples) == 1 for samples in row.samples_ns.values())


def test_packets_that_go_another_way_are_not_measured(rig: Rig) -> None:
    """A case whose program leaves the packet alone is an error, not a fast result."""
    with pytest.raises(DataplaneError, match="that is not the way"):
        packet.measure({10: rig}, Case("established", "egress"), rounds=1)
