"""What the programs tell who listens, read from the ring as `monitor` reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ebpf_svc.dataplane.ebpf.constants import FrontendFlag
from ebpf_svc.dataplane.ebpf.events import RingEvents
from ebpf_svc.dataplane.ebpf.table import ArrayTable
from ebpf_svc.dataplane.inspect import FlowEvent, Happening
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.host.ringbuf import RingBuffer
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Protocol, Sources
from tests.lib.packet_world import World
from tests.lib.packets import Address

TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


def _listen(world: World, directory: Path) -> RingEvents:
    of_family = SimpleNamespace(events=world.tables["events"])
    tables: Any = SimpleNamespace(
        monitor=world.tables["monitor"],
        family={world.family: of_family},
        close=lambda: None,
    )
    return RingEvents(tables, directory)


@pytest.fixture
def heard(world: World, tmp_path: Path) -> Iterator[RingEvents]:
    stream = _listen(world, tmp_path)
    yield stream
    stream.close()


def _monitor(world: World) -> Any:
    table = world.tables["monitor"]
    assert isinstance(table, ArrayTable)
    return table.value.unpack(table.read(0, 1))


def _key(at: Address, proto: Protocol = Protocol.TCP) -> FrontendKey:
    return FrontendKey(*at, proto)


def _only(events: RingEvents) -> FlowEvent:
    (event,) = events.wait(0)
    return event


@TCP_AND_UDP
def test_new_flow_is_told_with_its_three_ends(
    world: World, heard: RingEvents, proto: Protocol
) -> None:
    """Client, frontend and endpoint; whether it is masqueraded."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, proto, backends=[backend], masquerade_for=Sources.EXTERNAL)
    before = time.time()
    world.run("node_ingress", world.l4(proto, client, vip))
    event = _only(heard)
    assert (event.what, event.reason) == (Happening.OPENED, "")
    assert (event.client, event.client_port, event.netns) == (*client, 0)
    assert (event.frontend, event.backend) == (_key(vip, proto), backend)
    assert (event.masquerade, event.hairpin) == (True, False)
    assert before - 0.1 <= event.time_s <= time.time() + 0.1


def test_packets_of_an_open_flow_are_not_told(world: World, heard: RingEvents) -> None:
    """Neither way: an established connection costs the same whoever listens."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    heard.wait(0)
    world.run("egress", world.tcp(backend, client, "SA"))
    for flags in ("A", "PA"):
        world.run("pod_ingress", world.tcp(client, vip, flags, b"x"))
        world.run("egress", world.tcp(backend, client, flags, b"y"))
    assert heard.wait(0) == []


@pytest.mark.parametrize("first", ["client", "backend"])
def test_both_ends_of_a_connection_are_told_once(
    world: World, heard: RingEvents, first: str
) -> None:
    """The first FIN begins the end, the other side's is the end; repeats are not told."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    heard.wait(0)
    ways = {
        "client": lambda: world.run("pod_ingress", world.tcp(client, vip, "FA")),
        "backend": lambda: world.run("egress", world.tcp(backend, client, "FA")),
    }
    other = "backend" if first == "client" else "client"
    for side in (first, first, other, other):
        ways[side]()
    begun, ended = heard.wait(0)
    assert (begun.what, begun.reason) == (Happening.ENDING, f"{first}_fin")
    assert (ended.what, ended.reason) == (Happening.CLOSED, f"{other}_fin")
    for event in (begun, ended):
        assert (event.client, event.client_port) == client
        assert (event.frontend, event.backend) == (_key(vip), backend)


@pytest.mark.parametrize("side", ["client", "backend"])
def test_reset_closes(world: World, heard: RingEvents, side: str) -> None:
    """Whoever sends it."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    heard.wait(0)
    if side == "client":
        world.run("pod_ingress", world.tcp(client, vip, "R"))
    else:
        world.run("egress", world.tcp(backend, client, "RA"))
    event = _only(heard)
    assert (event.what, event.reason) == (Happening.CLOSED, "reset")


def test_hairpin_is_told_and_its_end_too(world: World, heard: RingEvents) -> None:
    """A pod that calls itself (P9)."""
    pod, vip, backend = (world.net.a, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(pod, vip))
    assert _only(heard).hairpin
    world.run("pod_ingress", world.tcp(backend, (world.net.hairpin, pod[1]), "FA"))
    event = _only(heard)
    assert (event.what, event.client, event.hairpin) == (Happening.ENDING, pod[0], True)
    world.run("pod_ingress", world.tcp((world.net.b, 8080), (world.net.hairpin, pod[1]), "A"))
    event = _only(heard)
    assert (event.what, event.reason) == (Happening.DROPPED, "discarded")


@TCP_AND_UDP
def test_refusal_is_told(world: World, heard: RingEvents, proto: Protocol) -> None:
    """No endpoint anywhere (P2)."""
    client, vip = (world.net.outside, 40000), (world.net.vip, 80)
    world.service(*vip, proto, backends=[], flags=FrontendFlag.REJECT)
    world.run("node_ingress", world.l4(proto, client, vip))
    event = _only(heard)
    assert (event.what, event.reason) == (Happening.REFUSED, "no_endpoint")
    assert (event.client, event.client_port) == client
    assert (event.frontend, event.backend) == (_key(vip, proto), None)


def test_drops_are_told_with_their_reason(world: World, heard: RingEvents) -> None:
    """Local without local endpoints (P4), and a source that is not let in (P10)."""
    net, client = world.net, (world.net.outside, 40000)
    world.service(net.vip, 80, backends=[(net.a, 80)], local_for=Sources.EXTERNAL)
    ranges = [world.cluster_cidr]
    world.service(net.other_vip, 80, backends=[(net.a, 81)], source_ranges=ranges,
                  flags=FrontendFlag.SOURCE_RANGES)  # fmt: skip
    for vip in (net.vip, net.other_vip):
        world.run("node_ingress", world.tcp(client, (vip, 80)))
    assert [(event.what, event.reason, event.frontend.address) for event in heard.wait(0)] == [
        (Happening.DROPPED, "no_local_endpoint", net.vip),
        (Happening.DROPPED, "source_range", net.other_vip),
    ]


def test_nothing_is_written_while_nobody_listens(world: World, tmp_path: Path) -> None:
    """Before the first, after the last, and once the lease of one who was killed is over."""
    vip = (world.net.vip, 80)
    world.service(*vip, backends=[(world.net.a, 80)])
    ring = RingBuffer(world.tables["events"].fd, world.tables["events"].max_entries)

    def call(port: int) -> int:
        world.run("pod_ingress", world.tcp((world.net.pod, port), vip))
        return ring.skip()

    assert call(40000) == 0
    stream = _listen(world, tmp_path)
    assert call(40001) == 1
    stream.close()
    assert call(40002) == 0
    table = world.tables["monitor"]
    assert isinstance(table, ArrayTable)
    for until_s, told in ((time.monotonic() + 2, 1), (time.monotonic() - 2, 0)):
        table.write_word(0, table.value.offset("until_s"), int(until_s))
        assert call(40010 + told) == told
    table.write(0, bytes(table.value.size))
    ring.close()


def test_listener_hears_nothing_of_before(world: World, tmp_path: Path) -> None:
    """What nobody read since the last one was killed is thrown away."""
    world.service(world.net.vip, 80, backends=[(world.net.a, 80)])
    table = world.tables["monitor"]
    assert isinstance(table, ArrayTable)
    table.write_word(0, table.value.offset("until_s"), int(time.monotonic()) + 5)
    world.run("pod_ingress", world.tcp((world.net.pod, 40000), (world.net.vip, 80)))
    stream = _listen(world, tmp_path)
    world.run("pod_ingress", world.tcp((world.net.pod, 40001), (world.net.vip, 80)))
    assert [event.client_port for event in stream.wait(0)] == [40001]
    stream.close()


def test_events_without_room_are_counted(world: World, heard: RingEvents) -> None:
    """And those that had room are all there, in order, around the end of the ring."""
    vip = (world.net.vip, 80)
    world.service(*vip, backends=[(world.net.a, 80)])
    count = 400
    for _ in range(3):
        lost = heard.lost
        for port in range(40000, 40000 + count):
            heard._renew()  # an emulated machine takes longer than the lease lasts
            world.run("pod_ingress", world.tcp((world.net.pod, port), vip))
        ports = [event.client_port for event in heard.wait(0)]
        assert heard.lost - lost == count - len(ports) > 0
        assert ports == list(range(40000, 40000 + len(ports)))
        world.hash("flows").clear()


def test_ring_is_read_by_one(world: World, heard: RingEvents, tmp_path: Path) -> None:
    """A second one is told who listens, and the first hears on."""
    with pytest.raises(UnsupportedHost, match="monitors already"):
        _listen(world, tmp_path)
    world.service(world.net.vip, 80, backends=[(world.net.a, 80)])
    world.run("pod_ingress", world.tcp((world.net.pod, 40000), (world.net.vip, 80)))
    assert _only(heard).what is Happening.OPENED


def test_listener_ends_when_the_maps_go(world: World, tmp_path: Path) -> None:
    """After `cleanup`, instead of waiting for ever."""
    directory = tmp_path / "v0"
    directory.mkdir()
    stream = _listen(world, directory)
    directory.rmdir()
    with pytest.raises(DataplaneError, match="is gone"):
        stream.wait(3)
    stream.close()
