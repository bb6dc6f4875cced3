"""Slices the control plane makes for Services with a selector."""

from __future__ import annotations

from typing import Any

import pytest

from ebpf_svc.model.endpoint import Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol
from tests.unit.watch.cluster import Cluster, apply, named, service


def pod(
    name: str = "a",
    *,
    ips: str = "10.0.0.1",
    labels: str = "app: web",
    ready: bool = True,
    meta: str = "",
    spec: str = "nodeName: node1",
    phase: str = "Running",
) -> str:
    addresses = ", ".join(f'{{ip: "{ip}"}}' for ip in ips.split())
    return (
        f"{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{{labels}}}, {meta}}},"
        f" spec: {{{spec}}}, status: {{phase: {phase}, podIPs: [{addresses}],"
        f" conditions: [{{type: Ready, status: '{ready}'}}]}}}}\n"
    )


def web(**spec: Any) -> str:
    return service("web", **{"selector": {"app": "web"}, **spec})


def endpoints(*texts: str) -> list[Endpoint]:
    state = apply(*texts)
    assert state.problems == ()
    return [each for item in state.slices.get(named("web"), ()) for each in item.endpoints]


def addresses(*texts: str) -> list[str]:
    return [endpoint.address for endpoint in endpoints(*texts)]


def test_pods_with_all_labels_become_endpoints() -> None:
    """All labels must match, further ones do not matter, and the namespace is the Service's."""
    text = service("web", selector={"app": "web", "tier": "front"})
    assert addresses(
        text,
        pod("a", ips="10.0.0.1", labels="app: web, tier: front, x: z"),
        pod("b", ips="10.0.0.2", labels="app: web"),
        pod("c", ips="10.0.0.3", labels="app: web, tier: back"),
        pod("d", ips="10.0.0.4", labels="app: web, tier: front", meta="namespace: other"),
        pod("e", ips="10.0.0.5", labels="app: shop, tier: front"),
    ) == ["10.0.0.1"]


def test_an_empty_selector_selects_nothing() -> None:
    """It is no selector: such a Service's endpoints are written by hand."""
    assert addresses(service("web", selector={}), pod()) == []


def test_a_made_slice_says_all_a_planner_needs() -> None:
    state = apply(web(ports=[{"name": "http", "port": 80, "targetPort": 8080}]), pod())
    assert state.slices == {
        named("web"): (
            EndpointSlice(
                namespace="default",
                name="web-ipv4-521087d2",
                service_name=named("web"),
                family=Family.V4,
                ports=(EndpointPort("http", Protocol.TCP, 8080),),
                endpoints=(Endpoint("10.0.0.1", node_name="node1"),),
            ),
        )
    }


def test_each_family_of_the_service_gets_its_slice() -> None:
    """A pod without an address of the family has no endpoint there."""
    dual = web(ipFamilyPolicy="RequireDualStack")
    pods = pod("a", ips="10.0.0.1 fd00::1"), pod("b", ips="fd00::2")
    state = apply(dual, *pods)
    found = {s.family: [e.address for e in s.endpoints] for s in state.slices[named("web")]}
    assert found == {Family.V4: ["10.0.0.1"], Family.V6: ["fd00::1", "fd00::2"]}
    assert addresses(web(), *pods) == ["10.0.0.1"]


def test_a_named_target_port_is_each_pods_own() -> None:
    """Rule E3: pods that number it differently stand in different slices."""
    containers = "containers: [{{ports: [{{name: http, containerPort: {}}}]}}]"
    state = apply(
        web(ports=[{"name": "http", "port": 80, "targetPort": "http"}]),
        pod("a", ips="10.0.0.1", spec=containers.format(8080)),
        pod("b", ips="10.0.0.2", spec=containers.format(9090)),
        pod("c", ips="10.0.0.3", spec=containers.format(8080)),
        pod("d", ips="10.0.0.4", spec="containers: [{ports: [{containerPort: 80}]}]"),
    )
    found = {
        item.ports[0].port: [e.address for e in item.endpoints]
        for item in state.slices[named("web")]
    }
    assert found == {8080: ["10.0.0.1", "10.0.0.3"], 9090: ["10.0.0.2"]}


def test_a_named_port_is_looked_up_with_its_protocol() -> None:
    """A DNS server may use one name for TCP and UDP; sidecars count, init containers do not."""
    text = web(
        ports=[
            {"name": "u", "port": 53, "protocol": "UDP", "targetPort": "dns"},
            {"name": "t", "port": 53, "targetPort": "dns"},
            {"name": "gone", "port": 54, "targetPort": "init"},
        ]
    )
    spec = (
        "containers: [{ports: [{name: dns, containerPort: 1053, protocol: UDP}]}],"
        "initContainers: [{ports: [{name: init, containerPort: 1}]},"
        "{restartPolicy: Always, ports: [{name: dns, containerPort: 2053}]}]"
    )
    ((found,),) = apply(text, pod(spec=spec)).slices.values()
    assert found.ports == (
        EndpointPort("u", Protocol.UDP, 1053),
        EndpointPort("t", Protocol.TCP, 2053),
    )


@pytest.mark.parametrize(
    ("ready", "terminating", "publish", "expected"),
    [
        (True, False, False, (True, True, False)),
        (False, False, False, (False, False, False)),
        (True, True, False, (False, True, True)),
        (False, True, False, (False, False, True)),
        (False, False, True, (True, False, False)),
        (True, True, True, (True, True, True)),
    ],
)
def test_conditions_follow_the_pods(
    ready: bool, terminating: bool, publish: bool, expected: tuple[bool, bool, bool]
) -> None:
    """Rule E11: (ready, serving, terminating); publishNotReadyAddresses forces ready."""
    meta = "deletionTimestamp: 2026-01-01T00:00:00Z" if terminating else ""
    (found,) = endpoints(web(publishNotReadyAddresses=publish), pod(ready=ready, meta=meta))
    assert (found.ready, found.serving, found.terminating) == expected


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_finished_pod_is_no_endpoint(phase: str) -> None:
    assert addresses(web(), pod(phase=phase)) == []


def test_a_pod_without_status_is_no_endpoint() -> None:
    text = "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: web}}}"
    assert addresses(web(), text) == []


def test_a_pod_without_conditions_is_not_ready() -> None:
    text = (
        "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: web}},"
        " status: {podIP: 10.0.0.1}}"
    )
    (found,) = endpoints(web(), text)
    assert (found.address, found.ready, found.serving) == ("10.0.0.1", False, False)


def test_a_pod_in_the_hosts_network_has_the_hosts_addresses() -> None:
    """Also where the manifest does not repeat them; other pods never do."""
    text = (
        "{{apiVersion: v1, kind: Pod, metadata: {{name: a, labels: {{app: web}}}},"
        " spec: {{hostNetwork: {}}}, status: {{hostIP: 192.168.0.1,"
        " hostIPs: [{{ip: 192.168.0.1}}, {{ip: 'fd00::1'}}]}}}}"
    )
    dual = web(ipFamilyPolicy="RequireDualStack")
    assert addresses(dual, text.format("true")) == ["192.168.0.1", "fd00::1"]
    assert addresses(dual, text.format("false")) == []


@pytest.mark.parametrize(
    ("distribution", "zones", "nodes"),
    [
        (None, [[], []], [[], []]),
        ("PreferClose", [["a"], []], [[], []]),
        ("PreferSameZone", [["a"], []], [[], []]),
        ("PreferSameNode", [["a"], []], [["node1"], ["node2"]]),
    ],
)
def test_traffic_distribution_becomes_hints(
    distribution: str | None, zones: list[list[str]], nodes: list[list[str]]
) -> None:
    """Rule E12: each ready endpoint's own zone, none where it is unknown, and its node."""
    node = (
        "{apiVersion: v1, kind: Node,"
        " metadata: {name: node1, labels: {topology.kubernetes.io/zone: a}}}"
    )
    spec = {"trafficDistribution": distribution} if distribution else {}
    found = endpoints(
        web(**spec),
        node,
        pod("a", ips="10.0.0.1"),
        pod("b", ips="10.0.0.2", spec="nodeName: node2"),
        pod("c", ips="10.0.0.3", ready=False),
    )
    assert [sorted(each.zone_hints) for each in found] == [*zones, []]
    assert [sorted(each.node_hints) for each in found] == [*nodes, []]


def test_slices_written_by_hand_stand_beside_made_ones() -> None:
    """As in a cluster, where whoever labels a slice with the name adds to the Service."""
    text = """
    apiVersion: discovery.k8s.io/v1
    kind: EndpointSlice
    metadata: {name: web-extra, labels: {kubernetes.io/service-name: web}}
    addressType: IPv4
    ports: [{port: 80}]
    endpoints: [{addresses: [10.9.9.9]}]
    """
    assert addresses(web(), pod(), text) == ["10.9.9.9", "10.0.0.1"]


def test_the_same_address_and_ports_are_remade_only_on_change() -> None:
    """A slice whose pods did not change is the same object (the planner skips by identity)."""
    cluster = Cluster()
    other = service("other", selector={"app": "other"})
    texts = [web(), pod("a"), other, pod("b", ips="10.0.0.2", labels="app: other")]
    before = cluster.apply(*texts).slices
    texts[3] = texts[3].replace("10.0.0.2", "10.0.0.3")
    # Files are read anew here: objects differ, values do not.
    after = cluster.apply(*texts).slices
    assert after[named("web")] == before[named("web")]
    assert after[named("other")] != before[named("other")]
