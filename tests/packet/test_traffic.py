"""What services are counted: connections, and the packets and bytes that were translated."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import table, tables
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.table import PerCpuArray
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.dataplane.inspect import Traffic
from ebpf_svc.host import bpf
from ebpf_svc.model.net import Family, Protocol
from tests.lib.packet_world import COUNTED_SERVICES, World
from tests.lib.packets import Result

pytestmark = pytest.mark.root

TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


def counted(connections: int, *results: Result) -> Traffic:
    """That many connections, and these packets."""
    return Traffic(connections, len(results), sum(len(each.sent) for each in results))


@TCP_AND_UDP
def test_requests_and_replies_are_counted_under_their_service(
    world: World, proto: Protocol
) -> None:
    """The connection once, its packets both ways, with all their bytes."""
    client, backend = (world.net.a, 40000), (world.net.b, 8080)
    world.service(world.net.other_vip, 80, proto, backends=[(world.net.b, 9090)])
    web = world.service(world.net.vip, 80, proto, backends=[backend])
    vip = (world.net.vip, 80)
    opening = world.run("pod_ingress", world.l4(proto, client, vip))
    assert world.traffic() == {web.id: counted(1, opening)}
    answer = world.run("egress", world.l4(proto, backend, client))
    again = world.run("pod_ingress", world.l4(proto, client, vip))
    other = world.run("pod_ingress", world.l4(proto, (world.net.a, 40001), vip))
    assert world.traffic() == {web.id: counted(2, opening, answer, again, other)}


def test_hairpin_is_counted_both_ways(world: World) -> None:
    """A pod that calls itself is a client as any other (P9)."""
    vip, backend = (world.net.vip, 80), (world.net.a, 8080)
    web = world.service(*vip, backends=[backend])
    request = world.run("pod_ingress", world.tcp((world.net.a, 40000), vip))
    answer = world.run("pod_ingress", world.tcp(backend, (world.net.hairpin, 40000), "SA"))
    assert world.traffic() == {web.id: counted(1, request, answer)}


def test_what_is_no_service_is_counted_nowhere(world: World) -> None:
    """Neither strangers, nor packets that are refused, nor an endpoint called directly."""
    backend = (world.net.b, 8080)
    world.service(world.net.vip, 80, backends=[backend])
    world.service(world.net.other_vip, 80, backends=[])
    for port, target in enumerate(
        [(world.net.vip, 81), (world.net.other_vip, 80), backend], start=40000
    ):
        world.run("pod_ingress", world.tcp((world.net.a, port), target))
    # Established elsewhere: whoever translated its SYN translates this (Z1).
    world.run("pod_ingress", world.tcp((world.net.a, 40003), (world.net.vip, 80), "A"))
    world.run("egress", world.tcp(backend, (world.net.a, 40002), "SA"))
    assert world.traffic() == {}


def test_service_beyond_the_array_is_served_uncounted(world: World) -> None:
    """Ids that have no counter take nothing from the others."""
    for service in range(COUNTED_SERVICES):
        world.service(world.net.vip, 80 + service, backends=[(world.net.b, 8080)])
    opening = world.tcp((world.net.a, 40000), (world.net.vip, 80 + COUNTED_SERVICES - 1))
    assert world.run("pod_ingress", opening).data != bytes(opening)
    assert world.traffic() == {}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[EbpfSettings]:
    """A BPF file system of its own."""
    made = EbpfSettings(bpffs=tmp_path / "bpf", frontend_entries=1024)
    yield made
    tables.remove_pins(made)


def put(counters: PerCpuArray, index: int, *fields: int) -> None:
    """The same on every CPU."""
    value = counters.value.pack(**dict(zip(Traffic._fields, fields, strict=True)))
    bpf.update(counters.fd, index.to_bytes(4, "little"), value * bpf.possible_cpus())


def times_cpus(*fields: int) -> tuple[int, ...]:
    return tuple(bpf.possible_cpus() * field for field in fields)


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "an old kernel"])
@pytest.mark.parametrize("few", [False, True], ids=["all", "one"])
def test_counters_are_summed_over_the_cpus(
    settings: EbpfSettings,
    compiled: dict[Family, Artifact],
    monkeypatch: pytest.MonkeyPatch,
    batches: bool,
    few: bool,
) -> None:
    """Field by field, only what was asked for, in blocks that need not fit; zeros are left out."""
    monkeypatch.setattr(table, "_BLOCK_BYTES", 100 * 24 * bpf.possible_cpus())
    if not batches:
        monkeypatch.setattr(bpf, "lookup_batches", _unsupported)
    with closing(Tables.open(settings, compiled)) as opened:
        counters = opened.family[Family.V4].service_counters
        for index in (0, 7, 99, 100, 1022, 1023):
            put(counters, index, index, 2, 2**40)
        wanted = [1023] if few else [*range(1, 1020), 1023, 5000]
        expected = [1023] if few else [7, 99, 100, 1023]
        assert counters.totals(wanted) == {index: times_cpus(index, 2, 2**40) for index in expected}
        counters.clear(wanted)
        assert set(counters.totals(range(1024))) == {0, 7, 99, 100, 1022, 1023} - {*expected}
        assert opened.writes == 0


def _unsupported(*_: object, **__: object) -> Iterator[tuple[bytes, bytes, int]]:
    raise OSError(errno.EINVAL, "no batches")
    yield


def test_counts_survive_the_agent_and_a_larger_table(
    settings: EbpfSettings, compiled: dict[Family, Artifact]
) -> None:
    """What was counted is carried into the new array, field by field."""
    with closing(Tables.open(settings, compiled)) as opened:
        put(opened.family[Family.V6].service_counters, 1000, 1, 2, 3)
    larger = settings.model_copy(update={"frontend_entries": 2048})
    with closing(Tables.open(larger, compiled)) as opened:
        counters = opened.family[Family.V6].service_counters
        assert counters.max_entries == 2048
        assert counters.totals(range(2048)) == {1000: times_cpus(1, 2, 3)}
