"""The health-check node ports: whether this node has endpoints of one Service (H1-H8, HS10).

A load balancer asks `node:healthCheckNodePort` and sends traffic where 200 comes back. What is
served follows the plan that the kernel was told last, never one ahead of it (H7).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from http import HTTPStatus

from ebpf_svc.health.http import Request, Response, json_response
from ebpf_svc.health.server import HttpServer, Site
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import HealthCheck
from ebpf_svc.model.net import Family
from ebpf_svc.model.service import ServiceName

OWNER = "services"

log = get_logger(__name__)

Key = tuple[ServiceName, Family]


class ServiceHealth:
    """The health checks of all Services, served by a server that others may use too."""

    def __init__(
        self,
        server: HttpServer,
        is_healthy: Callable[[], bool],
        on_failure: Callable[[ServiceName, str], None] = lambda service, why: None,
    ) -> None:
        """Serve nothing yet.

        Args:
            server: answers; starting and stopping it is its owner's.
            is_healthy: whether the proxy is, as `/livez` has it (H5).
            on_failure: told of a Service whose port cannot be had, and why (H7).
        """
        self._server, self._is_healthy, self._on_failure = server, is_healthy, on_failure
        self._served: list[tuple[ServiceName, Family, int, tuple[str, ...]]] = []
        self._counts: dict[Key, int] = {}
        self._failing: frozenset[Key] = frozenset()

    def sync(self, checks: tuple[HealthCheck, ...], failing: Collection[Key] = ()) -> None:
        """Serve these and no others; returns at once.

        Args:
            checks: of the plan the kernel was told.
            failing: Services the kernel could not be told of: their checks fail, though the others
                hold.
        """
        self._failing = frozenset(failing)
        # Replaced, not changed: the server's thread reads it.
        self._counts = {
            (check.service, check.family): check.local_endpoint_count for check in checks
        }
        served = [check[:4] for check in checks]
        if served == self._served:
            self._server.retry()
            return
        self._served = served
        self._server.serve(
            OWNER,
            [
                Site(
                    f"{check.service}/{check.family.label}",
                    address,
                    check.port,
                    self._handler(check.service, check.family),
                    self._cannot_listen(check.service),
                )
                for check in checks
                for address in check.addresses
            ],
        )

    def _handler(self, service: ServiceName, family: Family) -> Callable[[Request], Response]:
        def answer(_: Request) -> Response:
            # A Service that went while the request was under way has no endpoints here: kube-proxy
            # would answer an empty 200 (HS10).
            count = self._counts.get((service, family), 0)
            healthy = self._is_healthy() and (service, family) not in self._failing
            return json_response(
                {
                    "service": {"namespace": service.namespace, "name": service.name},
                    "localEndpoints": count,
                    "serviceProxyHealthy": healthy,
                },
                HTTPStatus.OK if count and healthy else HTTPStatus.SERVICE_UNAVAILABLE,
                (("X-Load-Balancing-Endpoint-Weight", str(count)),),
            )

        return answer

    def _cannot_listen(self, service: ServiceName) -> Callable[[Site, OSError], None]:
        def report(site: Site, error: OSError) -> None:
            why = f"{site}: {error.strerror or error}"
            log.warning("health.port", service=str(service), address=str(site), error=str(error))
            self._on_failure(service, why)

        return report
