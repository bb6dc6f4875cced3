"""The source goes by a monotonic clock: the wall clock may jump."""

from __future__ import annotations

import time

import pytest

from ebpf_svc.bench import apiobjects
from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings
from ebpf_svc.watch.kubernetes import KubernetesSource
from ebpf_svc.watch.store import Store
from tests.lib.waiting import eventually

HOUR_S = 3600.0


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S], ids=["ahead", "back"])
def test_jump_of_the_clock_delays_nothing(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """An hour's jump, either way, costs no event and no reconnection its second."""
    server = MockApiServer().start()
    server.put("Node", apiobjects.node("node-1"))
    server.put("Service", apiobjects.service(0))
    store = Store("node-1")
    source = KubernetesSource(KubernetesSettings(master=server.url), store)
    source.start()
    try:
        eventually(lambda: len(services(store)) == 1)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        server.put("Service", apiobjects.service(1))
        eventually(lambda: len(services(store)) == 2, within_s=1)
        server.kill_connections()
        server.put("Service", apiobjects.service(2))
        eventually(lambda: len(services(store)) == 3, within_s=3)
    finally:
        source.stop()
        server.close()


def services(store: Store) -> dict[object, object]:
    snapshot = store.snapshot()
    return dict(snapshot.services) if snapshot is not None else {}
