"""Requests keep to qps and burst."""

from __future__ import annotations

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings
from ebpf_svc.watch.kube.connection import ApiServer
from ebpf_svc.watch.kube.limit import RateLimit
from tests.lib.apiserver import running


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now_s += seconds


def limit(qps: float, burst: int) -> tuple[RateLimit, Clock]:
    clock = Clock()
    return RateLimit(qps, burst, clock=lambda: clock.now_s, sleep=clock.sleep), clock


def test_burst_passes_and_the_rest_is_paced() -> None:
    """qps 5, burst 10: ten at once, then one each 0.2 s."""
    bucket, clock = limit(5, 10)
    for _ in range(13):
        bucket.wait()
    assert clock.slept == [0.2, 0.2, 0.2]


def test_idle_time_refills_no_more_than_the_burst() -> None:
    """An hour of silence does not allow a flood."""
    bucket, clock = limit(5, 2)
    bucket.wait()
    clock.now_s += 3600
    for _ in range(3):
        bucket.wait()
    assert clock.slept == [0.2]


def test_no_limit_never_waits() -> None:
    """A negative qps, as kube-proxy's."""
    bucket, clock = limit(-1, 0)
    for _ in range(1000):
        bucket.wait()
    assert clock.slept == []


def test_pages_of_one_list_count_once() -> None:
    """Or 10,000 Services would take eight seconds to list."""
    with running() as server:
        client = ApiServer(KubernetesSettings(master=server.url, qps=0.001, burst=2))
        client.get("/api/v1/services", {"limit": "1"}).read()
        for _ in range(3):
            server.faults.append(MockApiServer.Fault(status=200, body=b"{}"))
            client.get("/api/v1/services", {"limit": "1", "continue": "token"}).read()
        client.get("/api/v1/services", {}).read()
        assert len(server.requests) == 5
        client.close()
