"""Cluster IPs and node ports: who gets which, and who keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.errors import ConfigError
from ebpf_svc.model.service import Service, ServiceName
from ebpf_svc.watch.allocate import Allocator
from ebpf_svc.watch.controlplane import ManifestState
from tests.unit.watch.cluster import Cluster, apply, named, only_service, service, services, told

TAKEN = "provided port is already allocated"
SMALL = ("10.96.0.0/28", "fd00:10:96::/124")


def ip(state: ManifestState, name: str) -> str:
    return state.services[named(name)].cluster_ips[0]


def node_ports(found: Service) -> list[int]:
    return [port.node_port for port in found.ports]


def test_two_nodes_with_the_same_manifests_choose_the_same() -> None:
    """Agents do not talk to each other: the choice follows from the name."""
    text = service("web", type="NodePort", ipFamilyPolicy="RequireDualStack")
    assert only_service(apply(text)) == only_service(apply(text))
    found = only_service(apply(text))
    assert found.cluster_ips == ("10.96.236.131", "fd00:10:96::acdc")
    assert node_ports(found) == [32306]


def test_a_choice_does_not_depend_on_other_services() -> None:
    """Unless two names fall on one address, which is rare."""
    assert ip(apply(services("a", "b", "c", "d")), "c") == ip(apply(service("c")), "c")


def test_chosen_values_leave_the_lower_band_to_those_who_ask_by_number() -> None:
    """A tutorial's nodePort 30080 is never somebody else's by chance (KEP-3070, KEP-3668)."""
    texts = [service(f"s{i}", type="NodePort") for i in range(200)]
    found = apply(*["---\n".join(texts)]).services.values()
    assert min(min(node_ports(each)) for each in found) >= 30086
    assert min(int(each.cluster_ips[0].split(".")[2]) for each in found) >= 1


def test_names_that_fall_on_one_place_are_served_in_their_order() -> None:
    """The smallest range: everybody collides, and nobody is left out while there is room."""
    names = [f"s{i}" for i in range(14)]
    state = Cluster(cidrs=SMALL).apply(services(*names))
    assert sorted(int(ip(state, name).split(".")[3]) for name in names) == list(range(1, 15))
    reverse = Cluster(cidrs=SMALL).apply(services(*names[::-1]))
    assert reverse.services == state.services


def test_the_lower_band_is_given_out_when_nothing_else_is_left() -> None:
    """A /26 has 62 addresses, 16 of them below the band's edge."""
    names = [f"s{i}" for i in range(62)]
    state = Cluster(cidrs=("10.96.0.0/26",)).apply(services(*names))
    assert state.problems == ()
    assert len({ip(state, name) for name in names}) == 62


def test_a_full_range_refuses_the_last_names() -> None:
    names = [f"s{i:02}" for i in range(15)]
    state = Cluster(cidrs=SMALL).apply(services(*names))
    assert told(state.problems) == [
        ("spec.clusterIPs", "Internal error: failed to allocate a serviceIP: range is full")
    ]
    assert state.problems[0].object_ref == "Service default/s14"


def test_full_node_ports_refuse_the_last_names() -> None:
    texts = [service(f"s{i}", type="NodePort") for i in range(3)]
    state = Cluster(node_ports=(30000, 30001)).apply(*texts)
    assert told(state.problems) == [
        (
            "spec.ports[0].nodePort",
            "Internal error: failed to allocate a nodePort: range is full",
        )
    ]


def test_an_explicit_request_wins_over_a_choice_not_yet_made() -> None:
    """Whoever asks by number comes first, whatever the names' order."""
    chosen = ip(apply(service("a")), "a")
    state = apply(service("a"), service("z", clusterIP=chosen))
    assert state.problems == ()
    assert ip(state, "z") == chosen
    assert ip(state, "a") != chosen


def test_an_explicit_request_does_not_take_what_somebody_holds() -> None:
    cluster = Cluster()
    held = ip(cluster.apply(service("z")), "z")
    state = cluster.apply(service("a", clusterIP=held), service("z"))
    said = f'Invalid value: ["{held}"]: failed to allocate IP {held}: provided IP is already'
    assert told(state.problems) == [("spec.clusterIPs", f"{said} allocated")]
    assert ip(state, "z") == held


def test_of_two_requests_for_one_address_the_first_name_wins() -> None:
    """And the loser gets it when the winner goes."""
    cluster = Cluster()
    one, two = service("a", clusterIP="10.96.0.9"), service("b", clusterIP="10.96.0.9")
    state = cluster.apply(two, one)
    assert list(state.services) == [named("a")]
    assert ip(cluster.apply(two), "b") == "10.96.0.9"


def test_of_two_requests_for_one_node_port_the_first_name_wins() -> None:
    """Also between TCP and UDP: a number belongs to one Service."""
    entry = {"port": 80, "nodePort": 30080}
    state = apply(
        service("b", type="NodePort", ports=[{**entry, "protocol": "UDP"}]),
        service("a", type="NodePort", ports=[entry]),
    )
    assert told(state.problems) == [("spec.ports[0].nodePort", f"Invalid value: 30080: {TAKEN}")]
    assert state.problems[0].source == "a.yaml"
    assert list(state.services) == [named("a")]


def test_one_service_may_use_a_node_port_for_both_protocols() -> None:
    ports = [
        {"name": "a", "port": 53, "nodePort": 30053},
        {"name": "b", "port": 53, "protocol": "UDP", "nodePort": 30053},
    ]
    assert node_ports(only_service(apply(service(type="NodePort", ports=ports)))) == [30053, 30053]


@pytest.mark.parametrize("asked", [0, 30053])
def test_ports_of_one_number_share_a_chosen_node_port(asked: int) -> None:
    """A DNS server is reached by TCP and UDP at the same node port."""
    tcp = {"name": "t", "port": 53, **({"nodePort": asked} if asked else {})}
    ports = [{"name": "u", "port": 53, "protocol": "UDP"}, tcp, {"name": "w", "port": 80}]
    first, second, third = node_ports(only_service(apply(service(type="NodePort", ports=ports))))
    assert first == second != third
    assert asked in (0, first)


def test_the_cluster_ip_is_immutable() -> None:
    """An edit that asks for another address is refused; it comes back with the old one."""
    cluster = Cluster()
    held = ip(cluster.apply(service("web")), "web")
    state = cluster.apply(service("web", clusterIP="10.96.0.9"))
    assert told(state.problems) == [
        ("spec.clusterIPs[0]", 'Invalid value: ["10.96.0.9"]: may not change once set')
    ]
    assert state.services == {}
    assert ip(cluster.apply(service("web")), "web") == held
    assert ip(cluster.apply(service("web", clusterIP=held)), "web") == held


def test_a_service_cannot_become_headless() -> None:
    cluster = Cluster()
    cluster.apply(service("web"))
    state = cluster.apply(service("web", clusterIP="None"))
    assert told(state.problems) == [
        ("spec.clusterIPs[0]", 'Invalid value: ["None"]: may not change once set')
    ]


def test_the_primary_family_is_immutable() -> None:
    cluster = Cluster()
    cluster.apply(service("web"))
    state = cluster.apply(service("web", ipFamilies=["IPv6"]))
    assert told(state.problems) == [
        ("spec.ipFamilies[0]", 'Invalid value: ["IPv6"]: may not change once set')
    ]


def test_deleting_the_manifest_frees_what_it_held() -> None:
    """That is how a cluster IP is changed after all."""
    cluster = Cluster()
    cluster.apply(service("web"))
    cluster.apply()
    assert cluster.allocator.holdings == {}
    assert ip(cluster.apply(service("web", clusterIP="10.96.0.9")), "web") == "10.96.0.9"


def test_a_broken_manifest_keeps_what_it_held() -> None:
    """A typing error must not cost the address."""
    cluster = Cluster()
    held = ip(cluster.apply(service("web")), "web")
    assert cluster.apply(service("web", ports=[])).services == {}
    state = cluster.apply(service("web"), service("a", clusterIP=held))
    assert ip(state, "web") == held


def test_nothing_is_taken_back_while_files_are_missing() -> None:
    """After a restart a file may be unreadable for a while; its Services keep their addresses."""
    cluster = Cluster()
    held = ip(cluster.apply(service("web")), "web")
    cluster.apply(complete=False)
    assert cluster.allocator.holdings[named("web")].cluster_ips == (held,)


def test_the_second_family_is_added_and_released_with_the_policy() -> None:
    cluster = Cluster()
    four = ip(cluster.apply(service("web")), "web")
    both = only_service(cluster.apply(service("web", ipFamilyPolicy="PreferDualStack")))
    assert both.cluster_ips[0] == four
    assert len(both.cluster_ips) == 2
    again = only_service(cluster.apply(service("web", ipFamilyPolicy="SingleStack")))
    assert again.cluster_ips == (four,)


def test_a_node_port_may_be_changed_and_swapped() -> None:
    """What an edit gives up is free in the same edit."""

    def pair(one: int, two: int) -> list[str]:
        return [
            service(name, type="NodePort", ports=[{"port": 80, "nodePort": port}])
            for name, port in (("a", one), ("b", two))
        ]

    cluster = Cluster()
    cluster.apply(*pair(30001, 30002))
    state = cluster.apply(*pair(30002, 30001))
    assert state.problems == ()
    assert [node_ports(each) for each in state.services.values()] == [[30002], [30001]]


def test_a_node_port_belongs_to_the_ports_name() -> None:
    """Another number of the port keeps it, as does another port beside it."""
    cluster = Cluster()
    before = node_ports(
        only_service(cluster.apply(service(type="NodePort", ports=[{"name": "http", "port": 80}])))
    )
    after = node_ports(
        only_service(
            cluster.apply(
                service(
                    type="NodePort",
                    ports=[{"name": "new", "port": 81}, {"name": "http", "port": 8080}],
                )
            )
        )
    )
    assert after[1:] == before
    assert after[0] not in (0, *before)


def test_a_cluster_ip_service_gives_its_node_ports_back() -> None:
    cluster = Cluster()
    cluster.apply(service(type="NodePort"))
    assert node_ports(only_service(cluster.apply(service()))) == [0]
    assert cluster.allocator.holdings[named("web")].node_ports == ()


@pytest.mark.parametrize(
    ("spec", "ports", "has_health_check"),
    [
        ({}, True, False),
        ({"allocateLoadBalancerNodePorts": False}, False, False),
        ({"externalTrafficPolicy": "Local"}, True, True),
    ],
)
def test_load_balancers_get_node_ports_and_a_health_check(
    spec: dict[str, Any], ports: bool, has_health_check: bool
) -> None:
    """Node ports unless told otherwise; a health-check port with external policy Local (F15)."""
    found = only_service(apply(service(type="LoadBalancer", **spec)))
    assert bool(node_ports(found)[0]) is ports
    assert bool(found.health_check_node_port) is has_health_check
    assert found.health_check_node_port not in node_ports(found) or not has_health_check


def test_an_asked_for_node_port_counts_without_allocation() -> None:
    spec: dict[str, Any] = {
        "allocateLoadBalancerNodePorts": False,
        "ports": [{"port": 80, "nodePort": 30080}],
    }
    assert node_ports(only_service(apply(service(type="LoadBalancer", **spec)))) == [30080]


def local(**spec: Any) -> str:
    return service(type="LoadBalancer", externalTrafficPolicy="Local", **spec)


def test_the_health_check_port_is_given_kept_and_immutable() -> None:
    cluster = Cluster()
    asked = only_service(cluster.apply(local(healthCheckNodePort=31999)))
    assert asked.health_check_node_port == 31999
    assert only_service(cluster.apply(local())).health_check_node_port == 31999
    state = cluster.apply(local(healthCheckNodePort=31998))
    assert told(state.problems) == [("spec.healthCheckNodePort", "Forbidden: field is immutable")]


def test_the_health_check_port_is_nobodys_node_port() -> None:
    state = apply(local(healthCheckNodePort=30080, ports=[{"port": 80, "nodePort": 30080}]))
    assert told(state.problems) == [("spec.healthCheckNodePort", f"Invalid value: 30080: {TAKEN}")]
    cluster = Cluster()
    cluster.apply(local(healthCheckNodePort=30080))
    other = service("other", type="NodePort", ports=[{"port": 80, "nodePort": 30080}])
    assert told(cluster.apply(local(), other).problems) == [
        ("spec.ports[0].nodePort", f"Invalid value: 30080: {TAKEN}")
    ]


def test_other_ranges_than_before_move_what_lies_outside() -> None:
    """The settings changed between two runs: addresses outside the ranges are chosen anew."""
    old = Cluster()
    old.apply(service("web", type="NodePort"))
    new = Cluster(cidrs=("10.97.0.0/16",), node_ports=(20000, 21000))
    new.allocator.holdings = old.allocator.holdings
    found = only_service(new.apply(service("web", type="NodePort")))
    assert found.cluster_ips[0].startswith("10.97.")
    assert 20000 <= node_ports(found)[0] <= 21000


@pytest.mark.parametrize(
    ("cidrs", "ports", "path"),
    [
        (("10.96.0.0",), (1, 2), None),
        (("10.96.0.1/16",), (1, 2), "service_cidrs"),
        (("nonsense",), (1, 2), "service_cidrs"),
        ((), (1, 2), "service_cidrs"),
        (("10.96.0.0/16", "10.97.0.0/16"), (1, 2), "service_cidrs"),
        (("10.96.0.0/16",), (2, 1), "node_port_range"),
        (("10.96.0.0/16",), (0, 1), "node_port_range"),
    ],
)
def test_senseless_ranges_are_refused_at_start(
    cidrs: tuple[str, ...], ports: tuple[int, int], path: str | None
) -> None:
    if path is None:
        Allocator(cidrs, ports)
        return
    with pytest.raises(ConfigError) as raised:
        Allocator(cidrs, ports)
    assert raised.value.path == path


_ASKED = st.fixed_dictionaries(
    {},
    optional={
        "clusterIP": st.integers(1, 14).map(lambda i: f"10.96.0.{i}"),
        "type": st.sampled_from(["NodePort", "LoadBalancer", "ClusterIP"]),
        "ports": st.just([{"name": "a", "port": 80}, {"name": "b", "port": 81}]),
        "ipFamilyPolicy": st.sampled_from(["SingleStack", "PreferDualStack", "RequireDualStack"]),
    },
)
_SPECS = st.dictionaries(st.sampled_from([f"s{i}" for i in range(8)]), _ASKED, max_size=8)


def _texts(specs: dict[str, dict[str, Any]]) -> list[str]:
    return [service(name, **spec) for name, spec in specs.items()]


def _check_no_collision(state: ManifestState) -> None:
    addresses = [address for each in state.services.values() for address in each.cluster_ips]
    assert len(addresses) == len(set(addresses))
    ports = [
        port
        for each in state.services.values()
        for port in {*node_ports(each), each.health_check_node_port} - {0}
    ]
    assert len(ports) == len(set(ports))


@given(specs=_SPECS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_order_of_files_decides_nothing(
    specs: dict[str, dict[str, Any]], data: st.DataObject
) -> None:
    """Any distribution of the same objects over files gives the same Services and problems."""
    shuffled: Sequence[str] = data.draw(st.permutations(_texts(specs)))
    one = Cluster(cidrs=SMALL, node_ports=(30000, 30009)).apply(*_texts(specs))
    two = Cluster(cidrs=SMALL, node_ports=(30000, 30009)).apply("---\n".join(shuffled))
    assert one.services == two.services
    assert sorted(str(p)[len(p.source) :] for p in one.problems) == sorted(
        str(p)[len(p.source) :] for p in two.problems
    )


@given(history=st.lists(_SPECS, min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_what_is_served_keeps_its_addresses_through_any_edits(
    history: list[dict[str, dict[str, Any]]],
) -> None:
    """No collisions ever; who was served and is served again keeps the primary address; a
    restart between any two edits changes nothing; applying twice changes nothing."""
    cluster = Cluster(cidrs=SMALL, node_ports=(30000, 30009))
    before: dict[ServiceName, Service] = {}
    for specs in history:
        restarted = Cluster(cidrs=SMALL, node_ports=(30000, 30009))
        restarted.allocator.holdings = dict(cluster.allocator.holdings)
        state = cluster.apply(*_texts(specs))
        _check_no_collision(state)
        assert restarted.apply(*_texts(specs)).services == state.services
        assert cluster.apply(*_texts(specs)).services == state.services
        for name, found in state.services.items():
            if name in before:
                assert found.cluster_ips[0] == before[name].cluster_ips[0]
        before = {name: each for name, each in state.services.items() if name.name in specs}
