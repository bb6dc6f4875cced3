"""Fixtures: the programs, and a node with a control plane of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.testbed.cluster import Cluster
from tests.real.control_plane import ControlPlane

FOLDER = Path(os.environ.get("EBPF_SVC_KUBERNETES", "/var/lib/ebpf-svc-kubernetes"))


@pytest.fixture(scope="session")
def binaries() -> Path:
    """Where `make real` has built them."""
    assert (FOLDER / "kube-apiserver").is_file(), f"nothing in {FOLDER}: run `make real`"
    return FOLDER


@pytest.fixture
def cluster(artifact_cache: Path, no_leftovers: None) -> Iterator[Cluster]:
    # No other rules with NAT: what our own do not keep alive, nothing does.
    with Cluster.create(node_count=1, cni_masquerade=False, cache_dir=artifact_cache) as made:
        yield made


@pytest.fixture
def control_plane(cluster: Cluster, binaries: Path) -> Iterator[ControlPlane]:
    made = ControlPlane(cluster.nodes[0], binaries)
    yield made
    made.close()
