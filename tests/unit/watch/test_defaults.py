"""What the control plane adds to a Service's manifest."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ebpf_svc.model.net import Protocol, family_of
from ebpf_svc.model.service import ServicePort, ServiceType, TrafficPolicy
from tests.unit.watch.cluster import CIDRS, Cluster, apply, named, only_service, service, told

POD = """
apiVersion: v1
kind: Pod
metadata: {name: a, labels: {app: web}}
status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: "True"}]}
"""


def families(**spec: object) -> list[int]:
    return [int(family_of(a)) for a in only_service(apply(service(**spec))).cluster_ips]  # type: ignore[arg-type]


def test_a_service_that_says_only_its_port_gets_the_defaults() -> None:
    """Namespace default, type ClusterIP, TCP, no affinity, policies Cluster, one cluster IP."""
    found = only_service(apply(service("web")))
    assert found.name == named("web")
    assert found.type is ServiceType.CLUSTER_IP
    assert found.ports == (ServicePort("", Protocol.TCP, 80, 0),)
    assert found.affinity_s == 0
    assert found.internal_policy is found.external_policy is TrafficPolicy.CLUSTER
    assert len(found.cluster_ips) == 1


def test_null_is_the_same_as_nothing() -> None:
    """As in Go, where a missing field and a null one are one."""
    text = """
    apiVersion: v1
    kind: Service
    metadata: {name: web, namespace: null, labels: null}
    spec: {type: null, selector: null, clusterIP: null, externalIPs: null, sessionAffinity: null,
           ports: [{port: 80, targetPort: null, protocol: null, name: null, nodePort: null}]}
    status: null
    """
    assert only_service(apply(text)) == only_service(apply(service("web")))


def test_the_target_port_defaults_to_the_port() -> None:
    state = apply(service("web", selector={"app": "web"}), POD)
    ((found,),) = state.slices.values()
    assert [port.port for port in found.ports] == [80]


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        ({}, 10800),
        ({"sessionAffinityConfig": {}}, 10800),
        ({"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}}}, 1),
        ({"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86400}}}, 86400),
    ],
)
def test_affinity_lasts_three_hours_unless_said(config: dict[str, Any], seconds: int) -> None:
    """Rule F12."""
    found = only_service(apply(service(sessionAffinity="ClientIP", **config)))
    assert found.affinity_s == seconds


def test_a_service_has_one_family_unless_it_asks() -> None:
    """SingleStack is the default, and the first service range's family the one."""
    assert families() == [4]
    six_first = Cluster(cidrs=CIDRS[::-1])
    assert family_of(only_service(six_first.apply(service())).cluster_ips[0]) == 6


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"ipFamilyPolicy": "RequireDualStack"}, [4, 6]),
        ({"ipFamilyPolicy": "PreferDualStack"}, [4, 6]),
        ({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6"]}, [6, 4]),
        ({"ipFamilies": ["IPv6"]}, [6]),
        ({"clusterIP": "fd00:10:96::9"}, [6]),
        ({"clusterIP": "fd00:10:96::9", "ipFamilyPolicy": "PreferDualStack"}, [6, 4]),
    ],
)
def test_families_come_in_the_order_asked_for(spec: dict[str, Any], expected: list[int]) -> None:
    """The primary family is the first of ipFamilies, of clusterIPs, of the ranges (F3, F4)."""
    assert families(**spec) == expected


def test_prefer_dual_stack_is_content_with_one() -> None:
    single = Cluster(cidrs=("10.96.0.0/16",))
    found = only_service(single.apply(service(ipFamilyPolicy="PreferDualStack")))
    assert len(found.cluster_ips) == 1


@pytest.mark.parametrize(
    "spec",
    [
        {"clusterIP": "None"},
        {"clusterIP": "None", "ports": []},
        {"clusterIP": "None", "selector": {"app": "web"}, "ipFamilyPolicy": "RequireDualStack"},
        {"type": "ExternalName", "externalName": "db.example.com.", "ports": []},
    ],
)
def test_headless_and_external_name_services_get_nothing(spec: dict[str, Any]) -> None:
    """They are DNS only (F1, F2, F19): no address, no slices."""
    state = apply(service(**spec), POD)
    assert only_service(state).cluster_ips == ()
    assert state.slices == {}


def test_another_proxys_service_is_left_alone_but_keeps_its_address() -> None:
    """Rule F16: any value of the label, and nobody else may be given its cluster IP."""
    foreign = """
    apiVersion: v1
    kind: Service
    metadata: {name: mesh, labels: {service.kubernetes.io/service-proxy-name: ""}}
    spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}
    """
    state = apply(foreign, service("web", clusterIP="10.96.0.9"))
    assert state.services == {}
    assert told(state.problems)[0][0] == "spec.clusterIPs"


def test_addresses_are_stored_in_canonical_form() -> None:
    """Rule F17: leading zeros are decimal, IPv6 is compressed, mapped IPv4 is IPv4."""
    found = only_service(
        apply(
            service(
                clusterIP="10.96.000.010",
                externalIPs=["FD00:0:0::0A", "::ffff:198.51.100.1"],
                type="LoadBalancer",
                loadBalancerSourceRanges=[" 10.1.2.3/8 ", "FD00::1/64"],
            )
        )
    )
    assert found.cluster_ips == ("10.96.0.10",)
    assert found.external_ips == ("fd00::a", "198.51.100.1")
    assert found.source_ranges == ("10.0.0.0/8", "fd00::/64")


def test_ingress_addresses_count_where_their_mode_is_vip() -> None:
    """Rule F9: unset is VIP, Proxy is none of ours, host names are ignored."""
    text = """
    apiVersion: v1
    kind: Service
    metadata: {name: web}
    spec: {type: LoadBalancer, ports: [{port: 80}]}
    status:
      loadBalancer:
        ingress:
        - {ip: 198.51.100.1}
        - {ip: 198.51.100.2, ipMode: VIP}
        - {ip: 198.51.100.3, ipMode: Proxy}
        - {hostname: lb.example.com}
        - {ip: "2001:db8::1", ports: [{port: 80, protocol: TCP}]}
    """
    expected = ("198.51.100.1", "198.51.100.2", "2001:db8::1")
    assert only_service(apply(text)).load_balancer_ips == expected


def test_policies_are_taken_over() -> None:
    found = only_service(
        apply(
            service(type="NodePort", externalTrafficPolicy="Local", internalTrafficPolicy="Local")
        )
    )
    assert found.external_policy is found.internal_policy is TrafficPolicy.LOCAL


def test_an_external_ip_makes_a_cluster_ip_service_accessible() -> None:
    """Rule F14: its external policy counts."""
    spec: dict[str, Any] = {"externalIPs": ["198.51.100.1"], "externalTrafficPolicy": "Local"}
    assert only_service(apply(service(**spec))).external_policy is TrafficPolicy.LOCAL


def test_node_facts_are_those_of_the_own_node() -> None:
    """Rules N1, N5: InternalIPs before ExternalIPs, other types left out."""
    state = apply(
        """
        apiVersion: v1
        kind: Node
        metadata: {name: node1, labels: {topology.kubernetes.io/zone: a}}
        spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, "fd00:244:1::/64"]}
        status:
          addresses:
          - {type: ExternalIP, address: 198.51.100.11}
          - {type: Hostname, address: node1}
          - {type: InternalIP, address: 192.168.0.11}
          - {type: InternalIP, address: "fd00::11"}
        ---
        {apiVersion: v1, kind: Node, metadata: {name: node2}, spec: {podCIDR: 10.244.2.0/24}}
        """
    )
    assert state.node.addresses == ("192.168.0.11", "fd00::11", "198.51.100.11")
    assert state.node.zone == "a"
    assert state.node.pod_cidrs == ("10.244.1.0/24", "fd00:244:1::/64")
    other = Cluster(node="node2").apply(
        "{apiVersion: v1, kind: Node, metadata: {name: node2}, spec: {podCIDR: 10.244.2.0/24}}"
    )
    assert other.node.pod_cidrs == ("10.244.2.0/24",)
    assert Cluster(node="node3").apply().node.addresses == ()


@pytest.mark.parametrize(
    ("node", "is_eligible"),
    [
        ("metadata: {name: node1}", True),
        ("{metadata: {name: node1}, spec: {taints: [{key: dedicated, effect: NoSchedule}]}}", True),
        (
            "{metadata: {name: node1}, spec: {taints: [{key: ToBeDeletedByClusterAutoscaler}]}}",
            False,
        ),
        ("metadata: {name: node1, deletionTimestamp: '2026-01-01T00:00:00Z'}", False),
    ],
)
def test_node_that_goes_away_is_not_for_load_balancers(node: str, is_eligible: bool) -> None:
    """The autoscaler's taint or a deletion (N6)."""
    fields = yaml.safe_load(node)
    state = apply(yaml.safe_dump({"apiVersion": "v1", "kind": "Node", **fields}))
    assert state.node.eligible is is_eligible
