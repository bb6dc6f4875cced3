"""What the API server's objects mean: rules F1-F18, E1-E8, N1, N5, N6, W4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ebpf_svc.model.endpoint import Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import Service, ServiceName, ServicePort, ServiceType, TrafficPolicy
from ebpf_svc.model.snapshot import NodeFacts
from ebpf_svc.watch.faults import Faults
from ebpf_svc.watch.kube.convert import node_of, service_cidrs_of, service_of, slice_of
from tests.lib import apiserver as api

WEB = Service(
    name=ServiceName("shop", "web"),
    type=ServiceType.CLUSTER_IP,
    ports=(ServicePort("p80", Protocol.TCP, 80),),
    cluster_ips=("10.96.0.10",),
)
DUAL = {"clusterIPs": ["10.96.0.10", "fd00::10"], "ipFamilies": ["IPv4", "IPv6"]}


def convert(item: Any) -> tuple[Service, list[str]]:
    faults = Faults()
    return service_of(item, faults), [fault.field for fault in faults]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({}, WEB, id="plain"),
        pytest.param({"clusterIP": "None"}, replace(WEB, cluster_ips=()), id="F1-headless"),
        pytest.param({"clusterIP": ""}, replace(WEB, cluster_ips=()), id="F1-not-yet"),
        pytest.param(
            {"type": "ExternalName"},
            replace(WEB, type=ServiceType.EXTERNAL_NAME, cluster_ips=()),
            id="F2-external-name",
        ),
        pytest.param(DUAL, replace(WEB, cluster_ips=("10.96.0.10", "fd00::10")), id="F3-both"),
        pytest.param({**DUAL, "ipFamilies": ["IPv4"]}, WEB, id="F3-family-absent"),
        pytest.param({**DUAL, "clusterIPs": ["10.96.0.10"]}, WEB, id="F3-address-absent"),
        pytest.param({"ipFamilies": None, "clusterIPs": None}, WEB, id="F4-old-object"),
        pytest.param(
            {
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "nodePort": 30053},
                    {"port": 99, "protocol": "SCTP", "targetPort": "named", "appProtocol": "x"},
                ]
            },
            replace(
                WEB,
                ports=(
                    ServicePort("dns", Protocol.UDP, 53, 30053),
                    ServicePort("dns-tcp", Protocol.TCP, 53, 30053),
                    ServicePort("", Protocol.SCTP, 99),
                ),
            ),
            id="F5-F7-ports",
        ),
        pytest.param(
            {"externalIPs": ["203.0.113.1", "", " 2001:DB8::1 "]},
            replace(WEB, external_ips=("203.0.113.1", "2001:db8::1")),
            id="F8-external-ips",
        ),
        pytest.param(
            {
                "type": "LoadBalancer",
                "status": [
                    {"ip": "192.0.2.1"},
                    {"ip": "192.0.2.2", "ipMode": "VIP"},
                    {"ip": "192.0.2.3", "ipMode": "Proxy"},
                    {"hostname": "lb.example", "ports": [{"port": 80}]},
                ],
            },
            replace(
                WEB, type=ServiceType.LOAD_BALANCER, load_balancer_ips=("192.0.2.1", "192.0.2.2")
            ),
            id="F9-ip-mode",
        ),
        pytest.param(
            {"loadBalancerSourceRanges": [" 10.0.0.1/8 ", "fd00::/8", "010.000.0.0/8"]},
            replace(WEB, source_ranges=("10.0.0.0/8", "fd00::/8")),
            id="F10-F17-ranges",
        ),
        pytest.param({"sessionAffinity": "ClientIP"}, replace(WEB, affinity_s=10800), id="F12"),
        pytest.param(
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            },
            replace(WEB, affinity_s=60),
            id="F12-timeout",
        ),
        pytest.param(
            {"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"},
            replace(WEB, internal_policy=TrafficPolicy.LOCAL, external_policy=TrafficPolicy.LOCAL),
            id="F13-F14-policies",
        ),
        pytest.param({"internalTrafficPolicy": None}, WEB, id="F13-unset"),
        pytest.param(
            {"healthCheckNodePort": 30999}, replace(WEB, health_check_node_port=30999), id="F15"
        ),
        pytest.param(
            {"clusterIP": "010.096.0.010", "clusterIPs": ["010.096.0.010"]}, WEB, id="F17-zeros"
        ),
        pytest.param({"trafficDistribution": "PreferClose", "selector": {"a": "b"}}, WEB, id="F6"),
    ],
)
def test_service_spec_means_what_kube_proxy_reads(spec: dict[str, Any], expected: Service) -> None:
    """F1-F17: each field, alone."""
    assert convert(api.service("shop/web", **spec)) == (expected, [])


@pytest.mark.parametrize(
    ("spec", "expected", "field"),
    [
        ({"externalIPs": ["x", "192.0.2.9"]}, {"external_ips": ("192.0.2.9",)}, "spec.externalIPs"),
        ({"loadBalancerSourceRanges": ["10.0.0.0/33"]}, {}, "spec.loadBalancerSourceRanges"),
        ({"status": [{"ip": "300.0.0.1"}]}, {}, "status.loadBalancer.ingress"),
        (
            {"ports": [{"port": 80, "name": "p80"}, {"port": 81, "protocol": "QUIC"}]},
            {},
            "spec.ports[1].protocol",
        ),
        ({"ports": [{"port": 80, "name": "p80"}, {"port": 0}]}, {}, "spec.ports[1].port"),
        (
            {"ports": [{"port": 80, "name": "p80", "nodePort": 70000}]},
            {},
            "spec.ports[0].nodePort",
        ),
        ({"healthCheckNodePort": -1}, {}, "spec.healthCheckNodePort"),
        (
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10**10}},
            },
            {"affinity_s": 10800},
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
        ),
        (
            {"clusterIPs": ["10.96.0.10", "10.96.0.11"], "ipFamilies": ["IPv4", "IPv6"]},
            {},
            "spec.clusterIPs[1]",
        ),
        ({"type": "Mystery"}, {}, "spec.type"),
    ],
)  # fmt: skip
def test_service_with_one_wrong_field_is_served_without_it(
    spec: dict[str, Any], expected: dict[str, Any], field: str
) -> None:
    """F8-F10, F17: what cannot be parsed is left out and named; the rest counts."""
    assert convert(api.service("shop/web", **spec)) == (replace(WEB, **expected), [field])


def convert_slice(item: Any) -> tuple[EndpointSlice | None, list[str]]:
    faults = Faults()
    return slice_of(item, faults), [fault.field for fault in faults]


def endpoints_of(*entries: dict[str, Any], kind: str = "IPv4") -> tuple[list[Endpoint], list[str]]:
    item = api.endpoint_slice("shop/web-a", endpoints=list(entries), addressType=kind)
    found, faults = convert_slice(item)
    assert found is not None
    return list(found.endpoints), faults


def test_slice_belongs_to_the_service_its_label_names() -> None:
    """E1, E3, E4."""
    item = api.endpoint_slice("shop/web-a", "10.244.2.1", of="web")
    assert convert_slice(item) == (
        EndpointSlice(
            namespace="shop",
            name="web-a",
            service_name=ServiceName("shop", "web"),
            family=Family.V4,
            ports=(EndpointPort("p80", Protocol.TCP, 8080),),
            endpoints=(Endpoint("10.244.2.1", node_name="node2"),),
        ),
        [],
    )


def test_slice_without_service_name_is_ignored() -> None:
    """E1: silently, it is somebody else's."""
    assert convert_slice(api.endpoint_slice("shop/x", "10.0.0.1", labels={})) == (None, [])
    assert convert_slice(api.endpoint_slice("shop/x", "10.0.0.1", labels=None, of="")) == (None, [])


def test_slice_of_names_is_refused() -> None:
    """E2, M2: FQDN is no family; the operator is told."""
    item = api.endpoint_slice("shop/x", addressType="FQDN")
    assert convert_slice(item) == (None, ["addressType"])


@pytest.mark.parametrize(
    ("ports", "expected", "field"),
    [
        ([{"name": "", "port": 1, "protocol": "UDP"}], ("", Protocol.UDP, 1), None),
        ([{"name": "a", "port": 1}], ("a", Protocol.TCP, 1), None),
        ([{"port": 1}], None, "ports[0].name"),
        ([{"name": None, "port": 1}], None, "ports[0].name"),
        ([{"name": "a"}], None, None),
        ([{"name": "a", "port": 0}], None, None),
        ([{"name": "a", "port": 65536}], None, "ports[0].port"),
        ([{"name": "a", "port": 1, "protocol": "QUIC"}], None, "ports[0].protocol"),
    ],
)
def test_slice_ports_need_a_name_and_a_number(
    ports: list[dict[str, Any]], expected: tuple[str, Protocol, int] | None, field: str | None
) -> None:
    """E3: the empty name is one; no name at all is an error; no number is none."""
    found, faults = convert_slice(api.endpoint_slice("shop/web-a", "10.0.0.1", ports=ports))
    assert found is not None
    assert (found.ports, faults) == ((expected,) if expected else (), [field] if field else [])


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (None, (True, True, False)),
        ({}, (True, True, False)),
        ({"ready": None, "serving": None, "terminating": None}, (True, True, False)),
        ({"ready": False}, (False, True, False)),
        ({"ready": False, "serving": False, "terminating": True}, (False, False, True)),
        ({"ready": True, "serving": True, "terminating": True}, (True, True, True)),
    ],
)
def test_conditions_not_given_have_their_own_defaults(
    conditions: dict[str, Any] | None, expected: tuple[bool, bool, bool]
) -> None:
    """E5: serving unset is true, not "as ready"; E11: ready may be true while terminating."""
    ((found,), _) = endpoints_of({"addresses": ["10.0.0.1"], "conditions": conditions})
    assert (found.ready, found.serving, found.terminating) == expected


def test_only_the_first_address_of_an_endpoint_is_used() -> None:
    """E4, F17: canonical, the others unread."""
    found, faults = endpoints_of({"addresses": ["010.0.0.1", "nonsense"]}, {"addresses": []}, {})
    assert found == [Endpoint("10.0.0.1")]
    assert faults == ["endpoints[1].addresses", "endpoints[2].addresses"]


@pytest.mark.parametrize(
    ("kind", "address"), [("IPv4", "fd00::1"), ("IPv6", "10.0.0.1"), ("IPv4", "x"), ("IPv6", "")]
)
def test_endpoint_of_the_wrong_family_is_skipped(kind: str, address: str) -> None:
    """E2: and named; its neighbours count."""
    good = "10.0.0.2" if kind == "IPv4" else "FD00::2"
    found, faults = endpoints_of({"addresses": [address]}, {"addresses": [good]}, kind=kind)
    assert (found, faults) == ([Endpoint(good.lower())], ["endpoints[0].addresses[0]"])


def test_node_and_hints_of_an_endpoint() -> None:
    """E6, E7: what is empty is unknown; zone, hostname and targetRef are not read."""
    found, _ = endpoints_of(
        {
            "addresses": ["10.0.0.1"],
            "nodeName": "node9",
            "zone": "zone-b",
            "hostname": "pod-0",
            "targetRef": {"kind": "Pod", "name": 7},
            "hints": {"forZones": [{"name": "zone-a"}, {"name": "zone-b"}], "forNodes": []},
        },
        {"addresses": ["10.0.0.2"], "hints": {"forNodes": [{"name": "node1"}]}, "nodeName": None},
        {"addresses": ["10.0.0.3"], "hints": None},
    )
    assert found == [
        Endpoint("10.0.0.1", node_name="node9", zone_hints=frozenset({"zone-a", "zone-b"})),
        Endpoint("10.0.0.2", node_hints=frozenset({"node1"})),
        Endpoint("10.0.0.3"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-01T00:00:00Z", 1767225600.0),
        ("2026-01-01T00:00:00.5Z", 1767225600.5),
        ("2026-01-01T00:00:00.123456789Z", 1767225600.123456),
        ("2026-01-01T01:00:00+01:00", 1767225600.0),
        ("yesterday", 0.0),
        ("0001-01-01T00:00:00", 0.0),
        ("9999-12-31T23:59:59", pytest.approx(253402300799, abs=90000)),
        ("", 0.0),
    ],
)
def test_trigger_time_is_seconds_since_the_epoch(text: str, expected: Any) -> None:
    """E10: RFC 3339, nanoseconds and all; unreadable = not given."""
    item = api.endpoint_slice("shop/web-a", "10.0.0.1")
    item["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": text}
    found, _ = convert_slice(item)
    assert found is not None
    if isinstance(expected, float):
        expected = pytest.approx(expected, abs=1e-6)
    assert found.trigger_time_s == expected


def test_slices_share_what_they_have_in_common() -> None:
    """Memory: ten thousand slices with the same ports, nodes and hints hold one of each."""
    first, second = (
        convert_slice(
            api.endpoint_slice(
                f"shop/web-{i}",
                endpoints=[
                    {
                        "addresses": [f"10.0.0.{i}"],
                        "nodeName": "".join(("node", "2")),
                        "hints": {"forZones": [{"name": "zone-a"}]},
                    }
                ],
            )
        )[0]
        for i in range(2)
    )
    assert first is not None and second is not None
    assert first.ports is second.ports
    assert first.endpoints[0].node_name is second.endpoints[0].node_name
    assert first.endpoints[0].zone_hints is second.endpoints[0].zone_hints


def convert_node(item: Any) -> tuple[NodeFacts, list[str]]:
    faults = Faults()
    return node_of(item, faults), [fault.field for fault in faults]


def test_node_addresses_are_internal_before_external() -> None:
    """N1: the order within each kind stays; host names are no addresses."""
    item = api.node()
    item["status"]["addresses"] = [
        {"type": "ExternalIP", "address": "203.0.113.7"},
        {"type": "Hostname", "address": "node1"},
        {"type": "InternalIP", "address": "fd00::7"},
        {"type": "InternalIP", "address": "192.168.0.7"},
        {"type": "InternalIP", "address": "?"},
        {"type": "InternalDNS", "address": "node1.local"},
    ]
    assert convert_node(item) == (
        NodeFacts(
            "node1",
            addresses=("fd00::7", "192.168.0.7", "203.0.113.7"),
            zone="zone-a",
            pod_cidrs=("10.244.1.0/24",),
        ),
        ["status.addresses"],
    )


def test_node_not_yet_filled_in_has_nothing() -> None:
    """N1, N5: a Node is registered before its addresses, CIDRs and zone are known."""
    item = {"metadata": {"name": "node1", "labels": None}, "spec": {}, "status": {}}
    assert convert_node(item) == (NodeFacts("node1"), [])
    only = {"metadata": {"name": "node1"}, "spec": {"podCIDR": "10.244.7.0/24"}}
    assert convert_node(only)[0].pod_cidrs == ("10.244.7.0/24",)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (api.node(), True),
        (api.node(taints=[{"key": "node.kubernetes.io/unschedulable"}]), True),
        (api.node(taints=[{"key": "ToBeDeletedByClusterAutoscaler"}]), False),
        ({"metadata": {"name": "n", "deletionTimestamp": "2026-09-01T10:00:00Z"}}, False),
    ],
)
def test_node_about_to_go_is_not_eligible(item: Any, expected: bool) -> None:
    """N6."""
    assert convert_node(item)[0].eligible is expected


def test_service_cidr_gives_its_prefixes() -> None:
    """W4."""
    faults = Faults()
    item: Any = {"metadata": {"name": "a"}, "spec": {"cidrs": ["10.96.0.0/16", "x", "FD00::/112"]}}
    assert service_cidrs_of(item, faults) == ("10.96.0.0/16", "fd00::/112")
    assert [fault.field for fault in faults] == ["spec.cidrs"]
