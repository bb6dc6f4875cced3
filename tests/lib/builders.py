"""Objects of the model for tests: defaults that read as a sentence, keywords for what matters.

make_snapshot(
    make_service("shop/web", make_port(80, node_port=30080), external_policy=LOCAL),
    make_endpoints("shop/web", ready("10.1.0.1", on="node1"), ready("10.2.0.1", on="node2")),
)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ebpf_svc.model.endpoint import Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol, canonical_address, canonical_prefix, family_of
from ebpf_svc.model.service import Service, ServiceName, ServicePort, ServiceType, TrafficPolicy
from ebpf_svc.model.snapshot import NodeFacts, Snapshot

CLUSTER, LOCAL = TrafficPolicy.CLUSTER, TrafficPolicy.LOCAL
NODE = NodeFacts(
    name="node1",
    addresses=("192.168.0.11", "fd00:192::11"),
    local_addresses=("127.0.0.1", "192.168.0.11", "::1", "fd00:192::11", "fe80::11"),
    zone="zone-a",
)
"""The node tests plan for unless they say otherwise."""


def make_name(text: str) -> ServiceName:
    """`namespace/name`, or a name in `default`."""
    namespace, slash, name = text.rpartition("/")
    return ServiceName(namespace if slash else "default", name)


def make_port(
    port: int = 80, name: str = "", *, protocol: str = "TCP", node_port: int = 0
) -> ServicePort:
    """A service port; `make_port(80)` is an unnamed TCP port."""
    return ServicePort(name, Protocol(protocol), port, node_port)


def make_service(
    name: str = "web",
    *ports: ServicePort,
    cluster_ip: str | Iterable[str] = "10.96.0.10",
    type: ServiceType | None = None,
    external_ips: Iterable[str] = (),
    load_balancer_ips: Iterable[str] = (),
    source_ranges: Iterable[str] = (),
    affinity_s: int = 0,
    internal_policy: TrafficPolicy = CLUSTER,
    external_policy: TrafficPolicy = CLUSTER,
    health_check_node_port: int = 0,
) -> Service:
    """A Service; its type is what its fields suggest, its port 80/TCP, unless given."""
    ports = ports or (make_port(),)
    load_balancer_ips = _canonical(load_balancer_ips)
    if type is None:
        type = ServiceType.CLUSTER_IP
        if load_balancer_ips or health_check_node_port:
            type = ServiceType.LOAD_BALANCER
        elif any(port.node_port for port in ports):
            type = ServiceType.NODE_PORT
    return Service(
        name=make_name(name),
        type=type,
        ports=ports,
        cluster_ips=_canonical((cluster_ip,) if isinstance(cluster_ip, str) else cluster_ip),
        external_ips=_canonical(external_ips),
        load_balancer_ips=load_balancer_ips,
        source_ranges=tuple(canonical_prefix(text) for text in source_ranges),
        affinity_s=affinity_s,
        internal_policy=internal_policy,
        external_policy=external_policy,
        health_check_node_port=health_check_node_port,
    )


def ready(
    address: str, on: str = "node2", *, zones: Iterable[str] = (), nodes: Iterable[str] = ()
) -> Endpoint:
    """An endpoint that takes traffic, with hints if given."""
    return Endpoint(
        canonical_address(address),
        node_name=on,
        zone_hints=frozenset(zones),
        node_hints=frozenset(nodes),
    )


def terminating(address: str, on: str = "node2", *, serving: bool = True) -> Endpoint:
    """An endpoint whose pod is being deleted; it still answers unless told otherwise."""
    return Endpoint(
        canonical_address(address), ready=False, serving=serving, terminating=True, node_name=on
    )


def unready(address: str, on: str = "node2", *, serving: bool = False) -> Endpoint:
    """An endpoint that must get no traffic and is not being deleted."""
    return Endpoint(canonical_address(address), ready=False, serving=serving, node_name=on)


def make_endpoint_port(port: int = 8080, name: str = "", *, protocol: str = "TCP") -> EndpointPort:
    """Where endpoints of a slice answer; `make_endpoint_port(8080)` is an unnamed TCP port."""
    return EndpointPort(name, Protocol(protocol), port)


def make_endpoints(
    service: str,
    *endpoints: Endpoint,
    ports: Iterable[EndpointPort] = (make_endpoint_port(),),
    family: Family | None = None,
    name: str = "",
) -> EndpointSlice:
    """A slice of a Service, of its endpoints' family, answering on 8080/TCP unless given."""
    service_name = make_name(service)
    if family is None:
        family = family_of(endpoints[0].address) if endpoints else Family.V4
    return EndpointSlice(
        namespace=service_name.namespace,
        name=name or f"{service_name.name}-{family.label.lower()}",
        service_name=service_name,
        family=family,
        ports=tuple(ports),
        endpoints=endpoints,
    )


def make_snapshot(
    *objects: Service | EndpointSlice, node: NodeFacts = NODE, revision: int = 1
) -> Snapshot:
    """What a store that holds these objects returns."""
    slices: defaultdict[ServiceName, list[EndpointSlice]] = defaultdict(list)
    for object_ in objects:
        if isinstance(object_, EndpointSlice):
            slices[object_.service_name].append(object_)
    return Snapshot(
        node=node,
        services={object_.name: object_ for object_ in objects if isinstance(object_, Service)},
        slices={name: tuple(of_service) for name, of_service in slices.items()},
        revision=revision,
    )


def _canonical(addresses: Iterable[str]) -> tuple[str, ...]:
    return tuple(canonical_address(address) for address in addresses)
