"""Where watched objects go in the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Protocol, TypeVar

from ebpf_svc.log import get_logger
from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.service import Service, ServiceName
from ebpf_svc.model.snapshot import NodeFacts
from ebpf_svc.watch.kube.decode import Key
from ebpf_svc.watch.store import Store

log = get_logger(__name__)

ValueT = TypeVar("ValueT")
_by_name = attrgetter("name")


class Sink(Protocol[ValueT]):
    """Where objects go."""

    def get(self, key: Key) -> ValueT | None:
        """The value there is, if any."""

    def replace(self, values: Mapping[Key, ValueT]) -> None:
        """Take these for all there are."""

    def put(self, key: Key, value: ValueT) -> None:
        """Add or replace one."""

    def delete(self, key: Key) -> None:
        """Forget one; unknown ones are none."""


class ServiceSink:
    """Services, in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, key: Key) -> Service | None:
        return self._store.find_service(ServiceName(*key))

    def replace(self, values: Mapping[Key, Service]) -> None:
        self._store.replace(services={each.name: each for each in values.values()})

    def put(self, key: Key, value: Service) -> None:
        self._store.put_service(value)

    def delete(self, key: Key) -> None:
        self._store.delete_service(ServiceName(*key))


class SliceSink:
    """EndpointSlices, in the store by their Service."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, key: Key) -> EndpointSlice | None:
        return self._store.find_slice(*key)

    def replace(self, values: Mapping[Key, EndpointSlice]) -> None:
        by_service: defaultdict[ServiceName, list[EndpointSlice]] = defaultdict(list)
        for each in values.values():
            by_service[each.service_name].append(each)
        self._store.replace(
            slices={name: tuple(sorted(found, key=_by_name)) for name, found in by_service.items()}
        )

    def put(self, key: Key, value: EndpointSlice) -> None:
        self._store.put_slice(value)

    def delete(self, key: Key) -> None:
        self._store.delete_slice(*key)


class NodeSink:
    """Our own Node, in the store; a deleted one stays as it was (N4, N5)."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last: NodeFacts | None = None

    def get(self, key: Key) -> NodeFacts | None:
        return self._last

    def replace(self, values: Mapping[Key, NodeFacts]) -> None:
        for key, value in values.items():
            self.put(key, value)
        if not values and self._last is not None:
            self.delete(("", self._last.name))

    def put(self, key: Key, value: NodeFacts) -> None:
        last = self._last
        if last is not None and last.addresses != value.addresses:
            log.warning(
                "watch.node-addresses", object=f"Node {value.name}", addresses=value.addresses
            )
        self._last = value
        self._store.replace(node=value)

    def delete(self, key: Key) -> None:
        log.warning("watch.node-deleted", object=f"Node {key[1]}")
        if self._last is not None:
            # Load balancers must not send traffic to a node nobody knows (N6).
            self._store.replace(node=replace(self._last, eligible=False))


class ServiceCidrSink:
    """ServiceCIDRs, in the store as one sorted tuple of prefixes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._values: dict[Key, tuple[str, ...]] = {}

    def get(self, key: Key) -> tuple[str, ...] | None:
        return self._values.get(key)

    def replace(self, values: Mapping[Key, tuple[str, ...]]) -> None:
        self._values = dict(values)
        self._publish()

    def put(self, key: Key, value: tuple[str, ...]) -> None:
        self._values[key] = value
        self._publish()

    def delete(self, key: Key) -> None:
        self._values.pop(key, None)
        self._publish()

    def _publish(self) -> None:
        prefixes = {prefix for found in self._values.values() for prefix in found}
        self._store.replace(service_cidrs=tuple(sorted(prefixes)))
