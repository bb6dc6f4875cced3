"""The pages of the metrics address, over real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from ebpf_svc.dataplane.fake import FakeDataplane
from ebpf_svc.health.bind import sites_of
from ebpf_svc.health.server import HttpServer
from ebpf_svc.metrics.server import Metrics, MetricsServer
from ebpf_svc.model.net import Family
from tests.lib.http import free_port, get, refuses
from tests.lib.waiting import eventually


class Rig:
    """A metrics server of an agent with a dataplane in memory."""

    def __init__(self, port: int, *, with_debug: bool = False) -> None:
        self.port = port
        self.metrics = Metrics(FakeDataplane(), tuple(Family))
        self.server = MetricsServer(
            self.metrics,
            lambda handler: sites_of(
                "metrics", f"127.0.0.1:{port}", handler, lambda site, error: None
            ),
            configz=lambda: {"kind": "KubeProxyConfiguration"},
            with_debug=with_debug,
            server=HttpServer("test"),
        )
        self.server.start()
        eventually(lambda: not refuses(port) and not refuses(port, "::1"))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(free_port())
    yield rig
    rig.server.stop()


def test_pages_are_kube_proxys(rig: Rig) -> None:
    """/healthz is constant, /proxyMode the bare word, /configz under its key (HS7)."""
    assert get(rig.port, "/healthz").body == b"ok"
    assert get(rig.port, "/proxyMode").body == b"fake"
    assert get(rig.port, "/configz").json == {
        "kubeproxy.config.k8s.io": {"kind": "KubeProxyConfiguration"}
    }
    assert get(rig.port, "/").status == get(rig.port, "/debug/threads").status == 404


def test_debug_pages_answer_where_asked_for() -> None:
    """enableProfiling shows where threads stand and what memory holds; else nobody sees it."""
    rig = Rig(free_port(), with_debug=True)
    try:
        assert b"test_debug_pages" in get(rig.port, "/debug/threads").body
        assert b" dict" in get(rig.port, "/debug/objects").body
        assert get(rig.port, "/healthz").body == b"ok"
    finally:
        rig.server.stop()


def test_metrics_come_in_the_text_format(rig: Rig) -> None:
    """What every Prometheus understands, in both families of the loopback."""
    reply = get(rig.port, "/metrics", address="::1")
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram" in reply.body
    assert b"process_resident_memory_bytes" in reply.body
    assert b"_created" not in reply.body


def test_outcomes_of_checks_are_on_their_own_page(rig: Rig) -> None:
    """As for other Kubernetes components: /metrics/slis."""
    get(rig.port, "/healthz")
    rig.metrics.answered("livez", 503)
    text = get(rig.port, "/metrics/slis").body.decode()
    assert 'kubernetes_healthcheck{name="ping",type="healthz"} 1.0' in text
    assert 'kubernetes_healthcheck{name="proxy",type="livez"} 0.0' in text
    assert 'kubernetes_healthchecks_total{name="proxy",status="error",type="livez"} 1.0' in text
    assert "kubernetes_healthcheck" not in get(rig.port, "/metrics").body.decode()


def test_answers_of_health_pages_are_counted_by_code(rig: Rig) -> None:
    """kubeproxy_proxy_healthz_total and livez_total (3.7)."""
    for status in (200, 200, 503):
        rig.metrics.answered("healthz", status)
    text = get(rig.port, "/metrics").body.decode()
    assert 'kubeproxy_proxy_healthz_total{code="200"} 2.0' in text
    assert 'kubeproxy_proxy_healthz_total{code="503"} 1.0' in text


def test_collector_that_hangs_holds_up_no_other(rig: Rig) -> None:
    """A Prometheus that stopped reading, and ten that did not."""
    with socket.create_connection(("127.0.0.1", rig.port)) as silent:
        silent.sendall(b"GET /metrics")
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(get(rig.port, "/metrics").status))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [200] * 10
