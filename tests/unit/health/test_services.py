"""Health-check node ports, asked over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from ebpf_svc.health.server import HttpServer
from ebpf_svc.health.services import ServiceHealth
from ebpf_svc.model.desired import HealthCheck
from ebpf_svc.model.net import Family
from ebpf_svc.model.service import ServiceName
from tests.lib.http import free_port, get, refuses
from tests.lib.waiting import eventually

V4, V6 = Family.V4, Family.V6
WEB, API = ServiceName("shop", "web"), ServiceName("shop", "api")


@dataclass
class Rig:
    """Service health on a server of its own."""

    server: HttpServer
    is_healthy: bool = True
    failures: list[tuple[ServiceName, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.health = ServiceHealth(
            self.server,
            lambda: self.is_healthy,
            lambda service, why: self.failures.append((service, why)),
        )
        self.server.start()

    def sync(self, *checks: HealthCheck, failing: tuple[tuple[ServiceName, Family], ...] = ()):
        """Sync, and wait until every port that can be had is there."""
        self.health.sync(checks, failing)
        for each in checks:
            for address in each.addresses:
                eventually(lambda a=address, p=each.port: self.failures or not refuses(p, local(a)))


def local(address: str) -> str:
    """Where a test asks to reach a listener of that address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


def check(
    port: int,
    count: int = 1,
    *,
    of: ServiceName = WEB,
    family: Family = V4,
    at: tuple[str, ...] = ("127.0.0.1",),
) -> HealthCheck:
    return HealthCheck(of, family, port, at, count)


@pytest.fixture
def rig(make_server: Callable[..., HttpServer]) -> Rig:
    return Rig(make_server(retry_s=60.0))


def test_answer_has_the_headers_and_body_of_kube_proxy(rig: Rig) -> None:
    """Any path, any method: type, weight and the four fields (H3, H4)."""
    port = free_port()
    rig.sync(check(port, 3))
    for method, path in (("GET", "/"), ("GET", "/healthz"), ("POST", "/any/thing?x=1")):
        reply = get(port, path, method=method)
        assert reply.status == 200
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["X-Load-Balancing-Endpoint-Weight"] == "3"
        assert reply.json == {
            "service": {"namespace": "shop", "name": "web"},
            "localEndpoints": 3,
            "serviceProxyHealthy": True,
        }


@pytest.mark.parametrize(
    ("count", "is_healthy", "status"),
    [(1, True, 200), (0, True, 503), (1, False, 503), (0, False, 503)],
)
def test_status_needs_endpoints_and_a_healthy_proxy(
    rig: Rig, count: int, is_healthy: bool, status: int
) -> None:
    """200 if and only if there are local endpoints and the proxy is healthy (H5)."""
    port = free_port()
    rig.is_healthy = is_healthy
    rig.sync(check(port, count))
    reply = get(port)
    assert (reply.status, reply.json["serviceProxyHealthy"]) == (status, is_healthy)


def test_each_family_has_its_own_count(rig: Rig) -> None:
    """One listener a family, each with what is local in it (H1)."""
    port = free_port()
    rig.sync(check(port, 2, family=V4, at=("0.0.0.0",)), check(port, 0, family=V6, at=("::",)))
    assert get(port).json["localEndpoints"] == 2
    assert get(port, address="::1").status == 503


def test_only_selected_addresses_listen(rig: Rig) -> None:
    """Where nodePortAddresses selects some, the others refuse (H1, digest row 25)."""
    port = free_port()
    rig.sync(check(port, at=("127.0.0.2", "127.0.0.3")))
    assert get(port, address="127.0.0.2").status == 200
    assert get(port, address="127.0.0.3").status == 200
    assert refuses(port, "127.0.0.1")


def test_count_follows_each_sync(rig: Rig) -> None:
    """The connection that was open goes on, the answer is today's (H7)."""
    port = free_port()
    rig.sync(check(port, 1))
    rig.sync(check(port, 0))
    assert (get(port).status, get(port).json["localEndpoints"]) == (503, 0)
    rig.sync(check(port, 5))
    assert get(port).json["localEndpoints"] == 5


def test_changed_port_closes_the_old_one(rig: Rig) -> None:
    """Close and open anew (H7)."""
    old, new = free_port(), free_port()
    rig.sync(check(old))
    rig.sync(check(new))
    eventually(lambda: refuses(old))
    assert get(new).status == 200


def test_services_not_in_the_set_are_closed(rig: Rig) -> None:
    """A Service that went leaves no open port; the others stay (H8)."""
    one, other = free_port(), free_port()
    rig.sync(check(one), check(other, of=API))
    rig.sync(check(other, of=API))
    eventually(lambda: refuses(one))
    assert get(other).json["service"]["name"] == "api"


def test_taken_port_is_reported_and_tried_with_the_next_sync(rig: Rig) -> None:
    """An Event for the Service, then again with every sync until it works (H7)."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        rig.sync(check(port))
        eventually(lambda: rig.failures)
        rig.sync(check(port))
    ((service, why),) = rig.failures
    assert service == WEB
    assert why == f"127.0.0.1:{port}: Address already in use"
    rig.failures.clear()
    rig.sync(check(port))
    assert get(port).status == 200
    assert not rig.failures


def test_two_services_with_one_port_are_told_apart(rig: Rig) -> None:
    """One has it, the other is reported (H7)."""
    port = free_port()
    rig.sync(check(port), check(port, of=API))
    eventually(lambda: rig.failures)
    assert [service for service, _ in rig.failures] == [API]
    assert get(port).json["service"]["name"] == "web"


def test_request_under_way_when_its_service_goes_is_a_503(rig: Rig) -> None:
    """Kube-proxy may answer an empty 200 here; a balancer would send traffic (HS10)."""
    port = free_port()
    rig.sync(check(port, 4))
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        # Answered after the one before it, so that one was accepted.
        assert get(port).status == 200
        rig.sync()
        eventually(lambda: refuses(port))
        client.sendall(b"\r\n")
        client.settimeout(2)
        answer = b"".join(iter(lambda: client.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 503 ")
    assert '"localEndpoints": 0' in answer
    assert "X-Load-Balancing-Endpoint-Weight: 0" in answer


def test_service_the_kernel_was_not_told_of_fails_its_check(rig: Rig) -> None:
    """Its balancer goes elsewhere; other Services' do not (H5)."""
    one, other = free_port(), free_port()
    rig.sync(check(one), check(other, of=API), failing=((WEB, V4),))
    assert (get(one).status, get(one).json["serviceProxyHealthy"]) == (503, False)
    assert get(other).status == 200
