"""Clusters of any size for benchmarks: as parsed objects, and as the manifests they come from."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebpf_svc.model.endpoint import Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import Service, ServiceName, ServicePort, ServiceType
from ebpf_svc.model.snapshot import NodeFacts, Snapshot

NODE = NodeFacts(
    name="node1",
    addresses=("192.168.0.11",),
    local_addresses=("127.0.0.1", "192.168.0.11"),
)
NODES = 20
"""Machines the endpoints are spread over."""
_FIRST_VIPS = {
    Family.V4: ipaddress.ip_address("10.96.0.1"),
    Family.V6: ipaddress.ip_address("fd00:10:96::1"),
}
_FIRST_PODS = {
    Family.V4: ipaddress.ip_address("10.128.0.1"),
    Family.V6: ipaddress.ip_address("fd00:10:128::1"),
}
_FIRST_OTHER_PODS = {
    Family.V4: ipaddress.ip_address("10.64.0.0"),
    Family.V6: ipaddress.ip_address("fd00:10:64::"),
}
"""Addresses of endpoints that replace others."""
_PER_FILE = 1000
"""Services whose manifests share a file."""


@dataclass(frozen=True, slots=True)
class Population:
    """Cluster IP services of one TCP port, each with so many ready endpoints of its own."""

    services: int
    endpoints: int
    family: Family = Family.V4

    def snapshot(self) -> Snapshot:
        """What a store holds once it knows them all."""
        names = [_name(i) for i in range(self.services)]
        return Snapshot(
            node=NODE,
            services={name: self._service(i, name) for i, name in enumerate(names)},
            slices={name: (self._slice(i, name),) for i, name in enumerate(names)},
            revision=1,
        )

    def changed(self, snapshot: Snapshot, number: int) -> Snapshot:
        """The same with one endpoint of one service replaced by a new one.

        Args:
            snapshot: of this population, changed or not.
            number: of the change; each names another service and another address.
        """
        return self._replaced(snapshot, {number * 7919 % self.services: 1}, number)

    def churned(self, snapshot: Snapshot, number: int) -> Snapshot:
        """The same with one endpoint of every hundredth service replaced.

        Args:
            number: of the round; each names other services and addresses.
        """
        chosen = range(number % 100, self.services, 100)
        return self._replaced(snapshot, dict.fromkeys(chosen, 1), number * self.services)

    def rolled_out(self, snapshot: Snapshot, number: int, *, services: int = 100) -> Snapshot:
        """The same with every endpoint of so many services replaced."""
        chosen = [(number * services + i) % self.services for i in range(services)]
        first = number * services * self.endpoints
        return self._replaced(snapshot, dict.fromkeys(chosen, self.endpoints), first)

    def _replaced(self, snapshot: Snapshot, counts: dict[int, int], first: int) -> Snapshot:
        """Replace the last so many endpoints of services by ones with addresses of their own."""
        slices = dict(snapshot.slices)
        for i, count in counts.items():
            name = _name(i)
            (old,) = slices[name]
            kept = old.endpoints[: len(old.endpoints) - count]
            fresh = [
                replace(each, address=str(_FIRST_OTHER_PODS[self.family] + first + n))
                for n, each in enumerate(old.endpoints[len(kept) :])
            ]
            slices[name] = (replace(old, endpoints=(*kept, *fresh)),)
            first += count
        return replace(snapshot, slices=slices, revision=snapshot.revision + 1)

    def write_manifests(self, folder: Path, *, after: int = 0) -> None:
        """Write Services and EndpointSlices as lists of JSON, as `kubectl get -o json` has them.

        Args:
            after: how many services the folder holds already.
        """
        for start in range(after, self.services, _PER_FILE):
            items = list(self._objects(start, min(start + _PER_FILE, self.services)))
            document = {"apiVersion": "v1", "kind": "List", "items": items}
            (folder / f"services-{start:06}.json").write_text(json.dumps(document))

    def objects(self, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """The same objects, one by one."""
        return self._objects(after, self.services)

    def _objects(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        for i in range(first, end):
            yield from self._manifests(i)

    def _service(self, i: int, name: ServiceName) -> Service:
        return Service(
            name=name,
            type=ServiceType.CLUSTER_IP,
            ports=(ServicePort("", Protocol.TCP, 80),),
            cluster_ips=(self._vip(i),),
        )

    def _slice(self, i: int, name: ServiceName) -> EndpointSlice:
        return EndpointSlice(
            namespace=name.namespace,
            name=f"{name.name}-{self.family.label.lower()}",
            service_name=name,
            family=self.family,
            ports=(EndpointPort("", Protocol.TCP, 8080),),
            endpoints=tuple(
                Endpoint(address, node_name=node) for address, node in self._endpoints(i)
            ),
        )

    def _vip(self, i: int) -> str:
        return str(_FIRST_VIPS[self.family] + i)

    def _endpoints(self, i: int) -> Iterator[tuple[str, str]]:
        for j in range(self.endpoints):
            number = i * self.endpoints + j
            yield str(_FIRST_PODS[self.family] + number), f"node{number % NODES + 1}"

    def _manifests(self, i: int) -> list[dict[str, Any]]:
        name = _name(i)
        metadata = {"namespace": name.namespace, "name": name.name}
        return [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": metadata,
                "spec": {"clusterIP": self._vip(i), "ports": [{"port": 80, "targetPort": 8080}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "namespace": name.namespace,
                    "name": f"{name.name}-{self.family.label.lower()}",
                    "labels": {"kubernetes.io/service-name": name.name},
                },
                "addressType": self.family.label,
                "ports": [{"port": 8080, "protocol": "TCP"}],
                "endpoints": [
                    {"addresses": [address], "nodeName": node, "conditions": {"ready": True}}
                    for address, node in self._endpoints(i)
                ],
            },
        ]


def _name(i: int) -> ServiceName:
    return ServiceName("default", f"svc-{i}")
