"""From bytes to values: objects as real servers return them, and as none would."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.model.endpoint import Endpoint, EndpointPort
from ebpf_svc.model.net import Protocol
from ebpf_svc.model.service import ServiceName, ServicePort, ServiceType, TrafficPolicy
from ebpf_svc.watch.kube import resources
from ebpf_svc.watch.kube.decode import read_line, read_page
from ebpf_svc.watch.kube.failures import Broken, Expired, Refused

SERVICES, SLICES, NODES = resources.services(""), resources.slices(), resources.node("node1")
ALL = [SERVICES, SLICES, NODES, resources.service_cidrs()]

RECORDED_SERVICE: dict[str, Any] = {
    "kind": "Service",
    "apiVersion": "v1",
    "metadata": {
        "name": "ingress-nginx",
        "namespace": "edge",
        "uid": "3b0c2b0c-5f3e-4a57-b0b1-0a5ad1f8a5b1",
        "resourceVersion": "812345",
        "generation": None,
        "creationTimestamp": "2026-09-01T10:00:00Z",
        "deletionGracePeriodSeconds": None,
        "labels": {"app.kubernetes.io/name": "ingress-nginx"},
        "annotations": None,
        "finalizers": ["service.kubernetes.io/load-balancer-cleanup"],
        "ownerReferences": None,
        "managedFields": [
            {
                "manager": "cloud-controller-manager",
                "operation": "Update",
                "apiVersion": "v1",
                "time": "2026-09-01T10:00:07Z",
                "fieldsType": "FieldsV1",
                "fieldsV1": {"f:status": {"f:loadBalancer": {"f:ingress": {}}}},
                "subresource": "status",
            }
        ],
        "aFieldOf2031": {"x": [1, 2.5e300, None]},
    },
    "spec": {
        "ports": [
            {
                "name": "http",
                "protocol": "TCP",
                "appProtocol": "http",
                "port": 80,
                "targetPort": "http",
                "nodePort": 31080,
                "aFieldOf2031": True,
            },
            {"name": "quic", "protocol": "UDP", "port": 443, "targetPort": 8443, "nodePort": 31443},
        ],
        "selector": {"app": "ingress-nginx"},
        "clusterIP": "10.96.7.7",
        "clusterIPs": ["10.96.7.7", "fd00:10:96::7"],
        "type": "LoadBalancer",
        "externalIPs": None,
        "loadBalancerIP": "",
        "loadBalancerSourceRanges": ["203.0.113.0/24"],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}},
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 32007,
        "publishNotReadyAddresses": False,
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "PreferDualStack",
        "allocateLoadBalancerNodePorts": True,
        "loadBalancerClass": "example.com/lb",
        "internalTrafficPolicy": "Cluster",
        "trafficDistribution": "PreferSameZone",
    },
    "status": {
        "conditions": [{"type": "LoadBalancerPortsError", "status": "False"}],
        "loadBalancer": {
            "ingress": [
                {"ip": "198.51.100.4", "ipMode": "VIP", "ports": [{"port": 80, "protocol": "TCP"}]},
                {"hostname": "lb.example.com"},
            ]
        },
    },
}
RECORDED_SLICE: dict[str, Any] = {
    "kind": "EndpointSlice",
    "apiVersion": "discovery.k8s.io/v1",
    "metadata": {
        "name": "web-abc12",
        "generateName": "web-",
        "namespace": "shop",
        "resourceVersion": "99",
        "labels": {
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": "web",
        },
        "annotations": {
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-09-01T10:00:00.987654321Z"
        },
        "managedFields": [],
    },
    "addressType": "IPv4",
    "endpoints": [
        {
            "addresses": ["10.244.2.17"],
            "conditions": {"ready": False, "serving": True, "terminating": True},
            "deprecatedTopology": {"rack": "7"},
            "hints": {"forZones": [{"name": "zone-a"}], "forNodes": None},
            "nodeName": "node2",
            "targetRef": {"kind": "Pod", "namespace": "shop", "name": "web-0", "uid": "u"},
            "zone": "zone-a",
        }
    ],
    "ports": [{"name": "", "port": 8080, "protocol": "TCP", "appProtocol": None}],
}


def line(verb: str, item: Any) -> bytes:
    return json.dumps({"type": verb, "object": item}).encode()


def page(*items: Any, **meta: Any) -> bytes:
    return json.dumps({"kind": "List", "metadata": meta, "items": items}).encode()


def test_service_as_a_real_server_returns_it() -> None:
    """F1-F18: managedFields, nulls and fields of the future are no matter."""
    found = read_line(SERVICES, line("MODIFIED", RECORDED_SERVICE))
    service = found.reading.value
    assert service is not None
    assert (found.version, found.reading.problems) == ("812345", ())
    assert service.name == ServiceName("edge", "ingress-nginx")
    assert service.type is ServiceType.LOAD_BALANCER
    assert service.ports == (
        ServicePort("http", Protocol.TCP, 80, 31080),
        ServicePort("quic", Protocol.UDP, 443, 31443),
    )
    assert service.cluster_ips == ("10.96.7.7", "fd00:10:96::7")
    assert service.load_balancer_ips == ("198.51.100.4",)
    assert service.source_ranges == ("203.0.113.0/24",)
    assert (service.affinity_s, service.health_check_node_port) == (10800, 32007)
    assert (service.internal_policy, service.external_policy) == (
        TrafficPolicy.CLUSTER,
        TrafficPolicy.LOCAL,
    )


def test_slice_as_a_real_server_returns_it() -> None:
    """E1-E10."""
    slice_ = read_line(SLICES, line("ADDED", RECORDED_SLICE)).reading.value
    assert slice_ is not None
    assert slice_.endpoints == (
        Endpoint(
            "10.244.2.17",
            ready=False,
            serving=True,
            terminating=True,
            node_name="node2",
            zone_hints=frozenset({"zone-a"}),
        ),
    )
    assert slice_.ports == (EndpointPort("", Protocol.TCP, 8080),)
    assert slice_.trigger_time_s == pytest.approx(1788256800.987654)


@pytest.mark.parametrize("empty", [None, []])
def test_slice_without_anything_in_it_is_one(empty: Any) -> None:
    """A Service scaled to zero: endpoints and ports are null."""
    item = {**RECORDED_SLICE, "endpoints": empty, "ports": empty}
    slice_ = read_line(SLICES, line("MODIFIED", item)).reading.value
    assert slice_ is not None
    assert (slice_.endpoints, slice_.ports) == ((), ())


def test_page_tells_how_to_go_on() -> None:
    """Items of a list say no kind."""
    more = {"continue": "t", "resourceVersion": "7", "remainingItemCount": 3}
    meta, readings = read_page(SERVICES, page(RECORDED_SERVICE, **more))
    assert (meta.get("resourceVersion"), meta.get("continue")) == ("7", "t")
    assert [reading.key for reading in readings] == [("edge", "ingress-nginx")]
    assert list(read_page(SERVICES, page())[1]) == []
    assert list(read_page(SERVICES, b'{"metadata":null,"items":null}')[1]) == []


def test_wrong_object_among_right_ones_is_the_only_one_named() -> None:
    """Skipped and named, by kind, namespace, name and field."""
    wrong = json.loads(json.dumps(RECORDED_SERVICE))
    wrong["metadata"]["name"] = "wrong"
    wrong["spec"]["ports"][1]["nodePort"] = "31443"
    readings = list(read_page(SERVICES, page(RECORDED_SERVICE, wrong, 5, RECORDED_SERVICE))[1])
    assert [(r.key, r.is_broken) for r in readings] == [
        (("edge", "ingress-nginx"), False),
        (("edge", "wrong"), True),
        (("", ""), True),
        (("edge", "ingress-nginx"), False),
    ]
    assert str(readings[1].problems[0]) == (
        'Service edge/wrong: spec.ports[1].nodePort: Invalid value: "31443": must be an integer'
    )


def test_error_event_says_whether_to_list() -> None:
    """410 expires the version; anything else is a refusal."""
    gone = {"kind": "Status", "status": "Failure", "reason": "Expired", "code": 410, "message": "m"}
    for resource in ALL:
        with pytest.raises(Expired, match="m"):
            read_line(resource, line("ERROR", gone))
        with pytest.raises(Refused, match="504"):
            read_line(resource, line("ERROR", {**gone, "code": 504}))
        with pytest.raises(Refused, match="500"):
            read_line(resource, line("ERROR", {"status": {"odd": 1}, "code": "x"}))


def test_bookmark_carries_a_version_and_the_end_of_a_list() -> None:
    """Also with the empty fields a real server sends along."""
    meta = {"resourceVersion": "12", "creationTimestamp": None}
    item: dict[str, Any] = {"kind": "Service", "metadata": meta, "spec": {}, "status": {}}
    found = read_line(SERVICES, line("BOOKMARK", item))
    assert (found.verb, found.version, found.ends_list) == ("BOOKMARK", "12", False)
    item["metadata"] = {**meta, "annotations": {"k8s.io/initial-events-end": "true"}}
    assert read_line(SERVICES, line("BOOKMARK", item)).ends_list
    item = {"metadata": meta, "addressType": "", "endpoints": None, "ports": None}
    assert read_line(SLICES, line("BOOKMARK", item)).version == "12"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@st.composite
def mutilated(draw: st.DrawFn, item: dict[str, Any]) -> Any:
    """A real object with parts replaced by anything, or left out."""
    item = json.loads(json.dumps(item))
    for _ in range(draw(st.integers(1, 3))):
        part: Any = item
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = part[key]
            if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
                part = inner
                continue
            if draw(st.booleans()):
                part[key] = draw(JSON)
            elif isinstance(part, dict):
                del part[key]
            break
    return item


NODE = {
    "metadata": {"name": "node1", "labels": {"topology.kubernetes.io/zone": "z"}},
    "spec": {"podCIDRs": ["10.0.0.0/24"], "podCIDR": "10.0.0.0/24", "taints": [{"key": "k"}]},
    "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]},
}
CIDR = {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}}


@pytest.mark.parametrize(
    ("resource", "item"),
    list(zip(ALL, [RECORDED_SERVICE, RECORDED_SLICE, NODE, CIDR], strict=True)),
    ids=["service", "slice", "node", "cidr"],
)
def test_no_object_whatsoever_breaks_the_reader(resource: Any, item: dict[str, Any]) -> None:
    """Any JSON in any field is read or named, never raised; a line and a page agree on it."""

    @settings(max_examples=150, deadline=None)
    @given(mutilated(item))
    def check(item: Any) -> None:
        (listed,) = read_page(resource, page(item))[1]
        watched = read_line(resource, line("ADDED", item)).reading
        assert watched == listed
        assert (not listed.is_broken) or (listed.problems and listed.value is None)

    check()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_line_whatsoever_breaks_the_reader(text: bytes) -> None:
    """What is no event raises what the reflector expects, and nothing else."""
    for resource in ALL:
        with suppress(Broken, Expired, Refused):
            read_line(resource, text)
        with suppress(Broken):
            list(read_page(resource, text)[1])
