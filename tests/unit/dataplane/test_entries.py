"""Entries: what the maps hold for a plan, in the words of types.h."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.dataplane.ebpf import entries
from ebpf_svc.dataplane.ebpf.constants import BackendFlag, FrontendFlag
from ebpf_svc.dataplane.ebpf.entries import (
    FrontendValue,
    ListName,
    MaglevOptions,
    SlotRange,
    frontend_value,
    needed_lists,
    slots_of,
)
from ebpf_svc.dataplane.ebpf.maglev import TableCache
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.model.net import Sources
from tests.lib.plans import make_backend, make_frontend, make_plan
from tests.lib.strategies import desired_states

OPTIONS = MaglevOptions(100, "seed", TableCache())
NODE_PORT, CLUSTER_IP = FrontendKind.NODE_PORT, FrontendKind.CLUSTER_IP
MIXED = [
    make_backend("10.1.0.1"),
    make_backend("10.1.0.2", in_local=True),
    make_backend("10.1.0.3", in_cluster=False, in_local=True),
    make_backend("10.1.0.4", in_cluster=False),
]


def test_backend_flags_tell_membership_and_every_planned_backend_serves() -> None:
    """A backend in no list is draining: it serves its UDP flows and gets no new one (C5)."""
    assert [entries.backend_flags(each) for each in MIXED] == [
        BackendFlag.SERVING | BackendFlag.IN_CLUSTER,
        BackendFlag.SERVING | BackendFlag.IN_CLUSTER | BackendFlag.IN_LOCAL,
        BackendFlag.SERVING | BackendFlag.IN_LOCAL,
        BackendFlag.SERVING,
    ]
    assert [
        entries.backend_from(each.address, each.port, entries.backend_flags(each)) for each in MIXED
    ] == MIXED


def test_cluster_policy_needs_only_the_cluster_list() -> None:
    """Nobody is sent to the Local list, so it takes no slots."""
    plan = make_plan(backends=MIXED)
    assert needed_lists(plan, use_maglev=True) == {ListName.CLUSTER: [0, 1]}


def test_internal_local_policy_needs_only_the_local_list() -> None:
    """With internalTrafficPolicy Local every client of the cluster IP gets local endpoints (P1)."""
    plan = make_plan("web", make_frontend(local_for=Sources.ALL), backends=MIXED)
    assert needed_lists(plan, use_maglev=True) == {ListName.LOCAL: [1, 2]}


def test_external_local_policy_needs_both_lists_as_maglev_tables() -> None:
    """Pods and the node are sent to the Cluster list, the outside to the Local one (P4, P5)."""
    node_port = make_frontend("192.168.0.11", 30080, kind=NODE_PORT, local_for=Sources.EXTERNAL)
    plan = make_plan("web", make_frontend(), node_port, backends=MIXED)
    assert needed_lists(plan, use_maglev=True) == {
        ListName.CLUSTER: [0, 1],
        ListName.MAGLEV_CLUSTER: [0, 1],
        ListName.MAGLEV_LOCAL: [1, 2],
    }
    assert needed_lists(plan, use_maglev=False) == {
        ListName.CLUSTER: [0, 1],
        ListName.LOCAL: [1, 2],
    }


def test_service_without_endpoints_needs_no_list_and_refuses() -> None:
    """No endpoint anywhere: the flag says refuse, whatever backends drain (P2)."""
    plan = make_plan(backends=[make_backend("10.1.0.1", in_cluster=False)], has_endpoints=False)
    value = frontend_value(plan, plan.frontends[0], service=7, lists={}, ranges=0, use_maglev=True)
    assert needed_lists(plan, use_maglev=True) == {}
    assert value == FrontendValue(7, FrontendFlag.REJECT, 0, 0, 0, 0, 0, 0)


def test_frontend_value_carries_the_traffic_matrix_and_only_lists_it_uses() -> None:
    """Two Sources fields, the kind, and where each list lies."""
    node_port = make_frontend(
        "192.168.0.11",
        30080,
        kind=NODE_PORT,
        local_for=Sources.EXTERNAL,
        masquerade_for=Sources.NODE,
    )
    plan = make_plan("web", make_frontend(), node_port, backends=MIXED, affinity_s=60)
    lists = {
        ListName.CLUSTER: SlotRange(10, 2),
        ListName.MAGLEV_CLUSTER: SlotRange(100, 251),
        ListName.MAGLEV_LOCAL: SlotRange(400, 251),
    }
    values = [
        frontend_value(plan, each, service=3, lists=lists, ranges=0, use_maglev=True)
        for each in plan.frontends
    ]
    assert values == [
        FrontendValue(3, 0, 10, 2, 0, 0, 60, 0),
        FrontendValue(3, 4 | 2 << 3 | FrontendFlag.MAGLEV | 1 << 12, 100, 251, 400, 251, 60, 0),
    ]


def test_frontend_value_leaves_out_the_list_only_another_frontend_needs() -> None:
    """A cluster IP with the Local policy does not change when the Cluster list moves."""
    plan = make_plan("web", make_frontend(local_for=Sources.ALL), backends=MIXED)
    lists = {ListName.CLUSTER: SlotRange(10, 2), ListName.LOCAL: SlotRange(20, 2)}
    value = frontend_value(
        plan, plan.frontends[0], service=3, lists=lists, ranges=0, use_maglev=True
    )
    assert value == FrontendValue(3, 7, 0, 0, 20, 2, 0, 0)


def test_maglev_table_holds_every_member_evenly_and_nothing_else() -> None:
    """The table is of the members' names, filled with this node's ids."""
    plan = make_plan(backends=MIXED)
    content = slots_of(
        ListName.MAGLEV_LOCAL, [1, 2], backends=plan.backends, ids=[11, 12, 13, 14], options=OPTIONS
    )
    counts = Counter(content)
    assert counts.keys() == {12, 13} and abs(counts[12] - counts[13]) <= 1 and len(content) == 251


def test_maglev_tables_of_two_nodes_agree_though_their_ids_differ() -> None:
    """A NodePort leads to the same endpoint through any node."""
    plan = make_plan(backends=["10.1.0.1", "10.1.0.2", "10.1.0.3"])
    one, other = (
        slots_of(
            ListName.MAGLEV_CLUSTER, [0, 1, 2], backends=plan.backends, ids=ids, options=OPTIONS
        )
        for ids in ([5, 6, 7], [70, 50, 60])
    )
    assert [{5: 70, 6: 50, 7: 60}[each] for each in one] == list(other)


@pytest.mark.parametrize("name", ListName)
def test_list_of_one_endpoint_takes_one_slot(name: ListName) -> None:
    """Nothing is to be spread, so no table is built."""
    plan = make_plan(backends=["10.1.0.1"])
    content = slots_of(name, [0], backends=plan.backends, ids=[9], options=OPTIONS)
    assert list(content) == [9]


@settings(max_examples=30)
@given(st.data())
def test_frontend_read_back_from_its_value_is_the_planned_one(data: st.DataObject) -> None:
    """The flags keep all a FrontendView needs; ranges come from their own map."""
    desired = data.draw(desired_states())
    for plan in desired.plans.values():
        lists = {
            name: SlotRange(index * 1000, 1 + len(members))
            for index, (name, members) in enumerate(needed_lists(plan, use_maglev=True).items(), 1)
        }
        found = {}
        for frontend in plan.frontends:
            value = frontend_value(
                plan, frontend, service=1, lists=lists, ranges=0, use_maglev=True
            )
            found |= entries.lists_of_value(value)
            assert entries.frontend_from(frontend.key, value.flags, frontend.source_ranges) == (
                frontend,
                plan.has_endpoints,
            )
            assert not entries.is_draining(value.flags)
            assert entries.is_draining(entries.draining_value(1, value.flags).flags)
        assert found == lists
