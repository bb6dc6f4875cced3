"""The examples stand on the testbed's address plan, and the agent finds nothing wrong in them."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebpf_svc.config import Settings
from ebpf_svc.model.net import Family
from ebpf_svc.model.service import ServiceName
from ebpf_svc.testbed import addressing
from ebpf_svc.watch.files import FileSource
from ebpf_svc.watch.store import Store

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def _objects(kind: str) -> Iterator[dict[str, Any]]:
    for path in sorted(EXAMPLES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] == kind:
                yield document


def test_nodes_have_the_addresses_of_the_testbed() -> None:
    """`examples/nodes.yaml` describes the nodes the demo builds."""
    for number, node in enumerate(_objects("Node"), start=1):
        assert node["metadata"]["name"] == f"node{number}"
        addresses = [entry["address"] for entry in node["status"]["addresses"]]
        assert addresses == list(addressing.node_addresses(number))
        assert node["spec"]["podCIDRs"] == list(addressing.pod_cidrs(number))


@pytest.mark.parametrize("pod", list(_objects("Pod")), ids=lambda pod: pod["metadata"]["name"])
def test_pods_lie_in_the_range_of_their_node(pod: dict[str, Any]) -> None:
    """A pod's addresses are ones its node can have given it, and differ from the automatic ones."""
    number = int(pod["spec"]["nodeName"].removeprefix("node"))
    texts = [entry["ip"] for entry in pod["status"]["podIPs"]]
    for family, text in zip(Family, texts, strict=True):
        assert ip_address(text) in ip_network(addressing.pod_cidrs(number).of(family))


def test_pod_addresses_are_used_once() -> None:
    """No two pods share an address."""
    texts = [entry["ip"] for pod in _objects("Pod") for entry in pod["status"]["podIPs"]]
    assert len(texts) == len(set(texts))


def test_agent_finds_nothing_wrong(tmp_path: Path) -> None:
    """Every example is valid and every service that shall have endpoints has them."""
    store = Store("node1")
    source = FileSource(
        Settings(node_name="node1", manifests=EXAMPLES, state_dir=tmp_path, run_dir=tmp_path), store
    )
    source.start()
    snapshot = store.snapshot()
    source.stop()
    assert snapshot is not None
    assert snapshot.problems == ()
    without = {name.name for name in snapshot.services if not _endpoints(snapshot, name)}
    assert without == {"search", "soon", "web-headless"}


def _endpoints(snapshot: Any, name: ServiceName) -> int:
    return sum(len(one.endpoints) for one in snapshot.slices.get(name, ()))
