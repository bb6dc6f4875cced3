"""What is known besides the kernel: from a folder, from an API server, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings, Settings
from ebpf_svc.explain import known
from ebpf_svc.model.service import ServiceName

SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
}
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "web-0", "namespace": "shop", "labels": {"app": "web"}},
    "spec": {"nodeName": "node1", "containers": [{"name": "c"}]},
    "status": {
        "podIPs": [{"ip": "10.244.1.5"}],
        "conditions": [{"type": "Ready", "status": "True"}],
    },
}
NODE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node1"},
    "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
}
WEB = ServiceName("shop", "web")


def _folder(tmp_path: Path, *objects: dict[str, Any]) -> Settings:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "all.yaml").write_text("\n---\n".join(map(json.dumps, objects)))
    return Settings(manifests=manifests, state_dir=tmp_path / "state", run_dir=tmp_path)


def test_folder_gives_services_endpoints_and_pods(tmp_path: Path) -> None:
    """As the agent reads it, selectors resolved."""
    found = known.look(_folder(tmp_path, SERVICE, POD, NODE), "node1")
    assert found.snapshot is not None
    assert found.snapshot.services.keys() == {WEB}
    ((slice_,),) = (found.snapshot.slices[WEB],)
    assert [each.address for each in slice_.endpoints] == ["10.244.1.5"]
    assert found.snapshot.node.addresses == ("192.0.2.1",)
    assert "127.0.0.1" in found.snapshot.node.local_addresses
    assert found.pod_at("10.244.1.5") == "shop/web-0"
    assert found.pod_at("10.244.1.6") == ""


def test_allocations_of_the_agent_are_read_and_none_are_written(tmp_path: Path) -> None:
    """An explanation changes nothing, not even who gets which cluster IP."""
    settings = _folder(tmp_path, SERVICE)
    settings.state_dir.mkdir()
    record = settings.state_dir / "allocations.json"
    held = {"shop/web": {"cluster_ips": ["10.96.77.7"]}}
    record.write_text(json.dumps({"version": 1, "services": held}))
    before = record.read_text()
    found = known.look(settings, "node1")
    assert found.snapshot is not None
    assert found.snapshot.services[WEB].cluster_ips[0] == "10.96.77.7"
    assert record.read_text() == before
    record.unlink()
    assert known.look(settings, "node1").snapshot is not None
    assert list(settings.state_dir.iterdir()) == []


def test_api_server_gives_the_same(tmp_path: Path) -> None:
    """Listed once; a pod that cannot be asked for is not known."""
    service = {**SERVICE, "spec": {**SERVICE["spec"], "clusterIP": "10.96.0.1",
                                   "clusterIPs": ["10.96.0.1"]}}  # fmt: skip
    server = MockApiServer().start()
    try:
        server.put("Service", service)
        server.put("Node", NODE)
        kubernetes = KubernetesSettings(master=server.url)
        settings = Settings(kubernetes=kubernetes, run_dir=tmp_path)
        found = known.look(settings, "node1", pod_names=["shop/web-0"])
    finally:
        server.close()
    assert found.snapshot is not None
    assert found.snapshot.services[WEB].cluster_ips == ("10.96.0.1",)
    assert found.pods == {}


def test_what_cannot_be_read_leaves_the_kernel_alone(tmp_path: Path) -> None:
    """With the reason: a folder that went away, no server."""
    settings = Settings(manifests=tmp_path / "gone", run_dir=tmp_path)
    found = known.look(settings, "node1")
    assert found.snapshot is None
    assert "gone" in found.why_not
