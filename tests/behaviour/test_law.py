"""The law every dataplane obeys, in a node's own kernel: what is applied is what is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpf_svc.config import Settings
from ebpf_svc.modes import make_dataplane
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Node
from tests.lib.law import check_law
from tests.lib.strategies import snapshot_sequences

LAWS = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def site(no_leftovers: None, artifact_cache: Path) -> Iterator[tuple[Node, Settings]]:
    """A node without an agent, and what its agent would be told."""
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        node = cluster.nodes[0]
        yield node, cluster.settings(node, cluster.folder)


@LAWS
@given(data=st.data())
def test_what_is_applied_is_read_back_and_applied_once(
    dataplane: str, site: tuple[Node, Settings], data: st.DataObject
) -> None:
    """After apply(d), read() == view(d); again, restarted or read back, it writes nothing; after
    cleanup() nothing is left.
    """
    node, given_settings = site
    planner = Planner(PlanOptions.from_settings(given_settings))
    states = [planner.plan(each) for each in data.draw(snapshot_sequences())]
    with node.namespace.entered():
        check_law(lambda: make_dataplane(dataplane, given_settings), node, states)
