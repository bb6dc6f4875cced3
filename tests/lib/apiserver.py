"""A watched API server for tests: objects in one line, a source that runs, faults that are over.

with watching(server) as seen:
    server.put("Service", service("shop/web"))
    seen.serves("shop/web")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.watch.kubernetes import KubernetesSource
from ebpf_svc.watch.store import Store
from tests.lib.waiting import eventually

Item = dict[str, Any]
NODE = "node1"


def service(name: str, address: str = "10.96.0.10", *ports: int, **spec: Any) -> Item:
    """A Service as the API server returns it; keywords replace fields of its spec, a null one goes.

    `labels` are the object's; `status` is its load balancer's list of ingresses.
    """
    status, labels = spec.pop("status", []), spec.pop("labels", {})
    listed = [
        {"name": f"p{port}", "protocol": "TCP", "port": port, "targetPort": port}
        for port in ports or (80,)
    ]
    families = ["IPv6" if ":" in address else "IPv4"]
    whole = {
        "type": "ClusterIP",
        "clusterIP": address,
        "clusterIPs": [address],
        "ipFamilies": families,
        "ipFamilyPolicy": "SingleStack",
        "ports": listed,
        "sessionAffinity": "None",
        "internalTrafficPolicy": "Cluster",
        **spec,
    }
    return {
        "metadata": {**_names(name), "uid": f"uid-{name}", "labels": labels},
        "spec": {key: value for key, value in whole.items() if value is not None},
        "status": {"loadBalancer": {"ingress": status} if status else {}},
    }


def endpoint_slice(
    name: str,
    *addresses: str,
    of: str = "web",
    port: int = 8080,
    labels: dict[str, str] | None = None,
    **fields: Any,
) -> Item:
    """A slice of ready endpoints on other nodes; keywords replace its fields."""
    return {
        "metadata": {
            **_names(name),
            "labels": {"kubernetes.io/service-name": of} if labels is None else labels,
        },
        "addressType": "IPv6" if any(":" in each for each in addresses) else "IPv4",
        "endpoints": [
            {"addresses": [each], "conditions": {"ready": True}, "nodeName": "node2"}
            for each in addresses
        ],
        "ports": [{"name": "p80", "port": port, "protocol": "TCP"}],
        **fields,
    }


def node(name: str = NODE, *addresses: str, zone: str = "zone-a", **spec: Any) -> Item:
    """A Node with these InternalIPs."""
    listed = [{"type": "InternalIP", "address": each} for each in addresses or ("192.168.0.11",)]
    return {
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone} if zone else {}},
        "spec": {"podCIDRs": ["10.244.1.0/24"], **spec},
        "status": {"addresses": [{"type": "Hostname", "address": name}, *listed]},
    }


def _names(name: str) -> Item:
    namespace, slash, bare = name.rpartition("/")
    return {"namespace": namespace if slash else "default", "name": bare}


class Seen:
    """What a running source has put into its store."""

    def __init__(self, store: Store, source: KubernetesSource) -> None:
        self.store, self.source = store, source

    @property
    def now(self) -> Snapshot | None:
        return self.store.snapshot()

    @property
    def services(self) -> set[str]:
        """Names of all Services with an address; others serve nobody (F1, F2)."""
        snapshot = self.now
        services = snapshot.services.items() if snapshot else ()
        return {str(name) for name, service in services if service.cluster_ips}

    @property
    def addresses(self) -> set[str]:
        """Addresses of all endpoints."""
        snapshot = self.now
        slices = snapshot.slices.values() if snapshot else ()
        return {e.address for of_service in slices for each in of_service for e in each.endpoints}

    @property
    def problems(self) -> list[str]:
        """What is wrong, as printed."""
        snapshot = self.now
        return [str(problem) for problem in snapshot.problems] if snapshot else []

    def serves(self, *expected: str, within_s: float = 5.0) -> None:
        """Wait until these are all the Services there are."""
        wanted = set(expected)
        eventually(lambda: self.services, until=lambda now: now == wanted, within_s=within_s)

    def reaches(self, *expected: str, within_s: float = 5.0) -> None:
        """Wait until these are all the endpoints' addresses there are."""
        wanted = set(expected)
        eventually(lambda: self.addresses, until=lambda now: now == wanted, within_s=within_s)

    def becomes(self, look: Callable[[Snapshot], object], *, within_s: float = 5.0) -> Snapshot:
        """Wait until the snapshot is as wanted."""
        found = eventually(
            lambda: self.now, until=lambda s: s is not None and look(s), within_s=within_s
        )
        assert found is not None
        return found


@contextmanager
def watching(server: MockApiServer, *, node_name: str = NODE, **settings: Any) -> Iterator[Seen]:
    """Run a source against the server; it is stopped at the end."""
    store = Store(node_name)
    given = {"master": server.url, "node_wait_s": 5.0, "retry_max_s": 0.1, **settings}
    source = KubernetesSource(KubernetesSettings(**given), store)
    source.start()
    try:
        yield Seen(store, source)
    finally:
        source.stop()


@contextmanager
def running(**server: Any) -> Iterator[MockApiServer]:
    """A server with one Service, its slice and this node."""
    mock = MockApiServer(**server).start()
    try:
        mock.put("Node", node())
        mock.put("Service", service("shop/web"))
        mock.put("EndpointSlice", endpoint_slice("shop/web-a", "10.244.2.1"))
        yield mock
    finally:
        mock.close()
