"""A real kube-apiserver: what it takes of ours, and what an agent makes of what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.config import KubernetesSettings
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.addressing import pod_cidrs
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Pod
from ebpf_svc.testbed.traffic import connection, serve
from tests.deploy.kustomize import Object, render
from tests.lib.manifests import Web, node_manifests
from tests.lib.probing import asked_from_outside
from tests.lib.waiting import eventually
from tests.real.control_plane import ApiError, ControlPlane

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "tests"}}
SOON_S = 5.0
"""From a change at the API server to packets."""
YOUNGER = (".spec.updateStrategy.rollingUpdate.maxSurge",)
"""Fields that came after this release (1.22)."""


class Site:
    """A node whose agent has the rights of the base's ServiceAccount, and two pods."""

    def __init__(self, cluster: Cluster, control_plane: ControlPlane) -> None:
        (self.node,) = cluster.nodes
        self.cluster, self.server = cluster, control_plane
        self.pods: tuple[Pod, ...] = tuple(self.node.add_pod(f"web{n}") for n in (1, 2))
        (node,) = node_manifests([self.node])
        node["spec"] = {"podCIDRs": [pod_cidrs(self.node.number).v4]}
        for item in (NAMESPACE, node, *rights()):
            control_plane.create(item)
        token = control_plane.token_of("ebpf-svc", "kube-system")
        base = cluster.settings(self.node, cluster.folder)
        kubernetes = KubernetesSettings(kubeconfig=control_plane.kubeconfig(token), node_wait_s=5)
        told = {"manifests": None, "kubernetes": kubernetes}
        self.agent = Agent(self.node, base.model_copy(update=told), mode="ebpf")

    def put(self, web: Web, *pods: Pod) -> None:
        """Create a service and its slices."""
        for pod in pods:
            serve(pod, tcp=[web.target_port])
        for item in web.manifests(pods):
            self.server.create(item)

    def move(self, web: Web, *pods: Pod) -> None:
        """Give it other endpoints."""
        for pod in pods:
            serve(pod, tcp=[web.target_port])
        for item in web.manifests(pods):
            if item["kind"] == "EndpointSlice":
                self.server.replace(item)

    def reaches(self, web: Web, *names: str) -> None:
        """Wait until these, all of these and nothing else, answer a client outside."""

        eventually(
            lambda: asked_from_outside(self.cluster.client, self.node, web),
            until=lambda now: now == set(names),
            within_s=SOON_S,
        )

    def events(self) -> dict[str, str]:
        """Reason -> name of the object, of every Event."""
        listed = self.server.request("GET", "/apis/events.k8s.io/v1/events")["items"]
        return {each["reason"]: each["regarding"]["name"] for each in listed}


def rights() -> list[Object]:
    """ServiceAccount, role and binding, as deployed."""
    kinds = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")
    return [each for each in render(DEPLOY / "base") if each["kind"] in kinds]


@pytest.fixture
def site(cluster: Cluster, control_plane: ControlPlane) -> Iterator[Site]:
    made = Site(cluster, control_plane)
    yield made
    made.agent.stop()


def test_every_object_is_taken_as_it_is(control_plane: ControlPlane) -> None:
    """The server accepts each object of each kustomization, and drops no field of it."""
    groups = {each["name"] for each in control_plane.request("GET", "/apis")["groups"]}
    wrong = []
    for folder in (DEPLOY / "base", *sorted(DEPLOY.glob("overlays/*"))):
        for item in render(folder):
            assert item["apiVersion"] == "v1" or item["apiVersion"].split("/")[0] in groups
            made = control_plane.create(item, dry_run=True)
            name = f"{folder.name}: {item['kind']} {item['metadata']['name']}"
            wrong += [f"{name}{path}" for path in dropped(item, made) if path not in YOUNGER]
    assert wrong == []


def dropped(given: Any, kept: Any, at: str = "") -> list[str]:
    """Fields that are in what was given, and are not, or are other, in what was kept."""
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        return [
            path
            for name, value in given.items()
            for path in dropped(value, kept.get(name), f"{at}.{name}")
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = enumerate(zip(given, kept, strict=True))
        return [path for i, pair in pairs for path in dropped(*pair, f"{at}[{i}]")]
    return [] if given == kept else [at]


def test_service_made_changed_and_deleted_is_followed(site: Site) -> None:
    """With the rights of the manifests alone; packets follow each change (W1-W4, M4-M6)."""
    web, (first, second) = Web(10), site.pods
    site.put(web, first)
    site.agent.start()
    site.reaches(web, "web1")
    site.move(web, first, second)
    site.reaches(web, "web1", "web2")
    site.move(web, second)
    site.reaches(web, "web2")
    late = Web(11)
    site.put(late, first)
    site.reaches(late, "web1")
    for item in late.manifests([]):
        site.server.delete(item)
    eventually(lambda: served(site.agent), until=lambda said: "tests/web11" not in said)
    assert "tests/web10" in served(site.agent)
    loud = [line for line in lines(site.agent) if line["level"] in ("warning", "error")]
    # Of the configuration; and before 1.21 Events about Nodes were taken in kube-system alone.
    expected = {"config.doubtful", "event.dropped"}
    assert [line for line in loud if line["event"] not in expected] == []


def test_rights_suffice_and_are_no_more(site: Site) -> None:
    """The token may list what is watched, and read no Pod, Secret or ConfigMap."""
    token = site.server.token_of("ebpf-svc", "kube-system")
    for path in ("/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices", "/api/v1/nodes"):
        assert site.server.request("GET", path, token=token)["kind"].endswith("List")
    for path in ("/api/v1/pods", "/api/v1/secrets", "/api/v1/configmaps"):
        with pytest.raises(ApiError, match="403"):
            site.server.request("GET", path, token=token)


def test_server_dies_comes_back_and_has_forgotten(site: Site) -> None:
    """Traffic flows without it; changes made behind our back are found after 410 Gone."""
    web, (first, second) = Web(10), site.pods
    site.put(web, first)
    site.agent.start()
    site.reaches(web, "web1")
    target = web.at_node(site.node, Family.V4, Protocol.TCP)
    with connection(site.cluster.client, target) as open_one:
        assert open_one.ping().server == "web1"
        site.server.kill()
        assert open_one.ping().server == "web1"
        site.reaches(web, "web1")
        site.server.start()
        site.move(web, second)
        site.server.forget_history()
        site.server.kill()
        site.server.start()
        site.reaches(web, "web2")


def test_operator_reads_what_is_wrong_in_events(site: Site) -> None:
    """Events of ours are accepted, and hang on the object they are about."""
    web, (first, _) = Web(10), site.pods
    site.put(web, first)
    site.agent.start()
    site.reaches(web, "web1")
    (broken,) = (each for each in Web(12).manifests([first]) if "ipv4" in each["metadata"]["name"])
    broken["endpoints"][0]["addresses"] = ["not-an-address"]
    site.server.create(broken)
    eventually(site.events, until=lambda now: broken["metadata"]["name"] in now.values())
    site.reaches(web, "web1")


def served(agent: Agent) -> str:
    """The services in the maps, as a person sees them."""
    return agent.command("show", "services")


def lines(agent: Agent) -> list[dict[str, Any]]:
    return [json.loads(line) for line in agent.log_path.read_text().splitlines()]
