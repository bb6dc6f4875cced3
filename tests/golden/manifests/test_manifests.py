"""Folders of manifests against the Snapshots they become: `make golden ARGS=--update` rewrites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ebpf_svc.config import Settings
from ebpf_svc.watch.allocate import Allocator
from ebpf_svc.watch.controlplane import ControlPlane
from ebpf_svc.watch.folder import Folder
from ebpf_svc.watch.store import Store
from tests.golden.manifests.snapshottext import snapshot_text

HERE = Path(__file__).parent
CASES = sorted(path.name for path in HERE.iterdir() if list(path.glob("*.yaml")))
LATER_S = 60.0
"""When every unreadable file has become a problem."""


@pytest.mark.parametrize("case", CASES)
def test_a_folder_becomes_the_expected_snapshot(
    case: str, expect_text: Callable[[Path, str], None]
) -> None:
    """Services, slices and problems of a whole folder, as the planner will see them."""
    settings = Settings()
    folder = Folder(HERE / case)
    folder.refresh(0)
    control = ControlPlane("node1", Allocator(settings.service_cidrs, settings.node_port_range))
    state = control.reconcile(folder.files(), complete=folder.complete)
    store = Store("node1")
    store.replace(
        services=state.services,
        slices=state.slices,
        problems=(*folder.problems(LATER_S), *state.problems),
        node=state.node,
    )
    snapshot = store.snapshot()
    assert snapshot is not None
    expect_text(HERE / case / "expected.txt", snapshot_text(snapshot))
