"""The slices the control plane would write for Services with a selector (rules E11, E12)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import NamedTuple

from ebpf_svc.model.endpoint import NO_HINTS, Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, family_of
from ebpf_svc.model.service import ServiceName
from ebpf_svc.watch.declared import DeclaredPod, DeclaredPort, DeclaredService, Distribution
from ebpf_svc.watch.endpoints import slice_name


class _Made(NamedTuple):
    """Slices, and what they were made from."""

    service: DeclaredService
    families: tuple[Family, ...]
    pods: list[DeclaredPod]
    slices: tuple[EndpointSlice, ...]


class Generator:
    """Makes slices, and makes them anew only when something they were made from has changed."""

    def __init__(self) -> None:
        self._made: dict[ServiceName, _Made] = {}
        self._pods: Sequence[DeclaredPod] = ()
        self._zones: Mapping[str, str] = {}
        self._index: dict[tuple[str, tuple[str, str]], list[DeclaredPod]] = {}

    def slices(
        self,
        services: Iterable[tuple[DeclaredService, tuple[Family, ...]]],
        pods: Sequence[DeclaredPod],
        zones: Mapping[str, str],
    ) -> Iterator[EndpointSlice]:
        """Every slice of these Services.

        Args:
            services: those with a selector, each with the families it has cluster IPs in.
            pods: all valid pods, in a stable order.
            zones: zone by node name.
        """
        self._index_pods(pods)
        before = self._made if zones == self._zones else {}
        self._zones, self._made = zones, {}
        for service, families in services:
            chosen = self._select(service)
            made = before.get(service.name)
            if (
                made is None
                or made.service is not service
                or made.families != families
                or not _same(made.pods, chosen)
            ):
                slices = tuple(_slices(service, families, chosen, zones))
                made = _Made(service, families, chosen, slices)
            self._made[service.name] = made
            yield from made.slices

    def _index_pods(self, pods: Sequence[DeclaredPod]) -> None:
        if _same(pods, self._pods):
            return
        self._pods, self._index = pods, {}
        for pod in pods:
            for label in pod.labels:
                self._index.setdefault((pod.ref.namespace, label), []).append(pod)

    def _select(self, service: DeclaredService) -> list[DeclaredPod]:
        """Pods of the Service's own namespace that have all of its labels."""
        labels = service.selector
        lists = [self._index.get((service.name.namespace, label), []) for label in labels]
        wanted = set(labels)
        return [pod for pod in min(lists, key=len) if wanted <= pod.labels]


def _same(one: Sequence[DeclaredPod], other: Sequence[DeclaredPod]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _slices(
    service: DeclaredService,
    families: tuple[Family, ...],
    pods: Sequence[DeclaredPod],
    zones: Mapping[str, str],
) -> Iterator[EndpointSlice]:
    for family in families:
        # A named target port may have another number in each pod: such pods share no slice (E3).
        groups: dict[tuple[EndpointPort, ...], list[Endpoint]] = {}
        for pod in pods:
            address = next((a for a in pod.addresses if family_of(a) is family), None)
            ports = _ports(service.ports, pod)
            if address and ports:
                endpoint = _endpoint(service, pod, address, zones)
                groups.setdefault(ports, []).append(endpoint)
        for ports, endpoints in sorted(groups.items()):
            yield EndpointSlice(
                namespace=service.name.namespace,
                name=slice_name(service.name.name, family, ports),
                service_name=service.name,
                family=family,
                ports=ports,
                endpoints=tuple(endpoints),
            )


def _ports(ports: Iterable[DeclaredPort], pod: DeclaredPod) -> tuple[EndpointPort, ...]:
    """The Service's ports as this pod has them; a name the pod does not know is left out."""
    found = []
    for port in ports:
        number = port.target
        if isinstance(number, str):
            number = next(
                (p.port for p in pod.ports if (p.name, p.protocol) == (port.target, port.protocol)),
                0,
            )
        if number:
            found.append(EndpointPort(port.name, port.protocol, number))
    return tuple(found)


def _endpoint(
    service: DeclaredService, pod: DeclaredPod, address: str, zones: Mapping[str, str]
) -> Endpoint:
    # E11: publishNotReadyAddresses forces ready for unready and terminating pods alike.
    ready = service.publish_not_ready or (pod.ready and not pod.terminating)
    zone_hints = node_hints = NO_HINTS
    if ready and service.distribution is not Distribution.NONE:
        zone = zones.get(pod.node_name)
        zone_hints = frozenset((zone,)) if zone else NO_HINTS
        if service.distribution is Distribution.SAME_NODE and pod.node_name:
            node_hints = frozenset((pod.node_name,))
    return Endpoint(
        address=address,
        ready=ready,
        serving=pod.ready,
        terminating=pod.terminating,
        node_name=pod.node_name,
        zone_hints=zone_hints,
        node_hints=node_hints,
    )
