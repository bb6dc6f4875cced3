"""The ipvs dataplane against a kernel in memory: the law, what a change costs, what rests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.config import Settings
from ebpf_svc.config.ipvs import IpvsSettings
from ebpf_svc.dataplane.ipvs import connections, kernel
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host.ipvs import PERSISTENT, Dest, ServerKey, Shape
from ebpf_svc.model.desired import DesiredState, FrontendKind, ServicePlan
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from tests.lib.ipvs_machine import ELSEWHERE, Machine, live_in, make
from tests.lib.plans import make_frontend, make_plan
from tests.lib.strategies import snapshot_sequences

WEB = ServerKey("10.96.0.1", 80, Protocol.TCP)
FIRST, SECOND = Dest("10.1.0.1", 8080), Dest("10.1.0.2", 8080)
SETTINGS = Settings(cluster_cidrs=("10.244.0.0/16", "fd00:10:244::/48"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine()
    live_in(made, monkeypatch)
    yield made


def state(*plans: ServicePlan) -> DesiredState:
    return DesiredState({plan.key: plan for plan in plans})


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_law(data: st.DataObject) -> None:
    """What is applied is read back and applied once, restarts and resyncs between."""
    machine = Machine()
    with pytest.MonkeyPatch.context() as patch:
        live_in(machine, patch)
        planner = Planner(PlanOptions.from_settings(SETTINGS))
        made = make(SETTINGS)
        for number, snapshot in enumerate(data.draw(snapshot_sequences())):
            desired = planner.plan(snapshot)
            assert made.apply(desired).failed == ()
            assert made.read() == made.view(desired)
            assert made.apply(desired).writes == 0
            if number % 2:
                made.close()
                made = make(SETTINGS)
                assert made.apply(desired).repaired == ()
            again = made.apply(desired, resync=True)
            assert (again.writes, again.repaired) == (0, ())
            assert made.read() == made.view(desired)
        made.cleanup()
    assert machine.empty


@pytest.mark.parametrize("count", [10, 1000])
def test_a_changed_endpoint_costs_the_same_however_many_services(
    machine: Machine, count: int
) -> None:
    """One endpoint for another is a real server added, one counted and removed, and a hairpin."""
    plans = [
        make_plan(f"s{number}", make_frontend(f"10.96.{number >> 8}.{number & 255}"))
        for number in range(count)
    ]
    made = make()
    made.apply(state(*plans))
    machine.told.clear()
    moved = make_plan("s3", make_frontend("10.96.0.3"), backends=["10.1.0.1", "10.1.0.9"])
    report = made.apply(state(*(moved if plan.key == moved.key else plan for plan in plans)))
    assert machine.told == {"dests": 2, "counts": 1, "entries": 1}
    assert (report.writes, report.changed) == (3, 1)


def test_real_server_with_connections_rests_until_they_end(machine: Machine) -> None:
    """Row 57: weight 0 and kept while connections of any state are left, then deleted (V11)."""
    made = make()
    made.apply(state(make_plan()))
    machine.connections[WEB, SECOND] = 2
    less = state(make_plan(backends=["10.1.0.1"]))
    made.apply(less)
    assert machine.dests[WEB] == {FIRST: 1, SECOND: 0}
    assert made.read() == made.view(less)
    assert made.apply(less, resync=True).writes == 0
    machine.connections.clear()
    report = made.apply(less, resync=True)
    assert machine.dests[WEB] == {FIRST: 1}
    assert (report.writes, report.repaired) == (1, ())


def test_real_server_without_connections_goes_at_once(machine: Machine) -> None:
    """Row 57: none left, deleted."""
    made = make()
    made.apply(state(make_plan()))
    made.apply(state(make_plan(backends=["10.1.0.1"])))
    assert machine.dests[WEB] == {FIRST: 1}


def test_udp_goes_at_once(machine: Machine) -> None:
    """Row 57: UDP is deleted whatever its connections."""
    made = make()
    frontend = make_frontend(protocol="UDP")
    made.apply(state(make_plan("dns", frontend)))
    key = ServerKey("10.96.0.1", 80, Protocol.UDP)
    machine.connections[key, SECOND] = 5
    made.apply(state(make_plan("dns", frontend, backends=["10.1.0.1"])))
    assert machine.dests[key] == {FIRST: 1}


def test_endpoint_that_returns_serves_again_and_keeps_its_connections(machine: Machine) -> None:
    """V11: resting, it is wanted again: only its weight changes."""
    made = make()
    both, one = state(make_plan()), state(make_plan(backends=["10.1.0.1"]))
    made.apply(both)
    machine.connections[WEB, SECOND] = 1
    made.apply(one)
    machine.told.clear()
    made.apply(both)
    assert machine.dests[WEB] == {FIRST: 1, SECOND: 1}
    assert machine.told["dests"] == 1
    assert made.apply(both, resync=True).writes == 0


def test_last_endpoint_rests_behind_a_refusal(machine: Machine) -> None:
    """Open connections outlive the last endpoint, new ones are refused (P2, P12)."""
    made = make()
    made.apply(state(make_plan()))
    machine.connections[WEB, FIRST] = 1
    none = state(make_plan(backends=[], has_endpoints=False))
    made.apply(none)
    assert machine.dests[WEB] == {FIRST: 0}
    assert len(machine.sets["KUBE-NO-ENDPOINTS"].entries) == 1
    assert made.read() == made.view(none)
    machine.connections.clear()
    made.apply(none, resync=True)
    assert WEB not in machine.shapes
    made.apply(state(make_plan()))
    assert machine.dests[WEB] == {FIRST: 1, SECOND: 1}
    assert not machine.sets["KUBE-NO-ENDPOINTS"].entries


def test_weights_of_an_earlier_run_are_set_again(machine: Machine) -> None:
    """Row 58: what rests from before the restart and is wanted gets weight 1."""
    made = make()
    made.apply(state(make_plan()))
    made.close()
    machine.dests[WEB][SECOND] = 0
    machine.connections[WEB, SECOND] = 1
    report = make().apply(state(make_plan()))
    assert machine.dests[WEB] == {FIRST: 1, SECOND: 1}
    assert report.repaired == ()


def test_virtual_servers_of_others_stay(machine: Machine) -> None:
    """Row 59: neither what is in no set of ours nor what excludeCIDRs name is removed (V12)."""
    excluded, foreign, stale = (
        ServerKey("10.96.9.9", 80, Protocol.TCP),
        ServerKey("203.0.113.9", 80, Protocol.TCP),
        ServerKey("10.96.0.7", 80, Protocol.TCP),
    )
    for key in (excluded, foreign, stale):
        machine.shapes[key], machine.dests[key] = Shape("rr"), {}
    machine.has_device = True
    machine.addresses |= {"10.96.9.9": 7, "10.96.0.7": 7}
    rules = IpvsSettings(exclude_cidrs=("10.96.9.0/24",))
    made = make(Settings(ipvs=rules))
    made.apply(state(make_plan()))
    assert machine.shapes.keys() == {excluded, foreign, WEB}
    made.cleanup()
    assert machine.shapes.keys() == {excluded, foreign}


def test_address_stays_until_its_last_port_goes(machine: Machine) -> None:
    """Row 60: two service ports on one address."""
    made = make()
    http, https = make_plan("http"), make_plan("https", make_frontend(port=443))
    made.apply(state(http, https))
    made.apply(state(https))
    assert machine.addresses == {ELSEWHERE: 2, "10.96.0.1": 7}
    made.apply(state())
    assert machine.addresses == {ELSEWHERE: 2}


def test_only_cluster_ips_are_bound_besides_another_device(machine: Machine) -> None:
    """V4: an external IP that is the node's stays on its device; node ports are bound nowhere."""
    frontends = [
        make_frontend(ELSEWHERE, kind=FrontendKind.EXTERNAL_IP, masquerade_for=Sources.ALL),
        make_frontend(ELSEWHERE, 30080, kind=FrontendKind.NODE_PORT, masquerade_for=Sources.ALL),
        make_frontend("198.51.100.1", kind=FrontendKind.EXTERNAL_IP, masquerade_for=Sources.ALL),
    ]
    make().apply(state(make_plan("web", *frontends)))
    assert machine.addresses == {ELSEWHERE: 2, "198.51.100.1": 7}
    assert machine.told["addresses"] == 1


def test_changed_affinity_and_scheduler_change_the_virtual_server(machine: Machine) -> None:
    """V5, V6: shapes change in place, real servers stay."""
    made = make()
    made.apply(state(make_plan()))
    machine.told.clear()
    made.apply(state(make_plan(affinity_s=600)))
    assert machine.shapes[WEB] == Shape("rr", PERSISTENT, 600)
    assert +machine.told == {"servers": 1}
    made.close()
    make(Settings(ipvs=IpvsSettings(scheduler="lc"))).apply(state(make_plan(affinity_s=600)))
    assert machine.shapes[WEB] == Shape("lc", PERSISTENT, 600)


def test_what_others_changed_is_repaired_and_told(machine: Machine) -> None:
    """A resync puts back what is missing, takes away what is foreign, and says both."""
    made = make()
    desired = state(make_plan())
    made.apply(desired)
    del machine.shapes[WEB], machine.dests[WEB], machine.addresses["10.96.0.1"]
    machine.sets["KUBE-CLUSTER-IP"].entries.clear()
    machine.has_rules = False
    report = made.apply(desired, resync=True)
    assert made.read() == made.view(desired)
    assert "virtual server 10.96.0.1 port 80/TCP was missing" in report.repaired
    assert "rules were missing" in report.repaired
    assert made.apply(desired, resync=True).repaired == ()


def test_module_that_is_being_loaded_for_others_is_waited_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says at once that it has no such type of set; for good only after a while."""
    monkeypatch.setattr(kernel, "LOADING_S", 0.1)
    machine.loading = 1000
    with pytest.raises(DataplaneError, match="KUBE-LOOP-BACK"):
        kernel.Kernel().prepare([Family.V4])
    machine.loading = 3
    make().apply(state(make_plan()))
    assert WEB in machine.shapes


def test_rules_of_another_mode_serve_until_servers_are_there(machine: Machine) -> None:
    """The iptables mode has chains of the same names: whoever takes them first cuts it off (Z3)."""
    make().apply(state(make_plan()))
    assert machine.served_before_rules == [WEB]


def test_rules_come_with_the_first_of_a_kind_and_go_with_the_last(machine: Machine) -> None:
    """Rules about sets that are empty would cost every packet a look; each write is one of rules,
    however many services have the kind already.
    """
    made, plain = make(), make_plan()
    guarded = [
        make_plan(name, make_frontend(address, kind=FrontendKind.LOAD_BALANCER,
                                      source_ranges=("192.0.2.0/24",)))
        for name, address in (("a", "10.96.0.8"), ("b", "10.96.0.9"))
    ]  # fmt: skip
    made.apply(state(plain))
    before = machine.asked
    assert before is not None
    assert "KUBE-LOAD-BALANCER-FW" not in before
    counts = []
    for plans in ([plain, *guarded[:1]], [plain, *guarded], [plain, *guarded[:1]], [plain]):
        counts.append(made.apply(state(*plans)).details["rules"])
        assert machine.asked is not None
        assert ("KUBE-LOAD-BALANCER-FW" in machine.asked) == (len(plans) > 1)
    assert counts == [1, 0, 0, 1]
    assert machine.asked == before
    made.close()
    assert make().apply(state(plain)).writes == 0


def test_refused_service_port_fails_alone_and_is_tried_again(machine: Machine) -> None:
    """What the kernel does not take is told by service port; the others are written."""
    made = make()
    bad = make_plan("bad", make_frontend("10.96.0.2"))
    machine.refuses.add(ServerKey("10.96.0.2", 80, Protocol.TCP))
    desired = state(make_plan(), bad)
    (failure,) = made.apply(desired).failed
    assert failure.service == str(bad.key)
    assert WEB in machine.shapes
    machine.refuses.clear()
    assert made.apply(desired).failed == ()
    assert made.read() == made.view(desired)


def test_connections_are_counted_by_service_port(machine: Machine) -> None:
    """Of every state, over all virtual servers of the service port; none while not open."""
    made = make()
    other = make_plan("other", make_frontend("10.96.0.2"))
    made.apply(state(make_plan(), other))
    machine.connections |= {(WEB, FIRST): 2, (WEB, SECOND): 1}
    assert made.flow_counts().by_port == {make_plan().key: 3}
    made.close()
    assert made.flow_counts().by_port == {}


def test_connections_are_those_of_the_last_look_where_looking_is_slow(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hundred thousand services no metrics request waits for the kernel's list."""
    monkeypatch.setattr(connections, "SLOW_LOOK_S", -1.0)
    made = make()
    made.apply(state(make_plan()))
    machine.connections[WEB, FIRST] = 2
    made.apply(state(make_plan()), resync=True)
    machine.connections[WEB, FIRST] = 5
    assert made.flow_counts().by_port == {make_plan().key: 2}
    made.apply(state(make_plan()), resync=True)
    assert made.flow_counts().by_port == {make_plan().key: 5}


def test_retired_dataplane_waits_for_its_connections(machine: Machine) -> None:
    """All rests; it may go once no connection is left; without anything of ours at once.

    UDP flows are handed on while servers still answer them, and what came since is let go. The
    node's own connections from addresses that go end, those from others do not.
    """
    made = make()
    port = make_frontend(ELSEWHERE, 30080, kind=FrontendKind.NODE_PORT)
    made.apply(state(make_plan("web", make_frontend(), port)))
    made.close()
    machine.connections[WEB, FIRST] = 1
    assert not made.retire()
    assert set(machine.dests[WEB].values()) == {0}
    machine.connections.clear()
    assert made.retire()
    made.cleanup()
    assert machine.empty
    port_key = ServerKey(*port.key)
    assert machine.forgotten == [
        *((WEB, True), (port_key, True)),
        *((WEB, False), (port_key, False)),
    ]
    assert machine.ended == {WEB.address}
    assert made.retire()


def test_servers_go_against_the_order_in_which_they_come(machine: Machine) -> None:
    """What comes back is then found at once among what the kernel still remembers."""
    made, plans = make(), [make_plan(str(i), make_frontend(f"10.96.0.{i}")) for i in (3, 20, 1)]
    made.apply(state(*plans))
    came = list(machine.shapes)
    assert len(came) == len(plans)
    made.cleanup()
    assert machine.removed == came[::-1]


def test_cleanup_leaves_what_a_kube_proxy_wrote(machine: Machine) -> None:
    """Without the sign of ours nothing is ours; nothing to clean up is no error (row 63)."""
    machine.shapes[WEB], machine.dests[WEB] = Shape("rr"), {}
    machine.has_device, machine.addresses["10.96.0.1"] = True, 7
    make_closed = make()
    make_closed.close()
    make_closed.cleanup()
    assert WEB in machine.shapes
    assert machine.has_device
