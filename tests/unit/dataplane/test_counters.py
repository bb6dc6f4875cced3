"""What metrics read from the maps: fill, drops, flows by service port."""

from __future__ import annotations

import time

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import counters
from ebpf_svc.dataplane.ebpf.constants import Drop, FlowState
from ebpf_svc.dataplane.ebpf.counters import Counters, StepTimes
from ebpf_svc.dataplane.ebpf.flows import CLOSED_S, Flow, is_alive
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.ids import GRACE_S
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.inspect import FlowCounts, MapFill, Traffic
from ebpf_svc.model.desired import ServicePlan
from ebpf_svc.model.net import Family
from tests.lib.memory_maps import MemoryCounters, memory_tables
from tests.lib.plans import make_desired, make_frontend, make_plan

WEB = make_plan("web", backends=["10.1.0.1", "10.1.0.2"])
API = make_plan("api", make_frontend("10.96.0.20"), backends=["10.1.0.3"])
DNS = make_plan("dns", make_frontend("10.96.0.10", protocol="UDP"), backends=["10.1.0.4"])
ESTABLISHED = FlowState.ESTABLISHED
NOW_S = 1_000_000


class Drops:
    """Per-CPU counters, summed."""

    def sums(self) -> list[int]:
        return [10 + drop for drop in Drop]

    def close(self) -> None: ...


class Node:
    """An agent's maps with flows in them."""

    def __init__(self) -> None:
        self.tables = memory_tables()
        self.tables.drops = Drops()  # type: ignore[assignment]
        self.restart()
        self._ports = iter(range(1024, 60_000))

    def restart(self) -> None:
        """Another agent takes over."""
        self.agent = Forwarding(self.tables, EbpfSettings())
        self.agent.adopt()
        self.counters = Counters(self.tables, self.agent.states)

    def apply(self, *plans: ServicePlan) -> None:
        assert self.agent.apply(make_desired(*plans)).failed == ()

    def add_flow(self, service: int, *, proto: int = 6, state: int = 0, idle_s: int = 0) -> None:
        flows, codec = self.tables.family[Family.V4].flows, self.agent.states[Family.V4].codec
        address = codec.pton("10.0.0.1")
        key = flows.key.pack(
            client=address,
            service=service,
            client_port=wire_port(next(self._ports)),
            proto=proto,
            second=0,
        )
        value = flows.value.pack(
            frontend_addr=address,
            frontend_port=0,
            frontend_proto=proto,
            backend_addr=address,
            backend_port=0,
            backend_proto=proto,
            addr_diff=0,
            port_diff=0,
            backend_id=1,
            seen_s=NOW_S - idle_s,
            state=int(state),
            flags=0,
            nat_port=0,
            nat=bytes(len(address)),
            client_link=0,
            backend_link=0,
        )
        flows.update([(key, value)])

    @property
    def counts(self) -> dict[int, tuple[int, ...]]:
        """The programs' counters of services, IPv4."""
        table = self.tables.family[Family.V4].service_counters
        assert isinstance(table, MemoryCounters)
        return table.counts

    def service(self, plan: ServicePlan) -> int:
        return self.agent.states[Family.V4].records[plan.key].service


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs' clock stands still, and the machine has run for long."""
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: NOW_S * 1_000_000_000)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """Looks anew each time it is asked."""
    monkeypatch.setattr(counters, "FRESH_S", 0.0)
    return Node()


def test_flows_are_counted_by_service_port(node: Node) -> None:
    """Those that are alive, each under its service port; without any it is left out."""
    node.apply(WEB, API, DNS)
    for _ in range(5):
        node.add_flow(node.service(WEB), state=ESTABLISHED)
    node.add_flow(node.service(DNS), proto=17)
    assert node.counters.flow_counts() == FlowCounts(
        {WEB.key: 5, DNS.key: 1}, {Family.V4: 0, Family.V6: 0}
    )


@pytest.mark.parametrize("proto", [6, 17, 132])
@pytest.mark.parametrize("state", [0, ESTABLISHED, ESTABLISHED | FlowState.RESET, 3, 11])
@pytest.mark.parametrize("idle_s", [0, CLOSED_S - 2, CLOSED_S + 2, 50, 70, 110, 130, 90_000])
def test_flow_counts_while_programs_would_go_on_with_it(
    node: Node, proto: int, state: int, idle_s: int
) -> None:
    """The same rule as everywhere else: `flows.is_alive`."""
    node.apply(WEB)
    node.add_flow(node.service(WEB), proto=proto, state=state, idle_s=idle_s)
    flow = Flow(b"", 0, proto, 0, b"", b"", 0, int(state), idle_s)
    assert bool(node.counters.flow_counts().by_port) is is_alive(flow)


def test_flows_of_a_deleted_service_are_draining(node: Node) -> None:
    """They live on without a name."""
    node.apply(WEB)
    node.add_flow(node.service(WEB), state=ESTABLISHED)
    node.apply()
    counts = node.counters.flow_counts()
    assert (counts.by_port, counts.draining[Family.V4]) == ({}, 1)


def test_fill_says_what_is_used_and_what_there_is(node: Node) -> None:
    """Maps the agent writes by what it wrote, the programs' by a look."""
    node.apply(WEB, API)
    node.add_flow(node.service(WEB), state=ESTABLISHED, idle_s=200_000)
    fill = {each.name: each for each in node.counters.fill()}
    assert fill["frontends4"] == MapFill("frontends4", 2, 64, evicts=False)
    assert fill["backends4"] == MapFill("backends4", 3, 64, evicts=False)
    assert fill["frontends6"].entries == fill["source_ranges4"].entries == 0
    assert fill["slots"].entries >= 3
    # The table is as full with a dead flow as with one alive.
    assert fill["flows4"] == MapFill("flows4", 1, 1024, evicts=True)
    assert {name.rstrip("46") for name in fill} == {
        *("frontends", "backends", "source_ranges", "slots"),
        *("flows", "affinity", "fragments", "udp_sockets"),
    }


def test_drops_are_named_by_reason(node: Node) -> None:
    """Every reason there is, also those that never happened."""
    drops = node.counters.drops()
    assert drops["no_local_endpoint"] == 10
    assert [*drops] == [drop.name.lower() for drop in Drop]


def test_traffic_is_told_by_service_port(node: Node) -> None:
    """Each under its service port; one without any is left out."""
    node.apply(WEB, API, DNS)
    node.counts[node.service(WEB)] = (1, 2, 300)
    node.counts[node.service(DNS)] = (4, 5, 600)
    assert node.counters.traffic() == {WEB.key: Traffic(1, 2, 300), DNS.key: Traffic(4, 5, 600)}


def test_service_with_the_id_of_a_gone_one_counts_from_zero(node: Node) -> None:
    """And one that comes back before its id was free goes on with its counts."""
    node.apply(WEB)
    service = node.service(WEB)
    node.counts[service] = (1, 2, 300)
    node.apply()
    node.apply(WEB)
    assert node.counters.traffic() == {WEB.key: Traffic(1, 2, 300)}

    state = node.agent.states[Family.V4]
    state.services.release(service)
    state.recycle(1000.0)
    assert service in node.counts
    state.recycle(1000.0 + GRACE_S)
    assert service not in node.counts
    assert state.services.take() == service


def test_restarted_agent_keeps_the_counts_of_services_that_are_there(node: Node) -> None:
    """Counts under ids nobody has, which the last agent did not see free, are forgotten."""
    node.apply(WEB)
    service = node.service(WEB)
    node.counts.update({service: (1, 2, 300), service + 1: (4, 5, 600)})
    node.restart()
    node.apply(WEB, API)
    assert node.service(API) == service + 1
    assert node.counters.traffic() == {WEB.key: Traffic(1, 2, 300)}


def test_tables_are_not_read_for_every_collector() -> None:
    """Ten who collect cost one look."""
    node = Node()
    node.apply(WEB)
    assert node.counters.flow_counts().by_port == {}
    node.add_flow(node.service(WEB), state=ESTABLISHED)
    assert node.counters.flow_counts().by_port == {}
    node.counters.fill()


def test_steps_of_a_start_are_timed() -> None:
    """Each step from the end of the one before."""
    steps = StepTimes()
    steps.done("compile")
    time.sleep(0.01)
    steps.done("load")
    assert steps.taken_s["compile"] < 0.01 <= steps.taken_s["load"] < 1
