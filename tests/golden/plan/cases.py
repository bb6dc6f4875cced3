"""Situations a Service gets into; each function's docstring says what its plan must show."""

from __future__ import annotations

from dataclasses import replace

from ebpf_svc.model.net import Family
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.plan.options import PlanOptions
from tests.lib.builders import (
    LOCAL,
    NODE,
    make_endpoint_port,
    make_endpoints,
    make_port,
    make_service,
    make_snapshot,
    ready,
    terminating,
    unready,
)

POD_ADDRESSES_KNOWN = PlanOptions(local_detector=frozenset(Family))
"""As on a node that was told cluster_cidrs of both families."""


def clusterip() -> Snapshot:
    """A service of two ports; pods keep their source address, others are masqueraded."""
    return make_snapshot(
        make_service("shop/web", make_port(80, "http"), make_port(9100, "metrics")),
        make_endpoints(
            "shop/web",
            ready("10.244.1.5", on="node1"),
            ready("10.244.2.7", on="node2"),
            unready("10.244.2.8", on="node2"),
            ports=[make_endpoint_port(8080, "http"), make_endpoint_port(9100, "metrics")],
        ),
    )


def no_endpoints() -> Snapshot:
    """Nobody answers for these: headless and ExternalName services do not even appear."""
    return make_snapshot(
        make_service("shop/empty", make_port(80, node_port=30080)),
        make_service("shop/starting", cluster_ip="10.96.0.11"),
        make_endpoints("shop/starting", unready("10.244.1.5", on="node1")),
        make_service("shop/headless", cluster_ip=[]),
    )


def nodeport() -> Snapshot:
    """A node port answers on every address of the node but link-local ones, and on one loopback."""
    node = replace(NODE, local_addresses=(*NODE.local_addresses, "10.244.1.1", "127.0.0.53"))
    return make_snapshot(
        make_service(
            "shop/web",
            make_port(80, node_port=30080),
            cluster_ip=["10.96.0.10", "fd00:10:96::10"],
        ),
        make_endpoints("shop/web", ready("10.244.2.7")),
        node=node,
    )


def external_addresses() -> Snapshot:
    """External IPs and VIPs serve the port of the service; several are several frontends."""
    return make_snapshot(
        make_service(
            "shop/web",
            make_port(443, "https"),
            external_ips=["198.51.100.7", "198.51.100.8"],
            load_balancer_ips=["203.0.113.1", "203.0.113.2"],
        ),
        make_endpoints("shop/web", ready("10.244.2.7"), ports=[make_endpoint_port(8443, "https")]),
    )


def affinity() -> Snapshot:
    """Clients stay with a backend for the affinity time, over every frontend of the port."""
    return make_snapshot(
        make_service("shop/web", make_port(80, node_port=30080), affinity_s=10_800),
        make_endpoints("shop/web", ready("10.244.1.5", on="node1"), ready("10.244.2.7")),
    )


def external_policy_local() -> Snapshot:
    """Outside clients get local endpoints and keep their address; pods and the node get any."""
    return make_snapshot(
        make_service(
            "shop/web",
            make_port(80, node_port=30080),
            load_balancer_ips=["203.0.113.1"],
            external_policy=LOCAL,
            health_check_node_port=32000,
        ),
        make_endpoints("shop/web", ready("10.244.1.5", on="node1"), ready("10.244.2.7")),
    )


def internal_policy_local() -> Snapshot:
    """Only endpoints of the node answer; without one here packets are dropped, not refused."""
    return make_snapshot(
        make_service("shop/agent", internal_policy=LOCAL),
        make_endpoints("shop/agent", ready("10.244.1.5", on="node1"), ready("10.244.2.7")),
        make_service("shop/elsewhere", cluster_ip="10.96.0.11", internal_policy=LOCAL),
        make_endpoints("shop/elsewhere", ready("10.244.2.8")),
    )


def terminating_endpoints() -> Snapshot:
    """While something is Ready the others drain; else those that still serve go on.

    The last one: Ready elsewhere, terminating here, both lists apart.
    """
    return make_snapshot(
        make_service("shop/rolling", cluster_ip="10.96.0.1"),
        make_endpoints(
            "shop/rolling",
            ready("10.244.2.7"),
            terminating("10.244.1.5", on="node1"),
            terminating("10.244.2.8", serving=False),
        ),
        make_service("shop/stopping", cluster_ip="10.96.0.2"),
        make_endpoints("shop/stopping", terminating("10.244.1.5", on="node1")),
        make_service("shop/stopped", cluster_ip="10.96.0.3"),
        make_endpoints("shop/stopped", terminating("10.244.1.5", on="node1", serving=False)),
        make_service(
            "shop/both",
            make_port(80, node_port=30080),
            cluster_ip="10.96.0.4",
            external_policy=LOCAL,
        ),
        make_endpoints("shop/both", ready("10.244.2.7"), terminating("10.244.1.5", on="node1")),
    )


def topology() -> Snapshot:
    """Traffic stays in the node's zone where every endpoint is hinted, local lists excepted."""
    hinted = [
        ready("10.244.1.5", on="node1", zones=["zone-b"]),
        ready("10.244.2.7", zones=["zone-a"]),
        ready("10.244.2.8", zones=["zone-a", "zone-b"]),
        ready("10.244.3.9", zones=["zone-c"]),
    ]
    return make_snapshot(
        make_service(
            "shop/zoned",
            make_port(80, node_port=30080),
            cluster_ip="10.96.0.1",
            external_policy=LOCAL,
        ),
        make_endpoints("shop/zoned", *hinted),
        make_service("shop/mixed", cluster_ip="10.96.0.2"),
        make_endpoints("shop/mixed", *hinted, ready("10.244.4.1")),
        make_service("shop/near", cluster_ip="10.96.0.3"),
        make_endpoints(
            "shop/near",
            ready("10.244.1.5", on="node1", zones=["zone-a"], nodes=["node1"]),
            ready("10.244.2.7", zones=["zone-a"], nodes=["node2"]),
        ),
    )


def source_ranges() -> Snapshot:
    """Ranges close the VIPs of their family alone; where the node may, the VIPs may too."""
    return make_snapshot(
        make_service(
            "shop/closed",
            make_port(80, node_port=30080),
            cluster_ip=["10.96.0.1", "fd00:10:96::1"],
            external_ips=["198.51.100.7"],
            load_balancer_ips=["203.0.113.1", "203.0.113.2", "2001:db8::1"],
            source_ranges=["192.168.0.0/24", "198.51.100.0/24"],
        ),
        make_service(
            "shop/open",
            cluster_ip="10.96.0.2",
            load_balancer_ips=["203.0.113.3"],
            source_ranges=["198.51.100.0/24", "0.0.0.0/0"],
        ),
    )


def dual_stack() -> Snapshot:
    """Two families are two plans; endpoints serve the family of their slice."""
    return make_snapshot(
        make_service(
            "shop/web",
            make_port(80, "http"),
            make_port(53, "dns", protocol="UDP"),
            cluster_ip=["fd00:10:96::10", "10.96.0.10"],
        ),
        make_endpoints("shop/web", ready("10.244.2.7"), ports=[make_endpoint_port(8080, "http")]),
        make_endpoints(
            "shop/web",
            ready("fd00:244:2::7"),
            ports=[make_endpoint_port(5353, "dns", protocol="UDP")],
        ),
    )


def conflicts() -> Snapshot:
    """An address claimed twice goes to the first by name; the others keep what is theirs alone."""
    return make_snapshot(
        make_service("shop/b", make_port(80, node_port=30080), cluster_ip="10.96.0.2"),
        make_service("shop/a", make_port(80, node_port=30080), cluster_ip="10.96.0.1"),
        make_service("shop/c", cluster_ip="10.96.0.1"),
        make_service("bank/z", cluster_ip="10.96.0.3", external_ips=["203.0.113.1"]),
        make_service("shop/d", cluster_ip="10.96.0.4", load_balancer_ips=["203.0.113.1"]),
    )


def pod_addresses_unknown() -> Snapshot:
    """Without cluster_cidrs cluster IPs do not masquerade, and pods get no short way round eTP."""
    return external_policy_local()


CASES = {
    clusterip: POD_ADDRESSES_KNOWN,
    no_endpoints: POD_ADDRESSES_KNOWN,
    nodeport: POD_ADDRESSES_KNOWN,
    external_addresses: POD_ADDRESSES_KNOWN,
    affinity: POD_ADDRESSES_KNOWN,
    external_policy_local: POD_ADDRESSES_KNOWN,
    internal_policy_local: POD_ADDRESSES_KNOWN,
    terminating_endpoints: POD_ADDRESSES_KNOWN,
    topology: POD_ADDRESSES_KNOWN,
    source_ranges: POD_ADDRESSES_KNOWN,
    dual_stack: POD_ADDRESSES_KNOWN,
    conflicts: POD_ADDRESSES_KNOWN,
    pod_addresses_unknown: PlanOptions(),
}
"""Each situation with the options of the node it is planned for."""
