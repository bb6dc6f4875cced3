"""Sweep: tombstones, draining frontends and ids go when no flow needs them, and not before."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import flows
from ebpf_svc.dataplane.ebpf.codec import Codec
from ebpf_svc.dataplane.ebpf.constants import SYN_IDLE_S, FlowState
from ebpf_svc.dataplane.ebpf.flows import CLOSED_S, TCP_IDLE_S
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.ids import GRACE_S
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.ebpf.state import FamilyState
from ebpf_svc.dataplane.ebpf.sweep import FamilySweep
from ebpf_svc.dataplane.ebpf.tables import FamilyTables
from ebpf_svc.model.desired import FrontendKind, ServicePlan
from ebpf_svc.model.net import Family
from tests.lib.memory_maps import memory_tables
from tests.lib.plans import make_desired, make_frontend, make_plan

TCP, UDP = 6, 17
NOW_S = 1_000_000
"""What the programs' clock says."""
ESTABLISHED = int(FlowState.ESTABLISHED)
CLOSED = ESTABLISHED | FlowState.CLIENT_FIN | FlowState.BACKEND_FIN
EXTERNAL = make_frontend("203.0.113.1", kind=FrontendKind.EXTERNAL_IP)


class Node:
    """An agent's maps, with flows as programs would have stored them."""

    def __init__(self) -> None:
        self._all = memory_tables()
        self.tables: FamilyTables = self._all.family[Family.V4]
        self.start()
        self._now_s = 1000.0
        self._ports = iter(range(40_000, 60_000))

    def start(self) -> None:
        """Start the agent, or another one in its place."""
        self.agent = Forwarding(self._all, EbpfSettings())
        self.agent.adopt()
        self.state: FamilyState = self.agent.states[Family.V4]
        self.codec: Codec = self.state.codec
        self._sweep = FamilySweep(self.state, threading.RLock())

    def apply(self, *plans: ServicePlan) -> None:
        assert self.agent.apply(make_desired(*plans)).failed == ()

    def sweep(self, times: int = 1) -> int:
        """Sweep every ten seconds; how much the last one freed."""
        freed = 0
        for _ in range(times):
            self._now_s += 10
            freed = self._sweep.sweep(self._now_s)
        return freed

    def backend(self, plan: ServicePlan, address: str) -> int:
        addresses = [each.address for each in plan.backends]
        return self.state.records[plan.key].backend_ids[addresses.index(address)]

    def add_flow(
        self,
        plan: ServicePlan,
        backend: int,
        *,
        frontend: int = 0,
        state: int = ESTABLISHED,
        idle_s: int = 0,
    ) -> bytes:
        """Let a client of a frontend of the plan have been sent to a backend."""
        key = plan.frontends[frontend].key
        address, port = self.codec.endpoint(self.state.at_of(backend))
        flow = self.tables.flows.key.pack(
            client=self.codec.pton("198.51.100.7"),
            service=self.state.records[plan.key].service,
            client_port=wire_port(next(self._ports)),
            proto=key.protocol.number,
            second=0,
        )
        value = self.tables.flows.value.pack(
            frontend_addr=self.codec.pton(key.address),
            frontend_port=wire_port(key.port),
            frontend_proto=key.protocol.number,
            backend_addr=self.codec.pton(address),
            backend_port=wire_port(port),
            backend_proto=key.protocol.number,
            addr_diff=0,
            port_diff=0,
            backend_id=backend,
            seen_s=NOW_S - idle_s,
            state=int(state),
            flags=0,
            nat_port=0,
            nat=bytes(4),
            client_link=0,
            backend_link=0,
        )
        self.tables.flows.update([(flow, value)])
        return flow

    def is_indexed(self, address: str, protocol: int = TCP) -> bool:
        return self.tables.backend_index.lookup(self.codec.at(address, 8080, protocol)) is not None

    def frontend_is_there(self, plan: ServicePlan, frontend: int = 0) -> bool:
        key = self.codec.key(plan.frontends[frontend].key)
        return self.tables.frontends.lookup(key) is not None


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    clock = SimpleNamespace(
        CLOCK_MONOTONIC=time.CLOCK_MONOTONIC, clock_gettime_ns=lambda _: NOW_S * 1_000_000_000
    )
    monkeypatch.setattr(flows, "time", clock)
    return Node()


BOTH = make_plan(backends=["10.1.0.1", "10.1.0.2"])
ONE = make_plan(backends=["10.1.0.1"])


def test_tombstone_without_flows_goes_with_the_second_sweep(node: Node) -> None:
    """The first only notes it: a program may be about to store a flow to it."""
    node.apply(BOTH)
    node.apply(ONE)
    assert node.sweep() == 0
    assert node.is_indexed("10.1.0.2")
    assert node.sweep() == 1
    assert not node.is_indexed("10.1.0.2")
    assert node.is_indexed("10.1.0.1")
    assert node.sweep() == 0


@pytest.mark.parametrize(
    ("protocol", "state", "idle_s", "lives"),
    [
        ("TCP", ESTABLISHED, 0, True),
        ("TCP", ESTABLISHED, TCP_IDLE_S - 5, True),
        ("TCP", ESTABLISHED, TCP_IDLE_S + 5, False),
        ("TCP", ESTABLISHED | FlowState.CLIENT_FIN, 3600, True),
        ("TCP", CLOSED, CLOSED_S - 5, True),
        ("TCP", CLOSED, CLOSED_S + 5, False),
        ("TCP", ESTABLISHED | FlowState.RESET, CLOSED_S + 5, False),
        ("TCP", 0, SYN_IDLE_S - 5, True),
        ("TCP", 0, SYN_IDLE_S + 5, False),
        ("SCTP", ESTABLISHED, 180, True),
        ("UDP", 0, 0, False),  # it moves on at once (C5)
    ],
)
def test_tombstone_stays_as_long_as_a_flow_may_go_on(
    node: Node, protocol: str, state: int, idle_s: int, lives: bool
) -> None:
    """Half-closed TCP lives, closed and idle flows do not (P12) and go with the tombstone."""
    frontend = make_frontend("10.96.0.1", 80, protocol)
    both = make_plan("web", frontend, backends=["10.1.0.1", "10.1.0.2"])
    node.apply(both)
    node.add_flow(both, node.backend(both, "10.1.0.2"), state=state, idle_s=idle_s)
    node.apply(make_plan("web", frontend, backends=["10.1.0.1"]))
    node.sweep(3)
    number = both.key.port_name.protocol.number
    assert node.is_indexed("10.1.0.2", number) is lives
    assert len(list(node.tables.flows.items())) == int(lives)


def test_frontend_drains_for_one_sweep_at_least(node: Node) -> None:
    """A program that read it a moment before it drained may be about to open a flow."""
    node.apply(BOTH)
    node.apply()
    assert node.sweep() == 0
    assert node.frontend_is_there(BOTH)
    node.sweep()
    assert not node.frontend_is_there(BOTH)


def test_tombstone_in_the_middle_of_a_chain_leaves_its_neighbours_linked(node: Node) -> None:
    """Replies of the other services at that endpoint still find their flows."""
    plans = [
        make_plan(f"web{i}", make_frontend(f"10.96.0.{i}"), backends=["10.1.0.1"])
        for i in range(1, 4)
    ]
    node.apply(*plans)
    ids = [node.backend(plan, "10.1.0.1") for plan in plans]
    for gone, left in ((1, [ids[2], ids[0]]), (2, [ids[0]]), (0, [])):
        plans[gone] = make_plan(
            f"web{gone + 1}", plans[gone].frontends[0], backends=[], has_endpoints=False
        )
        node.apply(*plans)
        node.sweep(2)
        head = node.tables.backend_index.lookup(node.codec.at("10.1.0.1", 8080, TCP))
        chain, here = [], int.from_bytes(head or b"", "little")
        while here:
            chain.append(here)
            at = here * node.tables.backends.stride
            here = node.codec.backend_words(node.tables.backends.view(here + 1), at)[1]
        assert chain == left


def test_deleted_service_drains_until_its_last_connection_ends(node: Node) -> None:
    """Its frontend, backends and ids stay for a TCP connection, and all go when it has ended."""
    node.apply(BOTH)
    flow = node.add_flow(BOTH, node.backend(BOTH, "10.1.0.2"))
    node.apply()
    node.sweep(4)
    assert node.frontend_is_there(BOTH) and node.is_indexed("10.1.0.2")
    assert not node.is_indexed("10.1.0.1")
    node.tables.flows.delete([flow])
    node.sweep(2)
    assert list(node.tables.frontends.items()) == []
    assert list(node.tables.backend_index.items()) == []
    assert len(node.state.services) == len(node.state.backends) == 0
    assert node.state.orphans == {}


def test_frontend_that_left_a_living_service_drains_by_its_own_flows(node: Node) -> None:
    """Connections through the cluster IP do not keep the external IP, its own do (P12)."""
    with_vip = make_plan("web", make_frontend(), EXTERNAL)
    without = make_plan("web", make_frontend())
    node.apply(with_vip)
    backend = node.backend(with_vip, "10.1.0.1")
    node.add_flow(with_vip, backend, frontend=0)
    through_vip = node.add_flow(with_vip, backend, frontend=1)
    node.apply(without)
    node.sweep(3)
    assert node.frontend_is_there(with_vip, 1)
    node.tables.flows.delete([through_vip])
    node.sweep(2)
    assert not node.frontend_is_there(with_vip, 1)
    assert node.frontend_is_there(with_vip, 0)


def test_endpoint_that_returns_before_it_is_freed_keeps_its_id(node: Node) -> None:
    """A connection to a pod that was unready for a moment goes on, tracked as before."""
    node.apply(BOTH)
    before = node.backend(BOTH, "10.1.0.2")
    node.apply(ONE)
    node.sweep()
    node.apply(BOTH)
    node.sweep(3)
    assert node.backend(BOTH, "10.1.0.2") == before
    assert node.is_indexed("10.1.0.2")


def test_id_of_a_freed_backend_rests_before_it_is_given_again(node: Node) -> None:
    """A flow table entry a program holds this moment must not suddenly mean another endpoint."""
    node.apply(BOTH)
    freed = node.backend(BOTH, "10.1.0.2")
    node.apply(ONE)
    node.sweep(2)
    other = make_plan(backends=["10.1.0.1", "10.1.0.9"])
    node.apply(other)
    assert node.backend(other, "10.1.0.9") != freed


def test_unused_source_ranges_leave_the_trie_after_the_grace_period(node: Node) -> None:
    """The frontend points elsewhere first; packets under way may still look at the old set."""
    plans = [
        make_plan(
            "web",
            make_frontend("203.0.113.1", kind=FrontendKind.LOAD_BALANCER, source_ranges=[prefix]),
        )
        for prefix in ("10.0.0.0/8", "11.0.0.0/8")
    ]
    for plan in plans:
        node.apply(plan)
    assert len(list(node.tables.source_ranges.items())) == 2
    node.sweep(2)
    assert GRACE_S < 10
    assert [node.codec.prefix(key)[1] for key, _ in node.tables.source_ranges.items()] == [
        "11.0.0.0/8"
    ]


def test_restarted_agent_sweeps_what_the_last_one_left_draining(node: Node) -> None:
    """Tombstones are recognised in the maps; nothing leaks because an agent was replaced."""
    node.apply(BOTH)
    node.apply(ONE)
    node.start()
    node.apply(ONE)
    node.sweep(2)
    assert not node.is_indexed("10.1.0.2")
    assert len(node.state.backends) == 1
