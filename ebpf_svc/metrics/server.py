"""The metrics server: /metrics, /metrics/slis, /healthz, /proxyMode, /configz (HS7).

Its own thread: collecting may take a tenth of a second, which no health check should wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.health.http import (
    Handler,
    Request,
    Response,
    json_response,
    pages,
    text_response,
)
from ebpf_svc.health.server import HttpServer, Site
from ebpf_svc.metrics import catalog, debug
from ebpf_svc.metrics.collect import KernelCollector, PlanCollector
from ebpf_svc.metrics.make import CONTENT_TYPE, counter, exposition, gauge
from ebpf_svc.metrics.sync import SyncMetrics
from ebpf_svc.model.net import Family

OWNER = "metrics"
CONFIGZ_KEY = "kubeproxy.config.k8s.io"


class Metrics:
    """Everything there is to collect from one agent."""

    def __init__(
        self,
        dataplane: Dataplane | None,
        families: Iterable[Family],
        *,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Register all metrics.

        Args:
            dataplane: the one that serves, need not be open yet; None = `serve` will name it.
            families: those served.
            refused: dataplanes that were preferred and cannot run here, with why.
        """
        families = tuple(families)
        self.registry = CollectorRegistry(auto_describe=False)
        self.mode = dataplane.name if dataplane is not None else ""
        """The word for the dataplane that serves; empty while none does."""
        self.sync = SyncMetrics(self.registry, families, mode=self.mode)
        """An observer of the sync loop."""
        self._answers = {
            "healthz": counter(catalog.HEALTHZ, self.registry),
            "livez": counter(catalog.LIVEZ, self.registry),
        }
        self.registry.register(PlanCollector(lambda: self.sync.desired, families))
        self._kernel = KernelCollector(dataplane, self.registry, refused or {})
        self.registry.register(self._kernel)
        ProcessCollector(registry=self.registry)
        self.slis = CollectorRegistry(auto_describe=False)
        self._passes = gauge(catalog.SLI_HEALTH, self.slis)
        self._outcomes = counter(catalog.SLI_HEALTH_TOTAL, self.slis)

    def serve(self, dataplane: Dataplane, refused: Mapping[str, str]) -> None:
        """Go over to another dataplane; nobody looks at the one before any more on return."""
        self._kernel.serve(dataplane, refused)
        self.sync.serve(dataplane.name)
        self.mode = dataplane.name

    def answered(self, page: str, status: int) -> None:
        """Count an answer of a page of the health server."""
        self._answers[page].labels(str(int(status))).inc()
        self.checked("proxy", page, ok=status == 200)

    def checked(self, name: str, page: str, *, ok: bool) -> None:
        """Note the outcome of a check for /metrics/slis."""
        self._passes.labels(name, page).set(ok)
        self._outcomes.labels(name, page, "success" if ok else "error").inc()


class MetricsServer:
    """Serves the metrics of an agent; `start` and `stop` it once."""

    def __init__(
        self,
        metrics: Metrics,
        sites: Callable[[Handler], Iterable[Site]],
        *,
        configz: Callable[[], Mapping[str, Any]],
        with_debug: bool = False,
        server: HttpServer | None = None,
    ) -> None:
        """Bind the parts; nothing listens yet.

        Args:
            metrics: what /metrics shows.
            sites: where a handler is to answer, see `health.bind.sites_of`; none = nowhere.
            configz: the settings in force, as a KubeProxyConfiguration.
            with_debug: /debug shows what the process is made of.
            server: None = one with the usual patience.
        """
        self._metrics, self._sites, self._configz = metrics, sites, configz
        self._with_debug = with_debug
        self._server = server or HttpServer("metrics")

    def start(self) -> None:
        """Begin to answer."""
        handler = pages(
            {
                "/metrics": lambda request: _exposition(self._metrics.registry),
                "/metrics/slis": lambda request: _exposition(self._metrics.slis),
                "/healthz": self._healthz,
                "/proxyMode": self._proxy_mode,
                "/configz": lambda request: json_response({CONFIGZ_KEY: self._configz()}),
                **(debug.PAGES if self._with_debug else {}),
            }
        )
        self._server.serve(OWNER, tuple(self._sites(handler)))
        self._server.start()

    def stop(self) -> None:
        """Stop answering; returns once nobody collects any more."""
        self._server.stop()

    def _proxy_mode(self, _: Request) -> Response:
        mode = self._metrics.mode
        return text_response(mode) if mode else text_response("no mode serves yet", 503)

    def _healthz(self, _: Request) -> Response:
        # Constant: that this thread answers is all it says.
        self._metrics.checked("ping", "healthz", ok=True)
        return text_response("ok")


def _exposition(registry: CollectorRegistry) -> Response:
    return Response(200, exposition(registry), CONTENT_TYPE, ())
