"""What an agent shows of itself over the network, put together: health server, metrics server.

Starts and stops both as the settings ask, and turns an address that cannot be had into a log line,
an Event, and, where the settings say so, the end of the agent (HS8, HS9).
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.events import EventRecorder, ObjectRef
from ebpf_svc.health.bind import sites_of
from ebpf_svc.health.http import Handler
from ebpf_svc.health.proxy import ProxyHealth
from ebpf_svc.health.server import Site
from ebpf_svc.health.state import HealthState
from ebpf_svc.log import get_logger
from ebpf_svc.metrics.server import Metrics, MetricsServer
from ebpf_svc.model.service import ServiceName
from ebpf_svc.sync import SyncObserver

UNHEALTHY_PERIODS = 2
"""A change that waits for so many sync periods makes the proxy unhealthy (R5, HS3)."""
ACTION = "StartKubeProxy"
"""What kube-proxy's Events say was tried; whoever looks for them finds ours."""

log = get_logger(__name__)


class Monitoring:
    """Both servers of one agent; hand `observers` to its sync loop."""

    def __init__(
        self,
        settings: Settings,
        recorder: EventRecorder,
    ) -> None:
        """Build the parts; nothing listens yet, and no dataplane is shown before `serve`.

        Args:
            settings: `node_name` is the node's.
            recorder: for Events.
        """
        self._settings, self._recorder = settings, recorder
        self._on_fatal: Callable[[Exception], None] = lambda error: None
        self._metrics = Metrics(None, settings.families)
        self._health = ProxyHealth(
            HealthState(settings.families, timeout_s=UNHEALTHY_PERIODS * settings.resync_period_s),
            self._sites("health", settings.healthz_bind_address, "FailedToStartProxierHealthcheck"),
            on_reply=self._metrics.answered,
            on_service_failure=self._service_failed,
        )
        self._server = MetricsServer(
            self._metrics,
            self._sites("metrics", settings.metrics_bind_address, "FailedToStartMetricServer"),
            configz=self._configz,
            with_debug=settings.enable_profiling,
        )
        self.observers: tuple[SyncObserver, ...] = (self._health, self._metrics.sync)

    def start(self, on_fatal: Callable[[Exception], None]) -> None:
        """Begin to answer; an address that cannot be had yet holds up nothing.

        Args:
            on_fatal: called by another thread when the agent must end.
        """
        self._on_fatal = on_fatal
        _lift_file_limit()
        self._health.start()
        self._server.start()

    def take(self, settings: Settings) -> None:
        """Go by these settings from now on; the addresses are those of the start."""
        self._settings = settings
        self._health.state.set_timeout(UNHEALTHY_PERIODS * settings.resync_period_s)

    def serve(self, dataplane: Dataplane, refused: Mapping[str, str]) -> None:
        """Show this dataplane from now on; the one before may close once this returns.

        Args:
            dataplane: open; the servers must be stopped, or show another, before it closes.
            refused: dataplanes that were preferred and cannot run here, with why.
        """
        self._metrics.serve(dataplane, refused)

    def stop(self) -> None:
        """Stop answering; may be called again."""
        self._server.stop()
        self._health.stop()

    def _sites(self, name: str, address: str, reason: str) -> Callable[[Handler], Iterable[Site]]:
        def cannot_listen(site: Site, error: OSError) -> None:
            why = f"{name} server cannot listen at {site}: {error.strerror or error}"
            log.error("http.address", source=name, address=str(site), error=str(error))
            node = ObjectRef("Node", "", self._settings.node_name)
            self._recorder.warn(node, reason, why, action=ACTION)
            if self._settings.bind_address_hard_fail:
                self._on_fatal(UnsupportedHost([why]))

        return lambda handler: sites_of(name, address, handler, cannot_listen)

    def _service_failed(self, service: ServiceName, why: str) -> None:
        self._recorder.warn(
            ObjectRef("Service", *service),
            "FailedToStartServiceHealthcheck",
            f"health check node port cannot be served: {why}",
            action="Listen",
        )

    def _configz(self) -> Mapping[str, Any]:
        from ebpf_svc.config.kubeproxy.view import as_kube_proxy  # noqa: PLC0415  # seldom asked for

        return as_kube_proxy(self._settings)


def _lift_file_limit() -> None:
    """Every Service with a health-check node port takes descriptors; 1024 is soon too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
