"""The node's health server: /healthz and /livez (HS1-HS6), and every Service's health check.

`ProxyHealth` is told of syncs and answers whoever asks. One thread serves all of it, apart from the
sync loop's: a loop that hangs is what it must be able to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus

from ebpf_svc.errors import DataplaneError
from ebpf_svc.health.http import Handler, Request, Response, json_response, pages
from ebpf_svc.health.server import HttpServer, Site
from ebpf_svc.health.services import ServiceHealth
from ebpf_svc.health.state import Health, HealthState
from ebpf_svc.model.service import ServiceName
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.sync import Synced

OWNER = "proxy"

OnReply = Callable[[str, int], None]
"""Told of every answer: the path without its slash, and the status."""


class ProxyHealth:
    """Observes the sync loop (`sync.SyncObserver`) and serves what it learns."""

    def __init__(
        self,
        state: HealthState,
        sites: Callable[[Handler], Iterable[Site]],
        *,
        on_reply: OnReply = lambda page, status: None,
        on_service_failure: Callable[[ServiceName, str], None] = lambda service, why: None,
        server: HttpServer | None = None,
    ) -> None:
        """Bind the parts; nothing listens yet.

        Args:
            state: fed here.
            sites: where a handler is to answer, see `bind.sites_of`; none = nowhere, while
                health-check node ports are served all the same.
            on_reply: for metrics.
            on_service_failure: a Service's health-check node port cannot be had.
            server: None = one with the usual patience.
        """
        self.state = state
        self._sites, self._on_reply = sites, on_reply
        self._server = server or HttpServer("health")
        self._services = ServiceHealth(self._server, state.is_healthy, on_service_failure)

    def start(self) -> None:
        """Begin to answer."""
        handler = pages({"/healthz": self._healthz, "/livez": self._livez})
        self._server.serve(OWNER, tuple(self._sites(handler)))
        self._server.start()

    def stop(self) -> None:
        """Stop answering and give every port back."""
        self._server.stop()

    # -- what the sync loop tells ------------------------------------------------------------------

    def started(self) -> None:
        """Starting to sync counts as a sync (HS4)."""
        for family in self.state.families:
            self.state.updated(family)

    def queued(self, snapshot: Snapshot) -> None:
        """Every family waits: one apply carries both."""
        self.state.set_node_eligible(snapshot.node.eligible)
        for family in self.state.families:
            self.state.queued(family)

    def applied(self, synced: Synced) -> None:
        """Both families are up to date.

        A service port that could not be written does not make its family unhealthy: the others
        forward, and a load balancer must not shun a node, or all of them, for one bad Service. That
        Service's own health check fails (H5).
        """
        for family in self.state.families:
            self.state.updated(family)
        failing = {(key.port_name.service, key.family) for key in synced.failed_keys()}
        self._services.sync(synced.desired.health_checks, failing)

    def failed(self, error: DataplaneError) -> None:
        """Nothing is known to be done: what waits goes on ageing."""

    # -- pages -------------------------------------------------------------------------------------

    def _healthz(self, _: Request) -> Response:
        health = self.state.health()
        return self._answer("healthz", health, ok=health.healthy and health.node_eligible)

    def _livez(self, _: Request) -> Response:
        health = self.state.health()
        return self._answer("livez", health, ok=health.healthy)

    def _answer(self, page: str, health: Health, *, ok: bool) -> Response:
        status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
        self._on_reply(page, status)
        return json_response(health.as_answered(ok=ok).body(with_node=page == "healthz"), status)
