"""Plans follow Snapshots: only what changed is planned anew, and nothing depends on history."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.config import Settings
from ebpf_svc.model.desired import HealthCheck
from ebpf_svc.model.net import Family
from ebpf_svc.model.service import ServiceType
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.plan import planner as planner_module
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from tests.lib.builders import (
    LOCAL,
    NODE,
    make_endpoint_port,
    make_endpoints,
    make_name,
    make_port,
    make_service,
    make_snapshot,
    ready,
    terminating,
)
from tests.lib.strategies import plan_options, snapshot_sequences

V4_ONLY = PlanOptions(families=(Family.V4,))
WEB = make_service("web", cluster_ip="10.96.0.10")
API = make_service("api", make_port(80, node_port=30080), cluster_ip="10.96.0.20")
WEB_SLICE = make_endpoints("web", ready("10.1.0.1"))
API_SLICE = make_endpoints("api", ready("10.1.0.2"), ready("10.1.0.3", on="node1"))


@pytest.fixture
def choices(monkeypatch) -> list[object]:
    """Every call of `choose`, the costly part of planning a service port."""
    calls: list[object] = []
    original = planner_module.choose

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(planner_module, "choose", counted)
    return calls


def changed(snapshot: Snapshot, **fields) -> Snapshot:
    """The next snapshot of a store: what is not named stays the same object."""
    return replace(snapshot, revision=snapshot.revision + 1, **fields)


def with_slices(snapshot: Snapshot, *slices) -> Snapshot:
    """The next snapshot, where these slices are all their Service has."""
    name = slices[0].service_name
    return changed(snapshot, slices={**snapshot.slices, name: slices})


def by_service(state) -> dict[str, object]:
    return {str(key.port_name): plan for key, plan in state.plans.items()}


# -- identity and cost -----------------------------------------------------------------------------


def test_same_snapshot_gives_the_same_plans():
    """A sync without a change hands out the very same mapping."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, API, WEB_SLICE, API_SLICE)

    assert planner.plan(snapshot).plans is planner.plan(changed(snapshot)).plans


def test_one_changed_slice_leaves_other_plans_the_same_objects(choices):
    """One endpoint changed: one service port is planned, whatever the number of services."""
    planner = Planner(V4_ONLY)
    others = [make_service(f"svc-{n}", cluster_ip=f"10.96.1.{n}") for n in range(1, 50)]
    snapshot = make_snapshot(WEB, *others, WEB_SLICE)
    before = planner.plan(snapshot)
    choices.clear()
    after = planner.plan(with_slices(snapshot, make_endpoints("web", ready("10.1.0.9"))))

    same = {key for key, plan in before.plans.items() if after.plans[key] is plan}
    assert {str(key.port_name) for key in before.plans.keys() - same} == {"default/web"}
    assert len(choices) == 1


def test_one_added_service_leaves_other_plans_the_same_objects(choices):
    """A new name shifts the order of the store; the other services are recognised all the same."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, WEB_SLICE)
    before = planner.plan(snapshot)
    choices.clear()
    after = planner.plan(changed(snapshot, services={API.name: API, **snapshot.services}))

    assert by_service(after)["default/web"] is by_service(before)["default/web"]
    assert len(choices) == 1


def test_plan_recomputed_to_the_same_keeps_its_identity():
    """A slice that was rewritten without meaning leaves the plan untouched."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, WEB_SLICE)
    before = planner.plan(snapshot)
    after = planner.plan(with_slices(snapshot, replace(WEB_SLICE, trigger_time_s=1.0)))

    assert after.plans is before.plans
    assert by_service(after)["default/web"] is by_service(before)["default/web"]


def test_changed_endpoints_keep_the_frontends_tuple():
    """A backend that compares by identity sees at once that no frontend changed."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, WEB_SLICE)
    before = planner.plan(snapshot)
    after = planner.plan(with_slices(snapshot, make_endpoints("web")))

    old, new = by_service(before)["default/web"], by_service(after)["default/web"]
    assert new is not old
    assert new.frontends is old.frontends


def test_plans_handed_out_do_not_change_later():
    """A slow reader of an old state sees that state."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, API)
    before = planner.plan(snapshot)
    held = dict(before.plans)
    planner.plan(changed(snapshot, services={API.name: replace(API, affinity_s=9)}))

    assert before.plans == held


def test_new_local_address_plans_only_what_depends_on_it(choices):
    """An address that comes or goes concerns services with node ports (A4)."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, API)
    planner.plan(snapshot)
    choices.clear()
    moved = replace(NODE, local_addresses=("172.16.0.1",))
    after = planner.plan(changed(snapshot, node=moved))

    assert len(choices) == 1
    assert [str(item.key) for item in by_service(after)["default/api"].frontends] == [
        "10.96.0.20:80/TCP",
        "127.0.0.1:30080/TCP",
        "172.16.0.1:30080/TCP",
    ]


def test_new_node_ip_replans_source_ranges():
    """Whether VIPs allow themselves follows the node's IP (P10)."""
    planner = Planner(V4_ONLY)
    service = make_service(
        "web", load_balancer_ips=["203.0.113.1"], source_ranges=["172.16.0.0/16"]
    )
    snapshot = make_snapshot(service)
    planner.plan(snapshot)
    after = planner.plan(changed(snapshot, node=replace(NODE, addresses=("172.16.0.1",))))

    assert {item.source_ranges for item in by_service(after)["default/web"].frontends} == {
        None,
        ("172.16.0.0/16", "203.0.113.1/32"),
    }


def test_new_node_object_without_news_plans_nothing(choices):
    """A Node heartbeat costs nothing."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, API)
    planner.plan(snapshot)
    choices.clear()
    planner.plan(changed(snapshot, node=replace(NODE, pod_cidrs=("10.244.0.0/24",))))

    assert choices == []


def test_zone_change_replans_by_hints():
    """A node that moves to another zone uses that zone's endpoints from the next plan (N5)."""
    planner = Planner(V4_ONLY)
    snapshot = make_snapshot(
        WEB,
        API,
        API_SLICE,
        make_endpoints(
            "web", ready("10.1.0.1", zones=["zone-a"]), ready("10.1.0.2", zones=["zone-b"])
        ),
    )
    before = planner.plan(snapshot)
    after = planner.plan(changed(snapshot, node=replace(NODE, zone="zone-b")))

    def used(state):
        return [
            item.address for item in by_service(state)["default/web"].backends if item.in_cluster
        ]

    assert (used(before), used(after)) == (["10.1.0.1"], ["10.1.0.2"])
    assert by_service(after)["default/api"] is by_service(before)["default/api"]


# -- coming and going ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "service",
    [replace(WEB, cluster_ips=()), replace(WEB, type=ServiceType.EXTERNAL_NAME), None],
    ids=["headless", "ExternalName", "deleted"],
)
def test_service_that_leaves_takes_its_plans_with_it(service):
    """Turned headless, ExternalName, or deleted: gone at the next plan; back when it is back.

    Digest row 33.
    """
    planner, snapshot = Planner(V4_ONLY), make_snapshot(WEB, API, WEB_SLICE)
    before = planner.plan(snapshot)
    services = {API.name: API} if service is None else {WEB.name: service, API.name: API}
    gone = planner.plan(changed(snapshot, services=services))
    back = planner.plan(snapshot)

    assert set(by_service(gone)) == {"default/api"}
    assert back.plans == before.plans


def test_slices_may_come_before_their_service():
    """Events arrive in any order; what is known is used once both are there."""
    planner = Planner(V4_ONLY)
    assert planner.plan(make_snapshot(WEB_SLICE)).plans == {}
    state = planner.plan(make_snapshot(WEB, WEB_SLICE))

    assert [item.address for item in by_service(state)["default/web"].backends] == ["10.1.0.1"]


def test_renamed_port_moves_its_endpoints_to_another_service_port():
    """A port's name is part of its identity, its number is not (M1, digest row 38)."""
    planner = Planner(V4_ONLY)
    named = replace(WEB, ports=(make_port(80, "http"),))
    slice_ = make_endpoints("web", ready("10.1.0.1"), ports=[make_endpoint_port(8080, "http")])
    planner.plan(make_snapshot(named, slice_))
    renamed = planner.plan(
        make_snapshot(
            replace(WEB, ports=(make_port(80, "www"),)),
            replace(slice_, ports=(make_endpoint_port(8080, "www"),)),
        )
    )
    renumbered = planner.plan(
        make_snapshot(
            replace(WEB, ports=(make_port(80, "www"),)),
            replace(slice_, ports=(make_endpoint_port(9090, "www"),)),
        )
    )

    assert set(by_service(renamed)) == set(by_service(renumbered)) == {"default/web:www"}
    assert [item.port for item in by_service(renumbered)["default/web:www"].backends] == [9090]


def test_removed_slice_takes_only_its_endpoints():
    """Slices of one service are merged, and each goes alone (E1, digest row 35)."""
    planner = Planner(V4_ONLY)
    more = make_endpoints("web", ready("10.1.0.7"), name="web-2")
    snapshot = make_snapshot(WEB, WEB_SLICE, more)
    both = planner.plan(snapshot)
    one = planner.plan(with_slices(snapshot, more))

    def addresses(state):
        return [item.address for item in by_service(state)["default/web"].backends]

    assert (addresses(both), addresses(one)) == (["10.1.0.1", "10.1.0.7"], ["10.1.0.7"])


# -- laws ------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(snapshot_sequences(), plan_options)
def test_history_does_not_matter(snapshots, options):
    """Planning step by step ends where planning the last Snapshot alone does."""
    planner = Planner(options)
    last = None
    for snapshot in snapshots:
        state = planner.plan(snapshot)
        assert state == Planner(options).plan(snapshot)
        if last is not None:
            for key, plan in state.plans.items():
                assert plan is last.plans.get(key) or plan != last.plans.get(key)
        last = state


@settings(max_examples=15, deadline=None)
@given(snapshot_sequences(max_size=1), plan_options, st.randoms())
def test_order_of_objects_does_not_matter(snapshots, options, random):
    """Two nodes that heard of the same objects in another order plan alike."""
    (snapshot,) = snapshots
    names = list(snapshot.services)
    random.shuffle(names)
    shuffled = replace(
        snapshot,
        services={name: snapshot.services[name] for name in names},
        slices={
            name: tuple(random.sample(of_service, len(of_service)))
            for name, of_service in reversed(snapshot.slices.items())
        },
    )

    assert Planner(options).plan(shuffled) == Planner(options).plan(snapshot)


@settings(max_examples=15, deadline=None)
@given(snapshot_sequences(max_size=2), plan_options)
def test_states_keep_what_the_model_promises(snapshots, options):
    """One owner a frontend, everything sorted, lists only with endpoints, filters only on VIPs."""
    planner = Planner(options)
    for snapshot in snapshots:
        state = planner.plan(snapshot)
        owners = Counter(item.key for plan in state.plans.values() for item in plan.frontends)
        assert set(owners.values()) <= {1}
        for key, plan in state.plans.items():
            assert key == plan.key
            assert plan.frontends
            assert [item.key for item in plan.frontends] == sorted(
                item.key for item in plan.frontends
            )
            where = [(item.address, item.port) for item in plan.backends]
            assert where == sorted(set(where))
            assert plan.has_endpoints or not any(
                item.in_cluster or item.in_local for item in plan.backends
            )


# -- health checks ---------------------------------------------------------------------------------

BALANCED = make_service(
    "web",
    make_port(80, node_port=30080),
    load_balancer_ips=["203.0.113.1"],
    external_policy=LOCAL,
    health_check_node_port=32000,
)


def health(*objects) -> tuple[HealthCheck, ...]:
    return Planner(PlanOptions()).plan(make_snapshot(*objects)).health_checks


def check(family: Family, count: int, *addresses: str) -> HealthCheck:
    """What `BALANCED` asks for, on every address unless given."""
    wildcard = "0.0.0.0" if family is Family.V4 else "::"
    return HealthCheck(make_name("web"), family, 32000, addresses or (wildcard,), count)


def test_health_check_counts_local_ready_endpoints():
    """A balancer sends traffic where Ready pods are, and stops before they stop (H6, digest 24)."""
    slice_ = make_endpoints(
        "web",
        ready("10.1.0.1", on="node1"),
        terminating("10.1.0.2", on="node1"),
        ready("10.1.0.3", on="node2"),
    )

    assert health(BALANCED, slice_) == (check(Family.V4, 1),)


def test_health_check_stays_without_endpoints():
    """The balancer is answered 503, not refused, when nothing is here (H2, H8, digest row 23)."""
    assert health(BALANCED) == (check(Family.V4, 0),)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": ServiceType.NODE_PORT},
        {"external_policy": API.external_policy},
        {"health_check_node_port": 0},
        {"cluster_ips": ()},
        {"type": ServiceType.EXTERNAL_NAME},
    ],
)
def test_health_check_needs_a_local_balancer_service(fields):
    """Only LoadBalancer services with eTP Local are checked (F15)."""
    assert health(replace(BALANCED, **fields)) == ()


def test_each_family_is_checked_for_itself():
    """A balancer of one family must not be sent where only the other has endpoints (H1)."""
    service = replace(BALANCED, cluster_ips=("10.96.0.10", "fd00:10:96::10"))

    assert health(
        service,
        make_endpoints("web", ready("10.1.0.1", on="node1"), ready("10.1.0.2", on="node1")),
        make_endpoints("web", ready("fd00:1::1", on="node1")),
    ) == (check(Family.V4, 2), check(Family.V6, 1))


@pytest.mark.parametrize(
    ("selection", "v4", "v6"),
    [
        ((), ["0.0.0.0"], ["::"]),
        (("192.168.0.0/24",), ["192.168.0.11"], ["::"]),
        (("192.168.0.0/24", "::/0"), ["192.168.0.11"], ["::"]),
        (("primary",), ["192.168.0.11"], ["fd00:192::11"]),
        (("10.0.0.0/8",), [], ["::"]),
    ],
)
def test_health_checks_listen_where_node_ports_answer(selection, v4, v6):
    """Every address, or those nodePortAddresses selects; a family left out is open (H1, A2)."""
    service = replace(BALANCED, cluster_ips=("10.96.0.10", "fd00:10:96::10"))
    planner = Planner(PlanOptions(node_port_addresses=selection))

    first, second = planner.plan(make_snapshot(service)).health_checks

    assert (list(first.addresses), list(second.addresses)) == (v4, v6)


def test_health_check_follows_the_addresses_of_the_node():
    """A new address of the node is listened on, also where the service has no node port (H1)."""
    service = replace(BALANCED, ports=(make_port(80),))
    planner = Planner(PlanOptions((Family.V4,), node_port_addresses=("192.168.0.0/24",)))
    snapshot = make_snapshot(service)
    planner.plan(snapshot)
    moved = replace(NODE, local_addresses=("127.0.0.1", "192.168.0.11", "192.168.0.12"))

    (after,) = planner.plan(changed(snapshot, node=moved)).health_checks

    assert after.addresses == ("192.168.0.11", "192.168.0.12")


def test_health_checks_follow_services():
    """A new port replaces the old one, a deleted service leaves none (H7, H8, digest row 25)."""
    planner, snapshot = Planner(V4_ONLY), make_snapshot(BALANCED)
    planner.plan(snapshot)
    moved = replace(BALANCED, health_check_node_port=32001)
    after = planner.plan(changed(snapshot, services={moved.name: moved}))
    gone = planner.plan(changed(snapshot, services={}))

    assert [check.port for check in after.health_checks] == [32001]
    assert gone.health_checks == ()


# -- options ---------------------------------------------------------------------------------------


def test_options_come_from_settings():
    """A family has a local detector when the settings name a pod prefix of it (D1)."""
    options = PlanOptions.from_settings(
        Settings(
            families=(Family.V6,),
            cluster_cidrs=("10.244.0.0/16",),
            node_port_addresses=("primary", "010.0.0.0/8"),
            masquerade_all=True,
            allow_external_ips=("2001:db8::/32",),
        )
    )

    assert options == PlanOptions(
        families=(Family.V6,),
        node_port_addresses=("primary", "10.0.0.0/8"),
        masquerade_all=True,
        local_detector=frozenset({Family.V4}),
        external_ip_ranges=("2001:db8::/32",),
    )
