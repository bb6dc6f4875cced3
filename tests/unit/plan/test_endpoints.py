"""Which endpoints get traffic that enters at this node."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from ebpf_svc.model.endpoint import Endpoint
from ebpf_svc.model.net import Family
from ebpf_svc.plan.endpoints import (
    candidates_of,
    choose,
    local_ready_count,
    uses_cluster_endpoints,
    uses_local_endpoints,
)
from ebpf_svc.plan.place import Place
from tests.lib.builders import (
    CLUSTER,
    LOCAL,
    make_endpoint_port,
    make_endpoints,
    make_port,
    make_service,
    ready,
    terminating,
    unready,
)

HERE = Place("node1", "zone-a")
A, B, C, D = (f"10.1.0.{number}" for number in range(1, 5))


def lists(*endpoints: Endpoint, cluster=True, local=True, place=HERE) -> dict[str, str]:
    """Backends by address, as `c`, `l`, `cl`, or empty when draining."""
    candidates = {(endpoint.address, 8080): endpoint for endpoint in endpoints}
    chosen = choose(candidates, cluster=cluster, local=local, place=place)
    return {
        backend.address: "c" * backend.in_cluster + "l" * backend.in_local
        for backend in chosen.backends
    }


def has_endpoints(*endpoints: Endpoint, cluster=True, local=True) -> bool:
    candidates = {(endpoint.address, 8080): endpoint for endpoint in endpoints}
    return choose(candidates, cluster=cluster, local=local, place=HERE).has_endpoints


def local(make, address: str, **more) -> Endpoint:
    return make(address, on="node1", **more)


# -- T1-T6 -----------------------------------------------------------------------------------------


def test_ready_endpoints_are_in_the_cluster_list_and_local_ones_in_both():
    """Every Ready endpoint serves the cluster, those here also local traffic (T1-T3)."""
    assert lists(local(ready, A), ready(B)) == {A: "cl", B: "c"}


def test_a_list_the_service_does_not_use_stays_empty():
    """A list nobody asks for is not filled, not even with terminating endpoints (T2, T3, F21)."""
    assert lists(local(ready, A), ready(B), cluster=False) == {A: "l", B: ""}
    assert lists(local(ready, A), ready(B), local=False) == {A: "c", B: "c"}
    assert lists(local(terminating, A), cluster=False) == {A: "l"}
    assert lists(local(terminating, A), local=False) == {A: "c"}


def test_one_ready_endpoint_retires_every_terminating_one():
    """While anything is Ready, endpoints on their way out get no new flow (T2, digest row 10)."""
    assert lists(ready(A), terminating(B), local=False) == {A: "c", B: ""}


def test_without_ready_endpoints_the_terminating_ones_serve():
    """A rolling restart loses no connection: those still serving go on (T2, digest row 10)."""
    assert lists(local(terminating, A), terminating(B), local=False) == {A: "c", B: "c"}


def test_lists_fall_back_each_for_itself():
    """Ready elsewhere, terminating here: cluster and local traffic part (T4, digest row 9)."""
    assert lists(local(terminating, A), ready(B)) == {A: "l", B: "c"}


def test_local_ready_endpoint_retires_local_terminating_one():
    """With one Ready here, local traffic uses only that (T3, digest row 9)."""
    assert lists(local(ready, A), local(terminating, B)) == {A: "cl", B: ""}


@pytest.mark.parametrize(
    "endpoint",
    [unready(A), terminating(A, serving=False), unready(A, serving=True)],
    ids=["unready", "terminating, not serving", "serving, not ready, not terminating"],
)
def test_endpoint_neither_ready_nor_serving_while_terminating_is_never_used(endpoint):
    """Not even as the last resort (T5, digest rows 9, 10 and 32)."""
    assert "c" not in lists(endpoint).get(A, "")
    assert not has_endpoints(endpoint)


def test_ready_endpoint_counts_though_it_does_not_serve():
    """PublishNotReadyAddresses forces Ready on unready and terminating pods alike (E11)."""
    forced = replace(terminating(A, serving=False), ready=True)

    assert lists(forced, local=False) == {A: "c"}


@pytest.mark.parametrize(("cluster", "local_"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (ready(A), True),
        (terminating(A), True),
        (terminating(A, serving=False), False),
        (unready(A), False),
    ],
)
def test_any_usable_endpoint_anywhere_turns_refusal_into_drop(endpoint, expected, cluster, local_):
    """All remote and Local: empty list, yet endpoints exist (T6, digest row 32)."""
    assert has_endpoints(endpoint, cluster=cluster, local=local_) is expected


def test_serving_endpoints_in_no_list_stay_as_draining():
    """Flows to an endpoint that still serves outlive policies and topology (C5)."""
    assert lists(ready(A), terminating(B), unready(C, serving=True), unready(D), local=False) == {
        A: "c",
        B: "",
        C: "",
    }


def test_endpoint_without_node_name_is_not_local_anywhere():
    """Unknown is not here, even on a node that does not know its own name (E6)."""
    assert lists(ready(A, on="")) == {A: "c"}
    assert lists(ready(A, on=""), place=Place("", "")) == {A: "c"}


def test_backends_are_sorted_by_address_and_port():
    """Every node writes the same order, whatever order slices came in (E9)."""
    candidates = {
        ("10.1.0.2", 80): ready("10.1.0.2"),
        ("10.1.0.1", 9090): ready("10.1.0.1"),
        ("10.1.0.1", 80): ready("10.1.0.1"),
    }
    chosen = choose(candidates, cluster=True, local=False, place=HERE)

    assert [(backend.address, backend.port) for backend in chosen.backends] == [
        ("10.1.0.1", 80),
        ("10.1.0.1", 9090),
        ("10.1.0.2", 80),
    ]


# -- T7-T10 topology -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        # Same zone: every Ready endpoint hinted, one for this zone (digest row 26).
        ([ready(A, zones=["zone-a"]), ready(B, zones=["zone-b"])], {A}),
        ([ready(A, zones=["zone-a"]), ready(B)], {A, B}),
        ([ready(A, zones=["zone-b"]), ready(B, zones=["zone-c"])], {A, B}),
        # Hinted for two zones: used in both (row 28).
        ([ready(A, zones=["zone-a", "zone-b"]), ready(B, zones=["zone-b"])], {A}),
        # Same node goes first, else zone, else all (row 29).
        (
            [
                ready(A, zones=["zone-a"], nodes=["node1"]),
                ready(B, zones=["zone-a"], nodes=["node2"]),
            ],
            {A},
        ),
        ([ready(A, nodes=["node1"]), ready(B, nodes=["node2"])], {A}),
        (
            [
                ready(A, zones=["zone-a"], nodes=["node1"]),
                ready(B, zones=["zone-a"]),
                ready(C, zones=["zone-b"], nodes=["node3"]),
            ],
            {A, B},
        ),
        (
            [
                ready(A, zones=["zone-a"], nodes=["node2"]),
                ready(B, zones=["zone-b"], nodes=["node3"]),
            ],
            {A},
        ),
        ([ready(A, nodes=["node2"]), ready(B, nodes=["node3"])], {A, B}),
        ([ready(A, nodes=["node1"]), ready(B, zones=["zone-a"])], {A, B}),
    ],
)
def test_hints_of_ready_endpoints_narrow_the_cluster_list(endpoints, expected):
    """Traffic stays on the node or in the zone where every endpoint agrees to it (T7, T8)."""
    used = {address for address, roles in lists(*endpoints, local=False).items() if "c" in roles}

    assert used == expected


def test_zone_mode_needs_a_zone():
    """A node without zone label uses all endpoints; empty counts as none (T8, digest row 26)."""
    endpoints = [ready(A, zones=["zone-a"]), ready(B, zones=[""])]

    assert lists(*endpoints, local=False, place=Place("node1", "")) == {A: "c", B: "c"}


def test_unready_endpoints_have_no_say_in_topology():
    """One without hints does not disable the filter, one in the zone does not enable it.

    Rule T9, digest row 27.
    """
    assert lists(ready(A, zones=["zone-a"]), ready(B, zones=["zone-b"]), unready(C)) == {
        A: "c",
        B: "",
    }
    hinted_but_unready = replace(unready(A), zone_hints=frozenset({"zone-a"}))
    assert lists(hinted_but_unready, ready(B, zones=["zone-b"])) == {B: "c"}


def test_terminating_fallback_ignores_topology():
    """When everything terminates, hints do not make it worse (T2)."""
    here, there = (
        replace(terminating(address), zone_hints=frozenset({zone}))
        for address, zone in ((A, "zone-a"), (B, "zone-b"))
    )

    assert lists(here, there, local=False) == {A: "c", B: "c"}


def test_local_list_ignores_hints():
    """An endpoint here serves local traffic though its hints send others elsewhere.

    Rules T3, T10; digest row 30: both lists side by side, no backend twice.
    """
    assert lists(
        local(ready, A, zones=["zone-b"]), ready(B, zones=["zone-a"]), ready(C, zones=["zone-b"])
    ) == {A: "l", B: "c", C: ""}


# -- F14, F21: what a service needs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "cluster", "local_"),
    [
        ({}, True, False),
        ({"internal_policy": LOCAL}, False, True),
        ({"external_policy": LOCAL}, True, False),
        ({"external_policy": LOCAL, "external_ips": ["203.0.113.1"]}, True, True),
        ({"external_policy": LOCAL, "load_balancer_ips": ["203.0.113.1"]}, True, True),
        ({"external_policy": LOCAL, "health_check_node_port": 32000}, True, False),
        ({"external_policy": LOCAL, "external_ips": ["2001:db8::1"]}, True, False),
        ({"internal_policy": LOCAL, "external_ips": ["203.0.113.1"]}, True, True),
        ({"internal_policy": LOCAL, "external_policy": LOCAL}, False, True),
    ],
)
def test_lists_follow_policies_and_reachability(fields, cluster, local_):
    """A service nobody outside can call ignores eTP, and with iTP Local has no Cluster list.

    Rules F14, F21; digest row 31.
    """
    service = make_service("web", **fields)
    (port,) = service.ports

    assert uses_cluster_endpoints(service, port, Family.V4) is cluster
    assert uses_local_endpoints(service, port, Family.V4) is local_


def test_node_port_makes_a_port_reachable():
    """Reachability is per port: one with a node port, one without (F21)."""
    service = make_service(
        "web",
        make_port(80, "http", node_port=30080),
        make_port(81, "admin"),
        internal_policy=LOCAL,
        external_policy=CLUSTER,
    )

    assert [uses_cluster_endpoints(service, port, Family.V4) for port in service.ports] == [
        True,
        False,
    ]


# -- E1-E9: joining slices -------------------------------------------------------------------------


def test_slices_join_by_port_name_and_protocol():
    """Numbers come from the slices: pods of two versions may listen on two ports (E3, F6)."""
    found = candidates_of(
        [
            make_endpoints("web", ready(A), ports=[make_endpoint_port(8080, "http")]),
            make_endpoints("web", ready(B), ports=[make_endpoint_port(9090, "http")]),
            make_endpoints("web", ready(C), ports=[make_endpoint_port(8080, "other")]),
            make_endpoints("web", ready(D), ports=[make_endpoint_port(80, "http", protocol="UDP")]),
            make_endpoints("web", ready(D), ports=[make_endpoint_port(0, "http")]),
        ],
        Family.V4,
        make_port(80, "http"),
    )

    assert set(found) == {(A, 8080), (B, 9090)}


def test_unnamed_port_joins_unnamed_port():
    """An empty name matches an unnamed service port and no other (E3)."""
    slices = [make_endpoints("web", ready(A), ports=[make_endpoint_port(8080, "")])]

    assert set(candidates_of(slices, Family.V4, make_port(80))) == {(A, 8080)}
    assert not candidates_of(slices, Family.V4, make_port(80, "http"))


def test_slices_of_the_other_family_are_not_joined():
    """A dual-stack pod is two endpoints, each in its family (E2, M2, digest row 18)."""
    slices = [make_endpoints("web", ready(A)), make_endpoints("web", ready("fd00::1"))]

    assert set(candidates_of(slices, Family.V6, make_port(80))) == {("fd00::1", 8080)}


@pytest.mark.parametrize(
    ("duplicates", "winner"),
    [
        ([terminating(A, on="old"), ready(A, on="new")], "new"),
        ([terminating(A, on="old"), unready(A, on="new")], "new"),
        ([unready(A, on="one"), ready(A, on="two")], "two"),
        ([terminating(A, on="one", serving=False), terminating(A, on="two")], "two"),
        ([ready(A, on="one"), ready(A, on="two")], "two"),
        ([ready(A, on="x", zones=["a"]), ready(A, on="x", zones=["b"])], "x"),
    ],
)
def test_duplicates_are_one_endpoint_in_any_order(duplicates, winner):
    """An address reused while its old pod still terminates belongs to the new pod.

    Rule E8, digest row 37; the order of slices never decides.
    """
    found = [
        candidates_of([make_endpoints("web", each) for each in order], Family.V4, make_port(80))
        for order in permutations(duplicates)
    ]

    assert found[0] == found[1]
    assert found[0][A, 8080].node_name == winner


# -- H6 --------------------------------------------------------------------------------------------


def test_health_counts_distinct_local_ready_addresses():
    """Two ports of a pod are one endpoint; one that terminates does not count (H6, digest 24)."""
    slices = [
        make_endpoints("web", local(ready, A), ready(B), ports=[make_endpoint_port(80, "a")]),
        make_endpoints(
            "web", local(ready, A), local(ready, C), ports=[make_endpoint_port(81, "b")]
        ),
        make_endpoints("web", local(terminating, D)),
        make_endpoints("web", local(ready, D), ports=[]),
        make_endpoints("web", local(ready, "fd00::1")),
    ]

    assert local_ready_count(slices, Family.V4, HERE) == 2
