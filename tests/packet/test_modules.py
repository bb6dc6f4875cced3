"""Modules of the kernel: which of them no mode may load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.config import Settings
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.modes import MODES, make_dataplane
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Node
from tests.lib.builders import (
    make_endpoint_port,
    make_endpoints,
    make_port,
    make_service,
    make_snapshot,
    ready,
)
from tests.lib.law import check_law

pytestmark = pytest.mark.root

LOADED = Path("/proc/modules")


def _has_sctp() -> bool:
    return "sctp" in {line.split()[0] for line in LOADED.read_text().splitlines()}


@pytest.fixture(scope="module")
def site(artifact_cache: Path) -> Iterator[tuple[Node, Settings]]:
    """A node, and what its agent would be told."""
    if not LOADED.exists():
        pytest.skip("this kernel has no modules to load")
    if _has_sctp():
        pytest.skip("somebody has loaded the module sctp already")
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        yield cluster.nodes[0], cluster.settings(cluster.nodes[0], cluster.folder)


@pytest.mark.parametrize("mode", MODES)
def test_services_of_sctp_load_no_sctp(mode: str, site: tuple[Node, Settings]) -> None:
    """To carry its packets needs no sockets of it, and asking for one would load the module with
    all its faults (digest row 47).
    """
    node, settings = site
    service = make_service("web", make_port(80, protocol="SCTP", node_port=30080))
    answering = make_endpoints(
        "web", ready("10.1.0.1"), ports=[make_endpoint_port(80, protocol="SCTP")]
    )
    desired = Planner(PlanOptions.from_settings(settings)).plan(make_snapshot(service, answering))
    with node.namespace.entered():
        support = make_dataplane(mode, settings).check()
        assert not _has_sctp()  # by what was tried
        if not support.ok:
            pytest.skip(str(UnsupportedHost(support.missing)))
        check_law(lambda: make_dataplane(mode, settings), node, [desired])
    assert not _has_sctp()
