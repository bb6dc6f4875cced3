"""The `world` every packet test sends its packets through: once an IPv4 one, once an IPv6 one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import tables as tables_module
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.model.net import Family
from tests.lib.packet_world import World, artifacts


@pytest.fixture(scope="session")
def artifact_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept while the tests run."""
    if os.geteuid() != 0:
        pytest.skip("needs root: programs are loaded into the kernel")
    given = os.environ.get("EBPF_SVC_ARTIFACTS")
    return Path(given) if given else Path(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def compiled(artifact_cache: Path) -> dict[Family, Artifact]:
    """Both families' programs, compiled once."""
    return artifacts(artifact_cache)


@pytest.fixture(scope="session", params=list(Family), ids=lambda family: f"ipv{int(family)}")
def loaded(request: pytest.FixtureRequest, compiled: dict[Family, Artifact]) -> Iterator[World]:
    """One family's programs and maps, loaded once."""
    world = World(request.param, compiled[request.param])
    yield world
    world.close()


@pytest.fixture
def world(loaded: World) -> World:
    """The same, with empty maps."""
    loaded.reset()
    return loaded


@pytest.fixture
def own_settings(tmp_path: Path) -> Iterator[EbpfSettings]:
    """Small maps, and a folder for their pins."""
    made = EbpfSettings(
        bpffs=tmp_path / "bpf",
        frontend_entries=64,
        backend_entries=64,
        slot_entries=1024,
        flow_entries=16_384,
        affinity_entries=64,
    )
    yield made
    tables_module.remove_pins(made)


@pytest.fixture
def tables(own_settings: EbpfSettings, compiled: dict[Family, Artifact]) -> Iterator[Tables]:
    """Those maps, empty."""
    made = Tables.open(own_settings, compiled)
    yield made
    made.close()
