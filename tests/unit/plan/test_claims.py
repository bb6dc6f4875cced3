"""Who gets a frontend that several service ports claim."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.net import Family
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from tests.lib.builders import make_port, make_service, make_snapshot

V4_ONLY = PlanOptions(families=(Family.V4,))
VIP = "203.0.113.1"
A = make_service("a", cluster_ip="10.96.0.1", load_balancer_ips=[VIP])
B = make_service("b", cluster_ip="10.96.0.2", load_balancer_ips=[VIP])
C = make_service("c", cluster_ip="10.96.0.3", external_ips=[VIP])


def owners(state: DesiredState, address: str = VIP) -> list[str]:
    return [
        str(key.port_name)
        for key, plan in state.plans.items()
        for frontend in plan.frontends
        if frontend.key.address == address
    ]


def plan(*services) -> DesiredState:
    return Planner(V4_ONLY).plan(make_snapshot(*services))


@pytest.mark.parametrize("order", [(A, B, C), (C, B, A), (B, C, A)])
def test_first_by_name_wins_whatever_came_first(order):
    """Every node and every restart gives a contested address to the same service."""
    state = plan(*order)

    assert owners(state) == ["default/a"]
    assert len(state.view()) == 4


def test_loser_is_told_what_it_lost_to_whom():
    """The one that goes without is named with the one that has it, field and address."""
    assert list(map(str, plan(A, C).problems)) == [
        "Service default/c: spec.externalIPs: 203.0.113.1:80/TCP: claimed by default/a too, "
        "which comes first by name, so default/c goes without"
    ]


def test_same_address_with_other_port_or_protocol_is_no_conflict():
    """Services may share a VIP as long as their ports differ."""
    state = plan(
        A,
        replace(B, ports=(make_port(443),)),
        replace(C, ports=(make_port(80, protocol="UDP"),)),
    )

    assert len(owners(state)) == 3
    assert state.problems == ()


def test_loser_takes_over_when_the_winner_goes():
    """The address does not stay dead with its former owner; the problem goes too."""
    planner = Planner(V4_ONLY)
    both = planner.plan(make_snapshot(A, B))
    rest = planner.plan(make_snapshot(B))

    assert (owners(both), owners(rest)) == (["default/a"], ["default/b"])
    assert rest.problems == ()


def test_next_in_line_takes_over_from_three():
    """With three claims, the second inherits and the third still goes without."""
    planner = Planner(V4_ONLY)
    planner.plan(make_snapshot(A, B, C))
    rest = planner.plan(make_snapshot(B, C))

    assert owners(rest) == ["default/b"]
    assert [problem.object_ref for problem in rest.problems] == ["Service default/c"]


def test_newcomer_first_by_name_takes_the_address():
    """What decides is the name, not who was there: a restart would decide the same."""
    planner = Planner(V4_ONLY)
    planner.plan(make_snapshot(B))
    state = planner.plan(make_snapshot(A, B))

    assert owners(state) == ["default/a"]
    assert len(state.view()) == 3


def test_winner_that_comes_back_takes_the_address_again():
    """Going and coming leaves no trace: the address has one owner all the time."""
    planner = Planner(V4_ONLY)
    found = [
        owners(planner.plan(make_snapshot(*services)))
        for services in ((A, B), (B,), (A, B), (B,), (B, C))
    ]

    assert found == [["default/a"], ["default/b"], ["default/a"], ["default/b"], ["default/b"]]


def test_claim_given_up_goes_to_the_other():
    """An edit that drops the address is as good as deleting the service."""
    planner = Planner(V4_ONLY)
    planner.plan(make_snapshot(A, B))
    state = planner.plan(make_snapshot(replace(A, load_balancer_ips=()), B))

    assert owners(state) == ["default/b"]


def test_service_port_that_loses_everything_has_no_plan():
    """A plan without frontends is none; its Problem says why."""
    state = plan(
        make_service("a", cluster_ip="10.96.0.1"), make_service("b", cluster_ip="10.96.0.1")
    )

    assert [str(key.port_name) for key in state.plans] == ["default/a"]
    assert [problem.field for problem in state.problems] == ["spec.clusterIPs"]


def test_contested_node_port_is_one_problem_for_all_addresses():
    """A node port is claimed on every address at once; the user reads of it once."""
    state = plan(
        make_service("a", make_port(80, node_port=30080), cluster_ip="10.96.0.1"),
        make_service("b", make_port(80, node_port=30080), cluster_ip="10.96.0.2"),
    )

    assert owners(state, "192.168.0.11") == ["default/a"]
    assert [str(problem) for problem in state.problems] == [
        "Service default/b: spec.ports[].nodePort: 127.0.0.1:30080/TCP, 192.168.0.11:30080/TCP: "
        "claimed by default/a too, which comes first by name, so default/b goes without"
    ]


def test_ports_of_one_service_are_settled_by_port_name():
    """Within a service the port name decides."""
    state = plan(
        make_service(
            "a",
            make_port(80, "web", node_port=30080),
            make_port(30080, "admin"),
            external_ips=["192.168.0.11"],
        )
    )

    assert [
        str(key.port_name)
        for key, item in state.plans.items()
        for frontend in item.frontends
        if str(frontend.key) == "192.168.0.11:30080/TCP"
    ] == ["default/a:admin"]


def test_unchanged_winner_keeps_its_identity_through_a_conflict():
    """A rival that comes and goes costs the winner no write."""
    planner = Planner(V4_ONLY)
    states = [
        planner.plan(make_snapshot(*services)) for services in ((A,), (A, B), (A, B, C), (A,))
    ]
    plans = [
        plan
        for state in states
        for key, plan in state.plans.items()
        if str(key.port_name) == "default/a"
    ]

    assert all(plan is plans[0] for plan in plans)


def test_unchanged_loser_keeps_its_identity():
    """What a loser is left with is built once, not with every plan."""
    planner = Planner(V4_ONLY)
    first = planner.plan(make_snapshot(A, B))
    second = planner.plan(make_snapshot(A, B, C))

    (loser,) = (key for key in first.plans if str(key.port_name) == "default/b")
    assert second.plans[loser] is first.plans[loser]
