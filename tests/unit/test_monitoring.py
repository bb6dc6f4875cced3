"""Both servers of an agent together: settings in, pages, Events and the agent's end out."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.dataplane.fake import FakeDataplane
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.events import Event, EventRecorder
from ebpf_svc.model.desired import DesiredState, HealthCheck
from ebpf_svc.model.net import Family
from ebpf_svc.monitoring import Monitoring
from ebpf_svc.sync import Synced
from tests.lib.builders import make_name, make_snapshot
from tests.lib.http import free_port, get, refuses
from tests.lib.waiting import eventually


@dataclass
class Rig:
    """The servers of an agent on ports of their own, with what they report."""

    options: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    fatal: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.health_port, self.metrics_port = free_port(), free_port()
        settings = Settings.model_validate(
            {
                "node_name": "node1",
                "healthz_bind_address": f"0.0.0.0:{self.health_port}",
                "metrics_bind_address": f"127.0.0.1:{self.metrics_port}",
                **self.options,
            }
        )
        self.monitoring = Monitoring(settings, EventRecorder(self))

    def send(self, event: Event) -> None:
        self.events.append(event)

    def start(self) -> None:
        self.monitoring.start(on_fatal=self.fatal.append)

    def sync(self, *checks: HealthCheck) -> None:
        """Let the loop begin and end a sync."""
        snapshot, state = make_snapshot(), DesiredState(health_checks=checks)
        for observer in self.monitoring.observers:
            observer.started()
            observer.queued(snapshot)
            observer.applied(Synced(state, ApplyReport(), False, 0.0, 0.0))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.monitoring.stop()


def test_pages_are_where_the_settings_say(rig: Rig) -> None:
    """Health everywhere, metrics on the loopback; what one counts the other shows."""
    rig.start()
    eventually(lambda: not refuses(rig.health_port, "::1") and not refuses(rig.metrics_port))
    assert get(rig.metrics_port, "/proxyMode").status == 503, "a compile may take its time"
    rig.monitoring.serve(FakeDataplane(), {"ebpf": "no BTF"})
    rig.sync()
    assert get(rig.health_port, "/healthz", address="::1").status == 200
    text = get(rig.metrics_port, "/metrics").body.decode()
    assert 'kubeproxy_proxy_healthz_total{code="200"} 1.0' in text
    assert "ebpf_svc_ready 1.0" in text
    assert 'ebpf_svc_mode_refused{mode="ebpf",reason="no BTF"} 1.0' in text
    assert get(rig.metrics_port, "/proxyMode").body == b"fake"
    config = get(rig.metrics_port, "/configz").json["kubeproxy.config.k8s.io"]
    assert config["healthzBindAddress"] == f"0.0.0.0:{rig.health_port}"


def test_no_address_is_no_server_but_services_are_checked_all_the_same() -> None:
    """An empty address turns the pages off; health-check node ports are not theirs (K4)."""
    rig, port = Rig({"healthz_bind_address": "", "metrics_bind_address": ""}), free_port()
    rig.start()
    try:
        rig.sync(HealthCheck(make_name("shop/web"), Family.V4, port, ("127.0.0.1",), 1))
        eventually(lambda: not refuses(port))
        assert get(port).status == 200
        assert refuses(rig.health_port)
        assert refuses(rig.metrics_port)
    finally:
        rig.monitoring.stop()


@pytest.mark.parametrize(
    ("taken", "reason"),
    [("health", "FailedToStartProxierHealthcheck"), ("metrics", "FailedToStartMetricServer")],
)
@pytest.mark.parametrize("is_hard", [False, True])
def test_taken_address_is_an_event_and_may_end_the_agent(
    taken: str, reason: str, is_hard: bool
) -> None:
    """A Warning on the Node; the end only where bindAddressHardFail asks for it (HS8, HS9)."""
    rig = Rig({"bind_address_hard_fail": is_hard})
    port = rig.health_port if taken == "health" else rig.metrics_port
    with socket.create_server(("127.0.0.1", port)):
        rig.start()
        eventually(lambda: rig.events)
        eventually(lambda: rig.fatal or not is_hard)
        rig.monitoring.stop()
    (event,) = rig.events
    assert (str(event.regarding), event.type, event.reason) == ("Node node1", "Warning", reason)
    assert f":{port}: Address already in use" in event.note
    assert [type(error) for error in rig.fatal] == ([UnsupportedHost] if is_hard else [])


def test_taken_health_check_port_is_an_event_of_its_service(rig: Rig) -> None:
    """The operator of the Service learns of it (H7, HS9)."""
    rig.start()
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        rig.sync(HealthCheck(make_name("shop/web"), Family.V4, port, ("127.0.0.1",), 1))
        eventually(lambda: rig.events)
    (event,) = rig.events
    assert (str(event.regarding), event.reason) == (
        "Service shop/web",
        "FailedToStartServiceHealthcheck",
    )


def test_change_that_waits_two_sync_periods_is_unhealthy() -> None:
    """The period is the settings' (R5, HS3)."""
    rig = Rig({"resync_period_s": 0.05, "min_sync_period_s": 0.0})
    rig.start()
    try:
        rig.sync()
        eventually(lambda: not refuses(rig.health_port))
        for observer in rig.monitoring.observers:
            observer.queued(make_snapshot())
        eventually(lambda: get(rig.health_port, "/livez").status, until=(503).__eq__)
        rig.sync()
        assert get(rig.health_port, "/livez").status == 200
    finally:
        rig.monitoring.stop()


def test_stop_may_come_twice_or_before_the_start(rig: Rig) -> None:
    """However far a start got, its end is the same."""
    rig.monitoring.stop()
    rig.monitoring.stop()
