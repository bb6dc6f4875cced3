"""The node's health pages, fed as the sync loop feeds them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.errors import ApplyError, DataplaneError
from ebpf_svc.health.bind import sites_of
from ebpf_svc.health.http import text_response
from ebpf_svc.health.proxy import ProxyHealth
from ebpf_svc.health.server import HttpServer, Site
from ebpf_svc.health.state import HealthState
from ebpf_svc.model.desired import DesiredState, HealthCheck
from ebpf_svc.model.net import Family
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.sync import Synced
from tests.lib.builders import (
    LOCAL,
    NODE,
    make_endpoints,
    make_port,
    make_service,
    make_snapshot,
    ready,
)
from tests.lib.http import free_port, get, refuses
from tests.lib.waiting import eventually

SNAPSHOT = make_snapshot()


@dataclass
class Rig:
    """The health server on a port, its clock and what it reports."""

    server: HttpServer
    address: str
    now_s: float = 0.0
    replies: list[tuple[str, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        state = HealthState(tuple(Family), timeout_s=60.0, monotonic=lambda: self.now_s)
        self.health = ProxyHealth(
            state,
            lambda handler: sites_of("health", self.address, handler, self.fail),
            on_reply=lambda page, status: self.replies.append((page, status)),
            server=self.server,
        )
        self.health.start()

    def fail(self, site: Site, error: OSError) -> None:
        self.failures.append(str(site))

    def synced(self, desired: DesiredState | None = None, *failed: ApplyError) -> None:
        report = ApplyReport(failed=failed)
        self.health.applied(Synced(desired or DesiredState(), report, False, 0.001, 0.002))


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def rig(make_server: Callable[..., HttpServer], port: int) -> Rig:
    rig = Rig(make_server(), f"0.0.0.0:{port}")
    eventually(lambda: not refuses(port) and not refuses(port, "::1"))
    rig.health.started()
    return rig


def test_pages_answer_in_both_families(rig: Rig, port: int) -> None:
    """0.0.0.0 is everywhere, IPv6 too; there is no /readyz (HS1)."""
    for address in ("127.0.0.1", "::1"):
        for path, status in (("/healthz", 200), ("/livez", 200), ("/readyz", 404), ("/", 404)):
            assert get(port, path, address=address).status == status


def test_starting_counts_as_a_sync(rig: Rig, port: int) -> None:
    """Healthy from the moment the loop runs (HS4); headers and body as kube-proxy's (HS2)."""
    reply = get(port, "/healthz")
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert {*reply.json} == {"lastUpdated", "currentTime", "nodeEligible", "healthy", "status"}
    assert {*reply.json["status"]} == {"IPv4", "IPv6"}
    assert {*get(port, "/livez").json} == {"lastUpdated", "currentTime", "healthy", "status"}


def test_loop_that_hangs_is_unhealthy(rig: Rig, port: int) -> None:
    """A change taken up and never carried out: 503 on both pages after the timeout (HS3)."""
    rig.health.queued(SNAPSHOT)
    rig.now_s = 59.0
    assert get(port, "/healthz").status == 200
    rig.now_s = 60.0
    assert get(port, "/healthz").status == get(port, "/livez").status == 503
    rig.synced()
    assert get(port, "/healthz").status == get(port, "/livez").status == 200


def test_refused_applies_are_unhealthy_until_one_succeeds(rig: Rig, port: int) -> None:
    """Tries do not count, however many (HS3, HS4)."""
    for second in range(0, 61, 20):
        rig.now_s = float(second)
        rig.health.queued(SNAPSHOT)
        rig.health.failed(DataplaneError("map slots: no space"))
    assert get(port, "/livez").status == 503
    rig.synced()
    assert get(port, "/livez").status == 200


def test_one_bad_service_does_not_make_the_node_unhealthy(rig: Rig, port: int) -> None:
    """The others forward: a load balancer must not shun every node for one Service."""
    rig.health.queued(SNAPSHOT)
    rig.now_s = 1000.0
    rig.synced(None, ApplyError("shop/web:http/TCP/IPv4", "no slots"))
    assert get(port, "/healthz").status == 200


def test_bad_service_fails_its_own_check(rig: Rig) -> None:
    """What could not be written in IPv4 is not served in IPv4 (H5)."""
    port = free_port()
    service = make_service(
        "shop/web",
        make_port(80, node_port=30080),
        cluster_ip=["10.96.0.10", "fd00:10:96::10"],
        load_balancer_ips=["203.0.113.1"],
        external_policy=LOCAL,
        health_check_node_port=port,
    )
    desired = Planner(PlanOptions()).plan(
        make_snapshot(
            service,
            make_endpoints("shop/web", ready("10.1.0.1", on="node1")),
            make_endpoints("shop/web", ready("fd00:1::1", on="node1")),
        )
    )
    rig.synced(desired, ApplyError("shop/web/TCP/IPv4", "no slots"))
    eventually(lambda: not refuses(port) and not refuses(port, "::1"))
    assert get(port).status == 503
    assert get(port, address="::1").status == 200


def test_node_that_goes_away_fails_healthz_alone(rig: Rig, port: int) -> None:
    """Load balancers leave, the kubelet does not restart the agent (N6, HS6)."""
    rig.health.queued(replace(SNAPSHOT, node=replace(NODE, eligible=False)))
    reply = get(port, "/healthz")
    assert (reply.status, reply.json["nodeEligible"], reply.json["healthy"]) == (503, False, True)
    assert get(port, "/livez").status == 200
    rig.health.queued(SNAPSHOT)
    assert get(port, "/healthz").status == 200


def test_service_checks_ignore_the_node_but_not_the_proxy(rig: Rig) -> None:
    """A node that goes away still answers for its endpoints (N6); a proxy that hangs not (H5)."""
    port = free_port()
    check = HealthCheck(make_service("shop/web").name, Family.V4, port, ("127.0.0.1",), 1)
    rig.health.queued(replace(SNAPSHOT, node=replace(NODE, eligible=False)))
    rig.synced(DesiredState(health_checks=(check,)))
    eventually(lambda: not refuses(port))
    assert get(port).status == 200
    rig.health.queued(SNAPSHOT)
    rig.now_s = 100.0
    assert get(port).status == 503


def test_answers_are_reported_for_metrics(rig: Rig, port: int) -> None:
    """Each page with its code; what is no page is not counted."""
    get(port, "/healthz")
    get(port, "/livez")
    get(port, "/nothing")
    rig.health.queued(replace(SNAPSHOT, node=replace(NODE, eligible=False)))
    get(port, "/healthz")
    assert rig.replies == [("healthz", 200), ("livez", 200), ("healthz", 503)]


def test_taken_address_is_reported_and_had_later(
    make_server: Callable[..., HttpServer], port: int
) -> None:
    """The daemon is told, which may end it; else it is tried again (HS8)."""
    with socket.create_server(("127.0.0.1", port)):
        rig = Rig(make_server(), f"127.0.0.1:{port}")
        eventually(lambda: rig.failures)
        assert rig.failures == [f"127.0.0.1:{port}"]
        # The twin in the other family is had all the same.
        eventually(lambda: not refuses(port, "::1"))
        assert get(port, "/livez", address="::1").status == 200
    eventually(lambda: not refuses(port))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("0.0.0.0:10256", ["0.0.0.0:10256", "[::]:10256"]),
        ("[::]:10256", ["[::]:10256", "0.0.0.0:10256"]),
        ("127.0.0.1:10249", ["127.0.0.1:10249", "[::1]:10249"]),
        ("[0:0::1]:10249", ["[::1]:10249", "127.0.0.1:10249"]),
        ("192.0.2.1:80", ["192.0.2.1:80"]),
        ("[2001:db8::1]:80", ["[2001:db8::1]:80"]),
        ("", []),
    ],
)
def test_address_of_no_family_is_served_in_both(address: str, expected: list[str]) -> None:
    """Everywhere and the loopback have a twin; an address does not; nothing is nowhere."""
    sites = sites_of("x", address, lambda request: text_response(""), lambda site, error: None)
    assert [str(site) for site in sites] == expected
    assert [site.on_failure is not None for site in sites] == [True, False][: len(sites)]
