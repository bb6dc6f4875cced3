"""Sweeping the kernel's own maps."""

from __future__ import annotations

import threading
import time

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.constants import FlowState
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.ebpf.sweep import FamilySweep
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.model.net import Family
from tests.lib.plans import make_desired, make_frontend, make_plan

pytestmark = pytest.mark.root

FLOWS = 5000
VIP = {Family.V4: "10.96.0.1", Family.V6: "fd00:96::1"}
POD = {Family.V4: "10.1.0.{}", Family.V6: "fd00:1::{}"}
CLIENT = {Family.V4: "198.51.100.7", Family.V6: "2001:db8::7"}


@pytest.mark.parametrize("family", list(Family), ids=lambda family: f"ipv{int(family)}")
def test_sweep_finds_the_one_live_flow_among_thousands(
    tables: Tables, own_settings: EbpfSettings, family: Family
) -> None:
    """Columns of the kernel's batches are read at the right offsets: exactly one endpoint stays."""
    frontend = make_frontend(VIP[family])
    ends = [POD[family].format(i) for i in range(1, 6)]
    agent = Forwarding(tables, own_settings)
    plan = make_plan("web", frontend, backends=ends)
    agent.apply(make_desired(plan))
    state, of_family = agent.states[family], tables.family[family]
    record = state.records[plan.key]
    closed = int(FlowState.ESTABLISHED | FlowState.RESET)
    now_s = int(time.clock_gettime(time.CLOCK_MONOTONIC))
    flows = []
    for i in range(FLOWS):
        alive = i == FLOWS // 2
        backend = record.backend_ids[4] if alive else record.backend_ids[i % 4]
        address, port = state.codec.endpoint(state.at_of(backend))
        key = of_family.flows.key.pack(
            client=state.codec.pton(CLIENT[family]),
            service=record.service,
            client_port=wire_port(1024 + i),
            proto=6,
            second=0,
        )
        value = of_family.flows.value.pack(
            frontend_addr=state.codec.pton(VIP[family]),
            frontend_port=wire_port(80),
            frontend_proto=6,
            backend_addr=state.codec.pton(address),
            backend_port=wire_port(port),
            backend_proto=6,
            addr_diff=0,
            port_diff=0,
            backend_id=backend,
            seen_s=now_s if alive else now_s - 60 & 0xFFFFFFFF,
            state=int(FlowState.ESTABLISHED) if alive else closed,
            flags=0,
            nat_port=0,
            nat=bytes(4),
            client_link=0,
            backend_link=0,
        )
        flows.append((key, value))
    of_family.flows.update(flows)
    agent.apply(make_desired())
    sweep = FamilySweep(state, threading.RLock())
    started = time.perf_counter()
    freed = [sweep.sweep(now) for now in (10.0, 20.0)]
    assert time.perf_counter() - started < 2
    assert freed == [0, 4]
    assert state.dead == {record.service: [record.backend_ids[4]]}
    left = [key for key, _ in of_family.flows.items()]
    assert len(left) == 1
    of_family.flows.delete(left)
    assert sweep.sweep(30.0) == 3  # the last tombstone, the frontend and the service
    assert list(of_family.frontends.items()) == list(of_family.backend_index.items()) == []
