"""Forwarding: which entries an apply writes, in which order, what it survives; in memory."""

from __future__ import annotations

import errno
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import entries
from ebpf_svc.dataplane.ebpf.codec import number
from ebpf_svc.dataplane.ebpf.constants import BACKEND_CHAIN_MAX
from ebpf_svc.dataplane.ebpf.entries import SlotRange
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.state import FamilyState
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.model.desired import DesiredState, FrontendKind, ServicePlan
from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.memory_maps import memory_tables
from tests.lib.plans import make_backend, make_desired, make_frontend, make_plan
from tests.lib.strategies import desired_states

SETTINGS = EbpfSettings()
ALL = tuple(Protocol)


def forwarding(tables: Tables) -> Forwarding:
    """An agent that starts over these maps."""
    started = Forwarding(tables, SETTINGS)
    started.adopt()
    return started


def state_of(agent: Forwarding, family: Family = Family.V4) -> FamilyState:
    return agent.states[family]


def ids_of(agent: Forwarding, plan: ServicePlan) -> tuple[int, list[int]]:
    """Service id and backend ids the agent gave."""
    record = state_of(agent).records[plan.key]
    return record.service, list(record.backend_ids)


def chain_of(tables: Tables, agent: Forwarding, address: str, port: int = 8080) -> list[int]:
    """Ids of the backends that answer at that TCP port, as the egress program walks them."""
    codec, of_family = state_of(agent).codec, tables.family[Family.V4]
    head = of_family.backend_index.lookup(codec.at(address, port, 6))
    chain = []
    here = number(head) if head else 0
    while here:
        chain.append(here)
        here = codec.backend_words(
            of_family.backends.view(here + 1), here * of_family.backends.stride
        )[1]
    return chain


@settings(max_examples=40, deadline=None)
@given(st.lists(desired_states(of_protocols=ALL), min_size=1, max_size=4), st.randoms())
def test_law_holds_through_changes_and_restarts(
    states: list[DesiredState], chance: random.Random
) -> None:
    """After apply(d), read() == d.view(); applying it again writes nothing, restarted or not."""
    tables = memory_tables()
    agent = forwarding(tables)
    for desired in states:
        assert agent.apply(desired).failed == ()
        assert agent.read() == desired.view()
        assert agent.apply(desired).writes == 0
        equal = DesiredState({key: replace(plan) for key, plan in desired.plans.items()})
        assert agent.apply(equal).writes == 0
        if chance.random() < 0.5:
            agent = forwarding(tables)
            report = agent.apply(desired)
            assert (report.writes, report.repaired) == (0, ())
        assert agent.apply(desired, resync=True).writes == 0
        assert agent.read() == desired.view()


def test_first_apply_after_restart_writes_only_the_difference() -> None:
    """Ids and slot ranges are found in the maps: nothing moves because the agent restarted."""
    tables = memory_tables()
    web = make_plan("web", backends=["10.1.0.1", "10.1.0.2"])
    api = make_plan("api", make_frontend("10.96.0.2"), backends=["10.1.0.1"])
    agent = forwarding(tables)
    agent.apply(make_desired(web, api))
    before = ids_of(agent, web), ids_of(agent, api)
    lists = state_of(agent).records[web.key].lists
    agent = forwarding(tables)
    report = agent.apply(make_desired(web, replace(api, affinity_s=60)))
    assert report.details == {"frontends4": 1}
    assert (ids_of(agent, web), ids_of(agent, api)) == before
    assert state_of(agent).records[web.key].lists == lists


def test_service_deleted_while_the_agent_was_away_is_wound_up() -> None:
    """What no plan claims after a restart drains like what was deleted under its eyes (P12)."""
    tables = memory_tables()
    web = make_plan("web")
    dns = make_plan("dns", make_frontend("10.96.0.2", 53, "UDP"), backends=["10.1.0.3"])
    forwarding(tables).apply(make_desired(web, dns))
    agent = forwarding(tables)
    agent.apply(make_desired())
    assert agent.read() == {}
    (value,) = (value for _, value in tables.family[Family.V4].frontends.items())
    assert entries.is_draining(state_of(agent).codec.frontend_value(value).flags)


def test_endpoint_change_writes_new_backend_tombstone_list_and_frontend() -> None:
    """The list goes to a fresh range, one frontend update switches to it, the old id dies last."""
    tables = memory_tables()
    agent = forwarding(tables)
    agent.apply(make_desired(make_plan(backends=["10.1.0.1", "10.1.0.2"])))
    after = make_plan(backends=["10.1.0.1", "10.1.0.3"])
    report = agent.apply(make_desired(after))
    assert report.details == {"backends4": 2, "backend_index4": 1, "slots": 2, "frontends4": 1}
    assert agent.read() == make_desired(after).view()
    assert len(chain_of(tables, agent, "10.1.0.2")) == 1  # a tombstone: replies still find it


def test_frontend_is_switched_after_what_it_points_at_and_before_what_it_left() -> None:
    """At the moment of the switch the new backend serves, and so does the one about to leave."""
    tables = memory_tables()
    agent = forwarding(tables)
    agent.apply(make_desired(make_plan(backends=["10.1.0.1"])))
    frontends, seen = tables.family[Family.V4].frontends, []
    update = frontends.update

    def switch(items: list[tuple[bytes, bytes]]) -> None:
        state = state_of(agent)
        for _, data in items:
            value = state.codec.frontend_value(data)
            slots = tables.slots.read(value.cluster_first, value.cluster_count)
            table = state.tables.backends
            for backend in (*memoryview(slots).cast("I"), 1):
                view, at = table.view(backend + 1), backend * table.stride
                flags = state.codec.backend_words(view, at)[2]
                seen.append((*state.codec.endpoint(view, at), flags))
        update(items)

    frontends.update = switch  # type: ignore[method-assign, assignment]
    agent.apply(make_desired(make_plan(backends=["10.1.0.2"])))
    assert seen == [("10.1.0.2", 8080, 3), ("10.1.0.1", 8080, 3)]


def test_list_that_did_not_change_keeps_its_slots() -> None:
    """A frontend more, or affinity, is no reason to write slots."""
    tables = memory_tables()
    agent = forwarding(tables)
    agent.apply(make_desired(make_plan()))
    more = make_plan("web", make_frontend(), make_frontend("10.96.0.9"), affinity_s=30)
    assert agent.apply(make_desired(more)).details == {"frontends4": 2}


def test_external_frontends_share_one_maglev_table() -> None:
    """NodePort and load balancer IP lead to one table; the cluster IP to the plain list."""
    tables = memory_tables()
    agent = forwarding(tables)
    plan = make_plan(
        "web",
        make_frontend(),
        make_frontend("192.168.0.11", 30080, kind=FrontendKind.NODE_PORT),
        make_frontend("203.0.113.1", 80, kind=FrontendKind.LOAD_BALANCER),
    )
    assert agent.apply(make_desired(plan)).details["slots"] == 2 + 251


def test_frontend_moved_to_another_service_stays_with_its_new_owner() -> None:
    """The service that loses an address does not delete what the other one has written."""
    tables = memory_tables()
    agent = forwarding(tables)
    vip = make_frontend("203.0.113.1", kind=FrontendKind.EXTERNAL_IP)
    before = make_desired(
        make_plan("api", make_frontend("10.96.0.1"), backends=["10.1.0.1"]),
        make_plan("web", make_frontend("10.96.0.2"), vip, backends=["10.1.0.2"]),
    )
    after = make_desired(
        make_plan("api", make_frontend("10.96.0.1"), vip, backends=["10.1.0.1"]),
        make_plan("web", make_frontend("10.96.0.2"), backends=["10.1.0.2"]),
    )
    for desired in (before, after, before):
        agent.apply(desired)
        assert agent.read() == desired.view()


def test_service_that_comes_back_while_it_drains_keeps_ids() -> None:
    """Connections made before the deletion go on: their service and backends are the same."""
    tables = memory_tables()
    agent = forwarding(tables)
    web = make_plan()
    agent.apply(make_desired(web))
    before = ids_of(agent, web)
    agent.apply(make_desired())
    assert agent.read() == {}
    agent.apply(make_desired(web))
    assert ids_of(agent, web) == before
    assert agent.read() == make_desired(web).view()


def test_udp_frontend_is_deleted_at_once() -> None:
    """A UDP client has nothing to finish: it shall be refused or find the next service."""
    tables = memory_tables()
    agent = forwarding(tables)
    agent.apply(make_desired(make_plan("dns", make_frontend("10.96.0.2", 53, "UDP"))))
    agent.apply(make_desired())
    assert list(tables.family[Family.V4].frontends.items()) == []


def test_services_with_the_same_endpoint_hang_in_one_chain() -> None:
    """Replies from it are told apart by walking the chain; the newest comes first."""
    tables = memory_tables()
    agent = forwarding(tables)
    plans = [
        make_plan(f"web{i}", make_frontend(f"10.96.0.{i}"), backends=["10.1.0.1"])
        for i in range(1, 4)
    ]
    agent.apply(make_desired(*plans[:2]))
    agent.apply(make_desired(*plans))
    ids = [ids_of(agent, plan)[1][0] for plan in plans]
    assert chain_of(tables, agent, "10.1.0.1") == [ids[2], ids[1], ids[0]]


def test_service_ports_beyond_a_walk_are_put_at_the_end_of_the_chain() -> None:
    """A program walks the first few: those that are among them stay, whatever comes and goes."""
    tables = memory_tables()
    agent = forwarding(tables)
    plans = [
        make_plan(f"web{i:02}", make_frontend(f"10.96.1.{i}"), backends=["10.1.0.1"])
        for i in range(3 * BACKEND_CHAIN_MAX)
    ]
    first: set[int] = set()
    for count in (BACKEND_CHAIN_MAX - 1, BACKEND_CHAIN_MAX + 2, BACKEND_CHAIN_MAX + 3, len(plans)):
        desired = make_desired(*plans[:count])
        assert agent.apply(desired).failed == ()
        assert agent.read() == desired.view()
        chain = chain_of(tables, agent, "10.1.0.1")
        assert len(chain) == count
        assert first <= set(chain[:BACKEND_CHAIN_MAX])
        first = set(chain[:BACKEND_CHAIN_MAX])
    agent = forwarding(tables)
    assert agent.apply(desired, resync=True).repaired == ()


def test_services_that_come_and_go_behind_an_endpoint_are_all_there() -> None:
    """However many there were before a sweep, each is linked once."""
    tables = memory_tables()
    agent = forwarding(tables)
    for i in range(2 * BACKEND_CHAIN_MAX):
        plan = make_plan(f"web{i:02}", make_frontend(f"10.96.1.{i}"), backends=["10.1.0.1"])
        desired = make_desired(plan)
        assert agent.apply(desired).failed == ()
        assert agent.read() == desired.view()
        chain = chain_of(tables, agent, "10.1.0.1")
        assert len(chain) == len(set(chain)) == i + 1
        assert ids_of(agent, plan)[1][0] in chain
    agent = forwarding(tables)
    assert agent.apply(desired, resync=True).repaired == ()


def test_full_frontend_map_fails_only_the_plans_without_room_and_they_are_retried() -> None:
    """Others are written; when room appears the next apply of the same state writes the rest."""
    tables = memory_tables(frontends=3)
    agent = forwarding(tables)
    dns = [
        make_plan(f"dns{i}", make_frontend(f"10.96.2.{i}", 53, "UDP"), backends=[f"10.1.1.{i}"])
        for i in range(3)
    ]
    web = make_plan("web", make_frontend("10.96.0.1"), make_frontend("10.96.0.2"))
    agent.apply(make_desired(*dns[:2]))
    report = agent.apply(make_desired(*dns[:2], web))
    assert [error.service for error in report.failed] == [str(web.key)]
    assert isinstance(report.failed[0].__cause__, OSError)
    desired = make_desired(dns[0], web)
    agent.apply(desired)
    report = agent.apply(desired)
    assert report.failed == ()
    assert agent.read() == desired.view()
    assert agent.apply(desired).writes == 0


def test_list_a_frontend_still_points_at_is_not_given_away() -> None:
    """A switch the kernel refuses leaves the old list in use: its slots stay taken."""
    tables = memory_tables()
    agent = forwarding(tables)
    agent.apply(make_desired(make_plan()))
    frontends = tables.family[Family.V4].frontends
    update = frontends.update

    def refuse(items: list[tuple[bytes, bytes]]) -> None:
        if items:
            raise OSError(errno.ENOMEM, "out of memory", "frontends4")

    frontends.update = refuse  # type: ignore[method-assign, assignment]
    changed = make_plan(backends=["10.1.0.1", "10.1.0.3"])
    (failed,) = agent.apply(make_desired(changed)).failed
    assert failed.service == str(changed.key)
    (data,) = (value for _, value in frontends.items())
    used = state_of(agent).codec.frontend_value(data)
    assert (
        SlotRange(used.cluster_first, used.cluster_count)
        in state_of(agent).records[changed.key].retired
    )
    frontends.update = update  # type: ignore[method-assign]
    assert agent.apply(make_desired(changed)).failed == ()
    assert state_of(agent).records[changed.key].retired == ()
    assert agent.read() == make_desired(changed).view()


def test_resync_writes_a_scribbled_list_again() -> None:
    """Slots are compared too, those of a Maglev table without building it."""
    tables = memory_tables()
    agent = forwarding(tables)
    node_port = make_frontend("192.168.0.11", 30080, kind=FrontendKind.NODE_PORT)
    desired = make_desired(make_plan("web", make_frontend(), node_port))
    agent.apply(desired)
    before = tables.slots.read(0, 300)
    for slot in (1, 200):
        tables.slots.write(slot, (9).to_bytes(4, "little"))
    report = agent.apply(desired, resync=True)
    assert report.repaired == (
        "slots CLUSTER of default/web/TCP/IPv4 written again",
        "slots MAGLEV_CLUSTER of default/web/TCP/IPv4 written again",
    )
    assert tables.slots.read(0, 300) == before


def test_too_many_backends_fail_one_plan_and_take_nothing() -> None:
    """Ids taken for a plan that cannot be finished are given back."""
    tables = memory_tables(backends=8)
    agent = forwarding(tables)
    big = make_plan("big", backends=[f"10.1.2.{i}" for i in range(10)])
    small = make_plan("small", make_frontend("10.96.0.2"), backends=["10.1.0.1"])
    report = agent.apply(make_desired(big, small))
    assert [error.service for error in report.failed] == [str(big.key)]
    assert agent.read() == make_desired(small).view()
    assert len(state_of(agent).backends) == len(state_of(agent).services) == 1


def test_plan_that_fails_leaves_nothing_in_the_chains_of_its_endpoints() -> None:
    """The id it gave back may be another's by now: the next service must not lead there."""
    tables = memory_tables(slots=128)
    agent = forwarding(tables)
    node_port = make_frontend("192.168.0.11", 30080, kind=FrontendKind.NODE_PORT)
    wide = make_plan("a-wide", node_port, backends=["10.1.0.1", "10.1.0.2"])
    plans = [
        make_plan(f"web{i}", make_frontend(f"10.96.0.{i}"), backends=[f"10.1.0.{i}"])
        for i in (1, 2)
    ]
    report = agent.apply(make_desired(wide, *plans))
    assert [error.service for error in report.failed] == [str(wide.key)]
    for i, plan in zip((1, 2), plans, strict=True):
        assert chain_of(tables, agent, f"10.1.0.{i}") == ids_of(agent, plan)[1]


def test_vips_of_one_service_filter_by_their_own_source_ranges() -> None:
    """Each VIP lets itself in (P10), so two VIPs of a service have two sets."""
    tables = memory_tables()
    agent = forwarding(tables)
    vips = [
        make_frontend(
            f"203.0.113.{i}",
            kind=FrontendKind.LOAD_BALANCER,
            source_ranges=["192.168.0.0/16", f"203.0.113.{i}/32"],
        )
        for i in (1, 2)
    ]
    desired = make_desired(make_plan("web", *vips))
    report = agent.apply(desired)
    assert report.details["source_ranges4"] == 4
    assert agent.read() == desired.view()


def test_equal_source_ranges_are_kept_once() -> None:
    """A set never changes, so any number of frontends may share it."""
    tables = memory_tables()
    agent = forwarding(tables)
    plans = [
        make_plan(
            f"web{i}",
            make_frontend(
                f"203.0.113.{i}", kind=FrontendKind.LOAD_BALANCER, source_ranges=["10.0.0.0/8"]
            ),
        )
        for i in range(1, 4)
    ]
    assert agent.apply(make_desired(*plans)).details["source_ranges4"] == 1


def test_full_source_range_map_fails_the_plan_and_leaves_no_half_set() -> None:
    """A filter with prefixes missing would let nobody in: the frontend keeps what it had."""
    tables = memory_tables(source_ranges=2)
    agent = forwarding(tables)
    plain = make_plan("web", make_frontend("203.0.113.1", kind=FrontendKind.LOAD_BALANCER))
    agent.apply(make_desired(plain))
    filtered = make_plan(
        "web",
        make_frontend(
            "203.0.113.1",
            kind=FrontendKind.LOAD_BALANCER,
            source_ranges=["10.0.0.0/8", "11.0.0.0/8", "12.0.0.0/8"],
        ),
    )
    report = agent.apply(make_desired(filtered))
    assert len(report.failed) == 1
    assert agent.read() == make_desired(plain).view()
    assert list(tables.family[Family.V4].source_ranges.items()) == []


@pytest.mark.parametrize("seed", range(8))
def test_resync_restores_maps_that_somebody_scribbled_over(seed: int) -> None:
    """Entries deleted, added and changed by others: all are put right and counted as repairs."""
    chance = random.Random(seed)
    tables = memory_tables()
    agent = forwarding(tables)
    range_vip = make_frontend(
        "203.0.113.1",
        kind=FrontendKind.LOAD_BALANCER,
        local_for=Sources.EXTERNAL,
        source_ranges=["10.0.0.0/8", "192.168.0.0/16"],
    )
    local = [make_backend("10.1.0.1", in_local=True), make_backend("10.1.0.2")]
    desired = make_desired(
        make_plan("web", make_frontend("10.96.0.1"), range_vip, backends=local),
        make_plan("api", make_frontend("10.96.0.2"), backends=["10.1.0.1", "10.1.0.2"]),
        make_plan("six", make_frontend("fd00:96::1"), backends=["fd00:1::1", "fd00:1::2"]),
    )
    agent.apply(desired)
    for _ in range(4):
        _scribble(tables, chance)
    report = agent.apply(desired, resync=True)
    assert report.writes and report.repaired
    assert agent.read() == desired.view()
    assert agent.apply(desired, resync=True).writes == 0


def _scribble(tables: Tables, chance: random.Random) -> None:
    """Do one thing to the maps that no agent would."""
    of_family = tables.family[chance.choice(list(Family))]
    table = chance.choice([of_family.frontends, of_family.backend_index, of_family.source_ranges])
    items = sorted(table.items())
    what = chance.randrange(5)
    if what == 0 and items:
        table.delete([chance.choice(items)[0]])
    elif what == 1 and items:
        key, value = chance.choice(items)
        table.update([(key, bytes(reversed(value)))])
    elif what == 2:
        table.update([(chance.randbytes(table.key.size), chance.randbytes(table.value.size))])
    elif what == 3:
        tables.slots.write(chance.randrange(4), chance.randbytes(4))
    else:
        of_family.backends.write(
            chance.randrange(1, 5), chance.randbytes(of_family.backends.value.size)
        )
    # What was scribbled may be harmless (a slot nobody uses): this one never is.
    vips = tables.family[Family.V4].frontends
    vips.delete([key for key, _ in vips.items()][:1])


def test_many_repairs_of_one_kind_are_counted_not_listed() -> None:
    """Whoever flushes a map is told once, with the number."""
    tables = memory_tables()
    agent = forwarding(tables)
    plans = [
        make_plan(f"web{i:02}", make_frontend(f"10.96.1.{i}"), backends=[f"10.1.0.{i}"])
        for i in range(40)
    ]
    agent.apply(make_desired(*plans))
    tables.family[Family.V4].frontends.delete(
        [key for key, _ in tables.family[Family.V4].frontends.items()]
    )
    report = agent.apply(make_desired(*plans), resync=True)
    assert len(report.repaired) == 21
    assert report.repaired[-1] == "frontend: 20 more like these"


def test_damaged_maps_are_mended_by_the_first_apply_after_a_restart() -> None:
    """An agent that finds nonsense starts all the same, and says what it put right."""
    tables = memory_tables()
    desired = make_desired(make_plan())
    forwarding(tables).apply(desired)
    of_family = tables.family[Family.V4]
    of_family.backend_index.update(
        [(b"\x0a\x01\x00\x63\x1f\x90\x06\x00", (77_777).to_bytes(4, "little"))]
    )
    agent = forwarding(tables)
    report = agent.apply(desired)
    assert any("not ours" in sentence for sentence in report.repaired)
    assert agent.read() == desired.view()


def test_number_of_writes_for_one_endpoint_does_not_depend_on_the_number_of_services() -> None:
    """An endpoint that changes costs the same entries among 10 and among 1,000 services."""
    details = []
    for services in (10, 1000):
        tables = memory_tables(frontends=2048, backends=4096)
        agent = forwarding(tables)
        plans = {}
        for i in range(services):
            ends = [f"10.{1 + i // 250}.{i % 250}.{j}" for j in range(1, 4)]
            frontend = make_frontend(f"10.96.{i // 250}.{1 + i % 250}")
            plan = make_plan(f"web{i}", frontend, backends=ends)
            plans[plan.key] = plan
        agent.apply(DesiredState(plans))
        key = next(iter(plans))
        changed = replace(
            plans[key],
            backends=(*plans[key].backends[:2], make_backend("10.99.0.1")),
        )
        details.append(agent.apply(DesiredState(plans | {key: changed})).details)
    assert details[0] == details[1]
    assert sum(details[0].values()) == 2 + 1 + 3 + 1
