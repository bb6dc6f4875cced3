"""The source of a cluster's node: an API server, followed as it changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from ebpf_svc.config import KubernetesSettings
from ebpf_svc.log import get_logger
from ebpf_svc.watch.kube import resources, sinks
from ebpf_svc.watch.kube.connection import ApiServer
from ebpf_svc.watch.kube.events import ApiSink
from ebpf_svc.watch.kube.ledger import Ledger
from ebpf_svc.watch.kube.outage import Outage
from ebpf_svc.watch.kube.reflector import Progress, Reflector, Shared
from ebpf_svc.watch.store import Store

log = get_logger(__name__)

STOP_S = 2.0
"""A thread that waits for the network is left behind after this long; it does no harm."""


class KubernetesSource:
    """Keeps a Store in line with an API server, from threads of its own.

    The store is in sync once Services and EndpointSlices were listed (M4) and the node's addresses
    are known or were waited for long enough (N3). While the API server is away, the store keeps
    its state.
    """

    def __init__(self, settings: KubernetesSettings, store: Store) -> None:
        """Prepare; sends nothing yet.

        Args:
            settings: how the API server is reached.
            store: takes the objects; its node name is the Node watched (W3, W7).

        Raises:
            ConfigError: the credentials cannot be used.
        """
        self._settings, self._store = settings, store
        self._server = ApiServer(settings)
        shared = Shared(self._server, Outage(settings.retry_max_s), Ledger(store), settings)
        ours = settings.service_proxy_name
        self._reflectors: Mapping[str, Reflector[Any, Any]] = {
            "Node": Reflector(resources.node(store.node_name), sinks.NodeSink(store), shared),
            "Service": Reflector(resources.services(ours), sinks.ServiceSink(store), shared),
            "EndpointSlice": Reflector(resources.slices(), sinks.SliceSink(store), shared),
            "ServiceCIDR": Reflector(
                resources.service_cidrs(), sinks.ServiceCidrSink(store), shared
            ),
        }
        self.events = ApiSink(self._server, store.node_name)
        """Sends Events to the same API server."""
        self._patience = threading.Timer(settings.node_wait_s, self._give_up_on_node)
        self._patience.daemon = True

    @property
    def progress(self) -> Mapping[str, Progress]:
        """How it goes, by kind."""
        return {kind: reflector.progress for kind, reflector in self._reflectors.items()}

    def start(self) -> None:
        """Begin to list and watch; returns at once."""
        self._store.await_node()
        self._patience.start()
        self.events.start()
        for reflector in self._reflectors.values():
            reflector.start()

    def stop(self) -> None:
        """Stop following; the store keeps what it has."""
        self._patience.cancel()
        for reflector in self._reflectors.values():
            reflector.stop()
        for reflector in self._reflectors.values():
            reflector.join(STOP_S)
        self.events.stop()
        self._server.close()

    def _give_up_on_node(self) -> None:
        if self._store.give_up_on_node():
            log.warning(
                "watch.node-unknown",
                object=f"Node {self._store.node_name}",
                reason=f"no address of this node after {self._settings.node_wait_s:g} s",
            )
