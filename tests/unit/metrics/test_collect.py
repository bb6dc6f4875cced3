"""What is looked up when somebody collects: plan, kernel, and a kernel that does not answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from prometheus_client import CollectorRegistry

from ebpf_svc.dataplane.fake import FakeDataplane
from ebpf_svc.dataplane.inspect import FlowCounts, MapFill, Series, Traffic
from ebpf_svc.errors import DataplaneError
from ebpf_svc.metrics.collect import KernelCollector, PlanCollector
from ebpf_svc.model.desired import DesiredState, PlanKey
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import ServicePortName
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from tests.lib.builders import (
    LOCAL,
    make_endpoints,
    make_port,
    make_service,
    make_snapshot,
    ready,
    unready,
)
from tests.unit.metrics.collected import Collected

NO_LOCAL = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"


def planned(*objects: object) -> DesiredState:
    return Planner(PlanOptions()).plan(make_snapshot(*objects))  # type: ignore[arg-type]


def collect_plan(desired: DesiredState | None) -> Collected:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PlanCollector(lambda: desired, tuple(Family)))
    return Collected(registry)


def no_local(*objects: object) -> dict[str, float]:
    """By policy, IPv4."""
    collected = collect_plan(planned(*objects))
    return {
        policy: collected.value(NO_LOCAL, traffic_policy=policy, ip_family="IPv4")
        for policy in ("internal", "external")
    }


INTERNAL_LOCAL = make_service("agent", internal_policy=LOCAL)
BOTH_LOCAL = make_service(
    "agent", make_port(80, node_port=30080), internal_policy=LOCAL, external_policy=LOCAL
)


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ((INTERNAL_LOCAL, make_endpoints("agent", ready("10.1.0.1", on="node1"))), (0, 0)),
        ((INTERNAL_LOCAL, make_endpoints("agent", ready("10.1.0.1", on="node2"))), (1, 0)),
        ((INTERNAL_LOCAL,), (0, 0)),
        ((INTERNAL_LOCAL, make_endpoints("agent", unready("10.1.0.1"))), (0, 0)),
        ((BOTH_LOCAL, make_endpoints("agent", ready("10.1.0.1", on="node2"))), (1, 1)),
        ((BOTH_LOCAL, make_endpoints("agent", ready("10.1.0.1", on="node1"))), (0, 0)),
        ((make_service("agent"), make_endpoints("agent", ready("10.1.0.1"))), (0, 0)),
    ],
)
def test_local_policy_without_local_endpoints_is_counted(
    objects: tuple[object, ...], expected: tuple[float, float]
) -> None:
    """Only while endpoints are elsewhere; once under each policy (MX2, digest row 49)."""
    assert tuple(no_local(*objects).values()) == expected


def test_plan_in_force_is_counted_by_family() -> None:
    """Service ports, addresses, endpoints, refusals, health checks."""
    desired = planned(
        make_service(
            "web",
            make_port(80, node_port=30080),
            cluster_ip=["10.96.0.10", "fd00:10:96::10"],
            load_balancer_ips=["203.0.113.1"],
            external_policy=LOCAL,
            health_check_node_port=32000,
        ),
        make_endpoints("web", ready("10.1.0.1"), ready("10.1.0.2")),
    )
    collected = collect_plan(desired)

    def both(name: str) -> tuple[float, float]:
        values = collected.values(f"ebpf_svc_{name}", "ip_family")
        return values["IPv4"], values["IPv6"]

    assert both("service_ports") == (1, 1)
    assert both("backends") == (2, 0)
    assert both("service_ports_without_endpoints") == (0, 1)
    assert both("health_check_node_ports") == (1, 1)
    assert both("frontends") == tuple(
        sum(len(plan.frontends) for key, plan in desired.plans.items() if key.family is family)
        for family in Family
    )


def test_nothing_applied_yet_is_zero() -> None:
    """A series that is missing cannot be told from an agent that is."""
    assert collect_plan(None).values("ebpf_svc_service_ports", "ip_family") == {
        "IPv4": 0,
        "IPv6": 0,
    }


WEB = PlanKey(ServicePortName("shop", "web", "http", Protocol.TCP), Family.V4)


class Showing(FakeDataplane):
    """A dataplane that shows everything."""

    broken: Exception | None = None

    def drops(self) -> Mapping[str, int]:
        if self.broken:
            raise self.broken
        return {"no_endpoint": 3, "malformed": 0}

    def fill(self) -> Iterable[MapFill]:
        yield MapFill("frontends4", 12, 64, evicts=False)
        yield MapFill("flows4", 5, 1024, evicts=True)

    def flow_counts(self) -> FlowCounts:
        return FlowCounts({WEB: 4}, {Family.V4: 1, Family.V6: 0})

    def traffic(self) -> Mapping[PlanKey, Traffic]:
        return {WEB: Traffic(connections=2, packets=30, bytes=4000)}

    def start_s(self) -> Mapping[str, float]:
        return {"compile": 0.5}

    def series(self) -> Iterable[Series]:
        name = "kubeproxy_sync_proxy_rules_iptables_total"
        yield Series(name, {"table": "nat", "ip_family": "IPv4"}, 7)
        yield Series(name, {"table": "filter", "ip_family": "IPv4"}, 2)


def collect_kernel(dataplane: FakeDataplane, **refused: str) -> Collected:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(KernelCollector(dataplane, registry, refused))
    return Collected(registry)


def test_dataplane_is_shown_as_it_shows_itself() -> None:
    """Drops, fill, flows and start, each with the labels of the catalog."""
    collected = collect_kernel(Showing())
    assert collected.values("ebpf_svc_dropped_packets_total", "reason") == {
        "no_endpoint": 3,
        "malformed": 0,
    }
    assert collected.value("ebpf_svc_map_entries", map="frontends4") == 12
    assert collected.value("ebpf_svc_map_capacity", map="frontends4", evicts="false") == 64
    assert collected.value("ebpf_svc_map_capacity", map="flows4", evicts="true") == 1024
    assert (
        collected.value(
            "ebpf_svc_service_flows",
            namespace="shop",
            service="web",
            port="http",
            protocol="TCP",
            ip_family="IPv4",
        )
        == 4
    )
    for what, count in (("connections", 2), ("packets", 30), ("bytes", 4000)):
        name = f"ebpf_svc_service_{what}_total"
        assert collected.values(name, "service") == {"web": count}
        assert collected.values(name, "ip_family") == {"IPv4": count}
    assert collected.values("ebpf_svc_flows", "ip_family") == {"IPv4": 5, "IPv6": 0}
    assert collected.values("ebpf_svc_draining_flows", "ip_family") == {"IPv4": 1, "IPv6": 0}
    assert collected.values("ebpf_svc_start_seconds", "step") == {"compile": 0.5}


def test_series_of_a_mode_come_under_their_own_names() -> None:
    """What kube-proxy counts for iptables, a dataplane of that mode can count (3.7)."""
    name = "kubeproxy_sync_proxy_rules_iptables_total"
    assert collect_kernel(Showing()).values(name, "table") == {"nat": 7, "filter": 2}


def test_dataplane_that_shows_nothing_is_left_out() -> None:
    """No zeros are made up for what a backend does not count."""
    assert collect_kernel(FakeDataplane()).names == {
        "ebpf_svc_build_info",
        "ebpf_svc_collect_failures_total",
        "ebpf_svc_mode",
    }


@pytest.mark.parametrize("error", [OSError("gone"), DataplaneError("closed")])
def test_kernel_that_does_not_answer_costs_only_what_it_owes(error: Exception) -> None:
    """The rest is collected all the same, and the failure counted."""
    dataplane = Showing()
    dataplane.broken = error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(KernelCollector(dataplane, registry, {}))
    Collected(registry)
    collected = Collected(registry)
    assert "ebpf_svc_dropped_packets_total" not in collected.names
    assert collected.value("ebpf_svc_map_entries", map="flows4") == 5
    assert collected.value("ebpf_svc_collect_failures_total") >= 1


def test_modes_that_were_refused_say_why() -> None:
    """What an operator wants to know of a fallback."""
    collected = collect_kernel(FakeDataplane(), ebpf='no "bpffs"')
    assert collected.value("ebpf_svc_mode", mode="fake") == 1
    assert collected.value("ebpf_svc_mode_refused", mode="ebpf", reason='no "bpffs"') == 1
