"""Applying against the kernel's own maps, on a BPF file system of the test's own."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import tables as tables_module
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.codec import number
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.model.desired import DesiredState, PlanKey, ServicePlan
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.patience import PATIENCE
from tests.lib.plans import make_backend, make_desired, make_frontend, make_plan
from tests.lib.strategies import desired_states

pytestmark = pytest.mark.root

SMALL = EbpfSettings(
    frontend_entries=2048,
    backend_entries=4096,
    slot_entries=65_536,
    flow_entries=1024,
    affinity_entries=64,
)


@pytest.fixture(scope="module")
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EbpfSettings]:
    directory: Path = tmp_path_factory.mktemp("apply")
    made = SMALL.model_copy(update={"bpffs": directory / "bpf"})
    yield made
    tables_module.remove_pins(made)


@pytest.fixture(scope="module")
def opened(own_settings: EbpfSettings, compiled: dict[Family, Artifact]) -> Iterator[Tables]:
    made = Tables.open(own_settings, compiled)
    yield made
    made.close()


@pytest.fixture
def tables(opened: Tables) -> Tables:
    """Real maps, empty."""
    clear(opened)
    return opened


def clear(tables: Tables) -> None:
    for of_family in tables.family.values():
        for table in (of_family.frontends, of_family.backend_index, of_family.source_ranges):
            table.clear()
        view = of_family.backends.view(of_family.backends.max_entries)
        view[:] = bytes(len(view))


def start(tables: Tables) -> Forwarding:
    """An agent that takes over what the maps hold."""
    agent = Forwarding(tables, SMALL)
    agent.adopt()
    return agent


def services(count: int, *, endpoints: int = 3) -> dict[PlanKey, ServicePlan]:
    """As many services with so many endpoints each."""
    plans = {}
    for i in range(count):
        ends = [f"10.{1 + i // 250}.{i % 250}.{j}" for j in range(1, endpoints + 1)]
        plan = make_plan(f"web{i}", make_frontend(f"10.96.{i // 250}.{1 + i % 250}"), backends=ends)
        plans[plan.key] = plan
    return plans


EXAMPLES = max(5, round(60 / PATIENCE))
"""Fewer where the machine is slow: each is a life of an agent."""


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    states=st.lists(desired_states(of_protocols=tuple(Protocol)), min_size=1, max_size=4),
    chance=st.randoms(),
)
def test_law_holds_in_the_kernel(
    tables: Tables, states: list[DesiredState], chance: random.Random
) -> None:
    """After apply(d), read() == d.view(); applying it again writes nothing, restarted or not."""
    clear(tables)
    agent = start(tables)
    for desired in states:
        assert agent.apply(desired).failed == ()
        assert agent.read() == desired.view()
        assert agent.apply(desired).writes == 0
        if chance.random() < 0.5:
            agent = start(tables)
            assert agent.apply(desired).writes == 0
        assert agent.apply(desired, resync=True).writes == 0


def test_one_endpoint_costs_the_same_writes_among_10_and_1000_services(tables: Tables) -> None:
    """One backend, its index entry, its list, one frontend, one tombstone: nothing else."""
    details = []
    for count in (10, 1000):
        clear(tables)
        agent = start(tables)
        plans = services(count)
        agent.apply(DesiredState(plans))
        key = next(iter(plans))
        ends = (*plans[key].backends[:2], make_backend("10.99.0.1"))
        changed = replace(plans[key], backends=ends)
        details.append(dict(agent.apply(DesiredState(plans | {key: changed})).details))
    assert details[0] == details[1] == {
        "backends4": 2,
        "backend_index4": 1,
        "slots": 3,
        "frontends4": 1,
    }  # fmt: skip


def test_slots_lead_from_the_frontend_to_the_backends(tables: Tables) -> None:
    """What a program would follow: frontend, slot, backend, address."""
    agent = start(tables)
    agent.apply(make_desired(make_plan(backends=["10.1.0.1", "10.1.0.2"])))
    codec, of_family = agent.states[Family.V4].codec, tables.family[Family.V4]
    data = of_family.frontends.lookup(codec.at("10.96.0.1", 80, 6))
    assert data is not None
    value = codec.frontend_value(data)
    slots = struct.unpack("=2I", tables.slots.read(value.cluster_first, value.cluster_count))
    assert [codec.endpoint(of_family.backends.read(each, 1)) for each in slots] == [
        ("10.1.0.1", 8080),
        ("10.1.0.2", 8080),
    ]
    assert number(of_family.backend_index.lookup(codec.at("10.1.0.1", 8080, 6)) or b"") == slots[0]


def test_full_map_of_the_kernel_fails_the_services_without_room(tables: Tables) -> None:
    """E2BIG in the middle of a batch is told service by service; the others work."""
    agent = start(tables)
    room = SMALL.frontend_entries
    plans = services(room + 5, endpoints=1)
    report = agent.apply(DesiredState(plans))
    failed = {error.service for error in report.failed}
    assert len(failed) == 5
    written = {key: plan for key, plan in plans.items() if str(key) not in failed}
    assert agent.read() == DesiredState(written).view()


def test_resync_repairs_maps_of_the_kernel(tables: Tables) -> None:
    """Deleted, foreign and changed entries, in every map an apply writes."""
    agent = start(tables)
    plans = services(300)
    desired = DesiredState(plans)
    agent.apply(desired)
    of_family = tables.family[Family.V4]
    keys = [key for key, _ in of_family.frontends.items()]
    of_family.frontends.delete(keys[:10])
    of_family.frontends.update([(bytes(8), bytes(32)), (keys[20], bytes(32))])
    of_family.backend_index.clear()
    of_family.backends.write(7, bytes(20))
    tables.slots.write(0, bytes(40))
    of_family.source_ranges.update([(struct.pack("=2I4s", 64, 1, b"\x0a\0\0\1"), bytes(4))])
    report = agent.apply(desired, resync=True)
    assert {sentence.split()[0].rstrip(":") for sentence in report.repaired} == {
        "backend",
        "slots",
        "source",
        "frontend",
    }
    assert agent.read() == desired.view()
    assert agent.apply(desired, resync=True).writes == 0
    assert start(tables).apply(desired).writes == 0


def test_only_what_is_used_of_an_array_is_mapped(
    tmp_path: Path, compiled: dict[Family, Artifact]
) -> None:
    """A mapped page counts as the agent's memory: of a large array it maps the beginning, more
    when more is used, and reads through every mapping see the same elements.
    """
    large = SMALL.model_copy(update={"bpffs": tmp_path / "bpf", "slot_entries": 1 << 20})
    opened = Tables.open(large, compiled)
    try:
        slots = opened.slots
        slots.write(0, struct.pack("=2I", 7, 8))
        before = slots.view(2)
        assert len(before) < 1 << 19
        last = slots.max_entries - 1
        slots.write(last, struct.pack("=I", 9))
        assert (slots.read(0, 2), slots.read(last, 1)) == (
            struct.pack("=2I", 7, 8),
            struct.pack("=I", 9),
        )
        slots.write(1, struct.pack("=I", 10))
        assert before[slots.stride : slots.stride + 4] == struct.pack("=I", 10)
        with pytest.raises(OSError, match="Argument list too long"):
            slots.read(last, 2)
        before.release()
    finally:
        opened.close()
        tables_module.remove_pins(large)
