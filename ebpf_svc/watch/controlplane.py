"""Do for a folder of manifests what the control plane does for a cluster.

Pure but for its memory: it remembers allocations and what it made, so that what did not change
stays the same object. It reads and writes no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.net import family_of
from ebpf_svc.model.service import Service, ServiceName, ServicePort
from ebpf_svc.model.snapshot import NodeFacts, Problem
from ebpf_svc.watch.allocate import Allocator, Holding, port_key
from ebpf_svc.watch.declared import (
    Declared,
    DeclaredEndpoints,
    DeclaredNode,
    DeclaredPod,
    DeclaredService,
    DeclaredSlice,
    ObjectRef,
)
from ebpf_svc.watch.generate import Generator
from ebpf_svc.watch.manifests import Parsed
from ebpf_svc.watch.raw import Kind


@dataclass(frozen=True, slots=True)
class ManifestState:
    """What manifests say, in model words: the store takes it over."""

    services: Mapping[ServiceName, Service]
    slices: Mapping[ServiceName, tuple[EndpointSlice, ...]]
    problems: tuple[Problem, ...]
    node: NodeFacts
    """Without `local_addresses`, which only the kernel knows."""


class _Inventory:
    """All declared objects; the first of a name counts, another is a problem."""

    def __init__(self, files: Iterable[tuple[str, Iterable[Parsed]]]) -> None:
        self.problems: list[Problem] = []
        self.invalid: list[ObjectRef] = []
        self._files = [(source, list(documents)) for source, documents in files]
        self._sources: dict[ObjectRef, str] = {}
        objects: dict[ObjectRef, Declared] = {}
        again: list[tuple[str, ObjectRef]] = []
        for source, documents in self._files:
            for parsed in documents:
                self.problems += parsed.problems
                self.invalid += parsed.invalid
                for declared in parsed.objects:
                    if objects.setdefault(declared.ref, declared) is not declared:
                        again.append((source, declared.ref))
        for source, ref in again:
            said = f'Duplicate value: "{ref.name}": declared in {self.source(ref)} already'
            self.problems.append(Problem(source, str(ref), "metadata.name", said))
        by_type: defaultdict[type, list[Any]] = defaultdict(list)
        for declared in objects.values():
            by_type[type(declared)].append(declared)
        services: list[DeclaredService] = by_type[DeclaredService]
        self.services = {service.name: service for service in services}
        self.slices: list[DeclaredSlice] = by_type[DeclaredSlice]
        self.endpoints: list[DeclaredEndpoints] = by_type[DeclaredEndpoints]
        self.pods: list[DeclaredPod] = sorted(by_type[DeclaredPod], key=lambda pod: pod.ref)
        nodes: list[DeclaredNode] = by_type[DeclaredNode]
        self.nodes = {node.ref.name: node for node in nodes}

    def source(self, ref: ObjectRef) -> str:
        """The file an object counts from; only problems ask, so the index is made on demand."""
        if not self._sources:
            for source, documents in self._files:
                for parsed in documents:
                    for declared in parsed.objects:
                        self._sources.setdefault(declared.ref, source)
        return self._sources[ref]

    def mirrored(self) -> Iterator[EndpointSlice]:
        """Slices of Endpoints whose Service has no selector to make its own."""
        for endpoints in self.endpoints:
            service = self.services.get(endpoints.service_name)
            if service is not None and not service.selector and service.has_cluster_ips:
                yield from endpoints.slices


class ControlPlane:
    """Turns declared objects into what a cluster's API would show to this node."""

    def __init__(self, node_name: str, allocator: Allocator) -> None:
        self._node_name, self._allocator = node_name, allocator
        self._generator = Generator()
        self._stored: dict[ServiceName, tuple[DeclaredService, Holding, Service]] = {}
        self._holdings: Mapping[ServiceName, Holding] = {}

    def reconcile(
        self, files: Iterable[tuple[str, Iterable[Parsed]]], *, complete: bool = True
    ) -> ManifestState:
        """Bring everything in line with the manifests.

        Args:
            files: name and contents of each, in the order of names.
            complete: nothing is missing; else no allocation is taken back.
        """
        inventory = _Inventory(files)
        reserved = {
            ServiceName(ref.namespace, ref.name)
            for ref in inventory.invalid
            if ref.kind is Kind.SERVICE
        }
        outcome = self._allocator.assign(inventory.services, reserved, release=complete)
        for name, faults in outcome.refused.items():
            ref = inventory.services[name].ref
            source = inventory.source(ref)
            inventory.problems += (
                Problem(source, str(ref), fault.field, fault.message) for fault in faults
            )
        self._store(inventory.services, outcome.holdings)
        return ManifestState(
            services={
                name: service
                for name, (declared, _, service) in self._stored.items()
                if not declared.foreign
            },
            slices=self._slices(inventory, outcome.holdings),
            problems=tuple(sorted(inventory.problems, key=lambda problem: problem.source)),
            node=self._node(inventory.nodes.get(self._node_name)),
        )

    def _store(
        self,
        services: Mapping[ServiceName, DeclaredService],
        holdings: Mapping[ServiceName, Holding],
    ) -> None:
        if holdings is self._holdings:
            return
        self._holdings = holdings
        before, self._stored = self._stored, {}
        for name, holding in holdings.items():
            declared = services[name]
            entry = before.get(name)
            if entry is None or entry[0] is not declared or entry[1] != holding:
                entry = (declared, holding, _service(declared, holding))
            self._stored[name] = entry

    def _slices(
        self, inventory: _Inventory, holdings: Mapping[ServiceName, Holding]
    ) -> Mapping[ServiceName, tuple[EndpointSlice, ...]]:
        selecting = (
            (declared, tuple(map(family_of, holdings[name].cluster_ips)))
            for name, declared in inventory.services.items()
            if declared.selector and name in holdings
        )
        zones = {name: node.zone for name, node in inventory.nodes.items()}
        grouped: dict[ServiceName, list[EndpointSlice]] = {}
        generated = self._generator.slices(selecting, inventory.pods, zones)
        written = (each.slice for each in inventory.slices if each.slice is not None)
        for source in (written, inventory.mirrored(), generated):
            for item in source:
                grouped.setdefault(item.service_name, []).append(item)
        return {
            name: tuple(sorted(items, key=attrgetter("name")) if len(items) > 1 else items)
            for name, items in grouped.items()
        }

    def _node(self, declared: DeclaredNode | None) -> NodeFacts:
        if declared is None:
            return NodeFacts(self._node_name)
        return NodeFacts(
            name=self._node_name,
            addresses=declared.addresses,
            zone=declared.zone,
            pod_cidrs=declared.pod_cidrs,
            eligible=declared.eligible,
        )


def _service(declared: DeclaredService, holding: Holding) -> Service:
    node_ports = dict(holding.node_ports)
    ports = tuple(
        ServicePort(port.name, port.protocol, port.port, node_ports.get(port_key(port), 0))
        for port in declared.ports
    )
    return Service(
        name=declared.name,
        type=declared.type,
        ports=ports,
        cluster_ips=holding.cluster_ips,
        external_ips=declared.external_ips,
        load_balancer_ips=declared.load_balancer_ips,
        source_ranges=declared.source_ranges,
        affinity_s=declared.affinity_s,
        internal_policy=declared.internal_policy,
        external_policy=declared.external_policy,
        health_check_node_port=holding.health_check_node_port,
    )
