"""Hypothesis strategies for values of the model, shared by the laws of plan and dataplanes.

Address and name pools are small on purpose: collisions and reuse are what break dataplanes.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from hypothesis import strategies as st

from ebpf_svc.model.desired import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.endpoint import Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import EVERYWHERE, Family, Protocol, Sources
from ebpf_svc.model.service import (
    Service,
    ServiceName,
    ServicePort,
    ServicePortName,
    ServiceType,
    TrafficPolicy,
)
from ebpf_svc.model.snapshot import NodeFacts, Snapshot
from ebpf_svc.plan.options import PlanOptions

families = st.sampled_from(list(Family))
protocols = st.sampled_from(list(Protocol))
sources = st.integers(0, 7).map(Sources)
ports = st.sampled_from([1, 53, 80, 443, 30080, 65535])
affinities_s = st.sampled_from([0, 0, 1, 10_800, 86_400])


def addresses(family: Family, network: int = 0, *, count: int = 6) -> st.SearchStrategy[str]:
    """One of `count` neighbouring addresses; other networks have others."""
    base = f"10.{network}.0.0" if family is Family.V4 else f"fd00:{network:x}::"
    first = ipaddress.ip_address(base) + 1
    return st.sampled_from([str(first + index) for index in range(count)])


def prefixes(family: Family) -> st.SearchStrategy[str]:
    """A prefix with host bits cleared, of any length but 0 (which means no filter)."""
    pool = {
        Family.V4: [
            "10.0.0.0/8",
            "10.3.0.0/16",
            "192.168.0.11/32",
            "203.0.113.0/24",
            "128.0.0.0/1",
        ],
        Family.V6: ["fd00::/8", "fd00:3::/32", "fd00:192::11/128", "2001:db8::/33", "8000::/1"],
    }
    return st.sampled_from(pool[family])


# -- what a dataplane is given ---------------------------------------------------------------------


@st.composite
def backends(draw: st.DrawFn, family: Family, *, max_size: int = 5) -> tuple[Backend, ...]:
    """Backends of one service port: in any of the lists, or draining; sorted, distinct."""
    drawn = draw(
        st.lists(
            st.tuples(
                addresses(family, 1),
                st.sampled_from([80, 8080, 65535]),
                st.booleans(),
                st.booleans(),
            ),
            unique_by=lambda item: item[:2],
            max_size=max_size,
        )
    )
    return tuple(Backend(*item) for item in sorted(drawn))


@st.composite
def service_plans(
    draw: st.DrawFn, key: PlanKey, frontend_keys: tuple[FrontendKey, ...]
) -> ServicePlan:
    """A plan for a service port with just these frontends.

    VIPs share one set of source ranges, and `has_endpoints` follows from the lists as far as they
    decide it.
    """
    ranges = draw(
        st.none()
        | st.lists(prefixes(key.family), unique=True, min_size=1, max_size=3).map(
            lambda texts: tuple(sorted(texts))
        )
    )
    treatments = st.tuples(st.sampled_from(list(FrontendKind)), sources, sources)
    frontends = [
        Frontend(
            frontend_key,
            kind,
            local_for,
            masquerade_for,
            ranges if kind is FrontendKind.LOAD_BALANCER else None,
        )
        for frontend_key in sorted(frontend_keys)
        for kind, local_for, masquerade_for in [draw(treatments)]
    ]
    chosen = draw(backends(key.family))
    usable = any(backend.in_cluster or backend.in_local for backend in chosen)
    return ServicePlan(
        key=key,
        frontends=tuple(frontends),
        backends=chosen,
        has_endpoints=usable or draw(st.booleans()),
        affinity_s=draw(affinities_s),
    )


@st.composite
def desired_states(
    draw: st.DrawFn,
    *,
    of_families: tuple[Family, ...] = (Family.V4, Family.V6),
    of_protocols: tuple[Protocol, ...] = (Protocol.TCP, Protocol.UDP),
    max_plans: int = 5,
) -> DesiredState:
    """A state any backend must be able to hold: every frontend belongs to one plan.

    Args:
        draw: given by hypothesis.
        of_families: families to plan in.
        of_protocols: protocols to plan with; leave out what a backend cannot carry.
        max_plans: service ports at most.
    """
    plan_keys = st.builds(
        PlanKey,
        st.builds(
            ServicePortName,
            st.just("default"),
            st.sampled_from(["api", "web"]),
            st.sampled_from(["", "http"]),
            st.sampled_from(of_protocols),
        ),
        st.sampled_from(of_families),
    )
    plans: dict[PlanKey, ServicePlan] = {}
    taken: set[FrontendKey] = set()
    for key in draw(st.lists(plan_keys, unique=True, max_size=max_plans)):
        wanted = draw(
            st.lists(st.tuples(addresses(key.family), ports), unique=True, min_size=1, max_size=4)
        )
        frontend_keys = {
            FrontendKey(address, port, key.port_name.protocol) for address, port in wanted
        } - taken
        if frontend_keys:
            taken |= frontend_keys
            plans[key] = draw(service_plans(key, tuple(frontend_keys)))
    return DesiredState(plans)


@st.composite
def desired_sequences(
    draw: st.DrawFn,
    *,
    max_size: int = 4,
    of_families: tuple[Family, ...] = (Family.V4, Family.V6),
    of_protocols: tuple[Protocol, ...] = (Protocol.TCP, Protocol.UDP),
) -> list[DesiredState]:
    """States to apply one after the other; as the planner does, equal plans are the same object.

    Frontends move between service ports from state to state, and some plans stay as they were.
    """
    one = desired_states(of_families=of_families, of_protocols=of_protocols)
    states: list[DesiredState] = []
    last: dict[PlanKey, ServicePlan] = {}
    for revision, fresh in enumerate(draw(st.lists(one, min_size=1, max_size=max_size)), start=1):
        kept = {
            key: plan
            for key, plan in last.items()
            if key not in fresh.plans and draw(st.booleans())
        }
        held = {frontend.key for plan in kept.values() for frontend in plan.frontends}
        plans = dict(kept)
        for key, plan in fresh.plans.items():
            frontends = tuple(item for item in plan.frontends if item.key not in held)
            if frontends:
                now = replace(plan, frontends=frontends)
                plans[key] = last[key] if last.get(key) == now else now
        states.append(DesiredState(plans, revision=revision))
        last = plans
    return states


# -- what the planner is given ---------------------------------------------------------------------

service_names = st.builds(
    ServiceName, st.sampled_from(["default", "shop"]), st.sampled_from(["api", "web"])
)
policies = st.sampled_from(list(TrafficPolicy))
node_names = st.sampled_from(["", "node1", "node2"])
zones = st.sampled_from(["", "zone-a", "zone-b"])
_PORT_NAMES = ("", "http", "dns")


@st.composite
def services(draw: st.DrawFn, name: ServiceName) -> Service:
    """A Service the API would accept, give or take; its addresses collide with other Services'."""

    def of_both(network: int, count: int, max_size: int) -> tuple[str, ...]:
        either = st.one_of(*(addresses(family, network, count=count) for family in Family))
        return tuple(draw(st.lists(either, unique=True, max_size=max_size)))

    names = draw(st.lists(st.sampled_from(_PORT_NAMES), unique=True, min_size=1, max_size=2))
    return Service(
        name=name,
        type=draw(st.sampled_from(list(ServiceType))),
        ports=tuple(
            ServicePort(
                port_name,
                draw(protocols),
                draw(st.sampled_from([80, 30080])),
                draw(st.sampled_from([0, 0, 30080, 30081])),
            )
            for port_name in names
        ),
        cluster_ips=tuple(
            draw(addresses(family, 96, count=3)) for family in Family if draw(st.booleans())
        ),
        external_ips=of_both(97, 2, 2),
        load_balancer_ips=of_both(97, 2, 2),
        source_ranges=tuple(
            draw(st.lists(st.one_of(*map(prefixes, Family)), unique=True, max_size=2))
        ),
        affinity_s=draw(affinities_s),
        internal_policy=draw(policies),
        external_policy=draw(policies),
        health_check_node_port=draw(st.sampled_from([0, 32000])),
    )


@st.composite
def endpoints(draw: st.DrawFn, family: Family) -> Endpoint:
    """An endpoint in any condition, kube-proxy's impossible ones included."""
    return Endpoint(
        draw(addresses(family, 1, count=4)),
        ready=draw(st.booleans()),
        serving=draw(st.booleans()),
        terminating=draw(st.booleans()),
        node_name=draw(node_names),
        zone_hints=draw(st.frozensets(st.sampled_from(["zone-a", "zone-b"]), max_size=2)),
        node_hints=draw(st.frozensets(st.sampled_from(["node1", "node2"]), max_size=1)),
    )


@st.composite
def slices(draw: st.DrawFn, service: ServiceName, index: int = 0) -> EndpointSlice:
    """A slice of a Service that need not exist."""
    family = draw(families)
    port_names = draw(st.lists(st.sampled_from(_PORT_NAMES), unique=True, max_size=2))
    return EndpointSlice(
        namespace=service.namespace,
        name=f"{service.name}-{index}",
        service_name=service,
        family=family,
        ports=tuple(
            EndpointPort(name, draw(protocols), draw(st.sampled_from([8080, 8081])))
            for name in port_names
        ),
        endpoints=tuple(draw(st.lists(endpoints(family), max_size=4))),
    )


@st.composite
def nodes(draw: st.DrawFn) -> NodeFacts:
    """This node under any name, in any zone, with a changing set of addresses."""
    local = draw(
        st.lists(
            st.sampled_from(
                ["127.0.0.1", "192.168.0.11", "10.97.0.1", "::1", "fd00:192::11", "fe80::1"]
            ),
            unique=True,
        )
    )
    return NodeFacts(
        name=draw(node_names),
        addresses=("192.168.0.11", "fd00:192::11") if draw(st.booleans()) else (),
        local_addresses=tuple(sorted(local)),
        zone=draw(zones),
    )


@st.composite
def snapshot_sequences(draw: st.DrawFn, *, max_size: int = 4) -> list[Snapshot]:
    """Snapshots one after the other; as in the store, what did not change is the same object."""
    result: list[Snapshot] = []
    node = draw(nodes())
    held_services: dict[ServiceName, Service] = {}
    held_slices: dict[ServiceName, tuple[EndpointSlice, ...]] = {}
    for revision in range(1, draw(st.integers(1, max_size)) + 1):
        for name in draw(st.lists(service_names, unique=True)):
            held_services = {key: item for key, item in held_services.items() if key != name}
            if draw(st.integers(0, 3)):
                held_services[name] = draw(services(name))
        for name in draw(st.lists(service_names, unique=True)):
            count = draw(st.integers(0, 2))
            held_slices = {key: item for key, item in held_slices.items() if key != name}
            if count:
                held_slices[name] = tuple(draw(slices(name, index)) for index in range(count))
        if revision > 1 and draw(st.booleans()):
            node = draw(nodes())
        result.append(Snapshot(node, held_services, held_slices, revision=revision))
    return result


plan_options = st.builds(
    PlanOptions,
    families=st.sampled_from([tuple(Family), (Family.V4,), (Family.V6,)]),
    node_port_addresses=st.sampled_from([(), ("primary",), ("localhost", "192.168.0.0/16")]),
    localhost_node_ports=st.booleans(),
    masquerade_all=st.booleans(),
    local_detector=st.frozensets(families),
    external_ip_ranges=st.sampled_from([EVERYWHERE, (), ("10.97.0.1/32", "fd00:61::1/128")]),
)
