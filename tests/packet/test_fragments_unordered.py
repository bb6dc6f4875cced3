"""Datagrams whose first piece comes last: the others are held, and called for when it comes."""

from __future__ import annotations

import os

import pytest
from scapy.all import Packet

from ebpf_svc.dataplane.ebpf.constants import FRAGMENT_S, HELD_BYTES, HELD_SLOTS
from ebpf_svc.model.net import Family, Protocol
from tests.lib.packet_world import HELD_ENTRIES, IPV4_ONLY, World
from tests.lib.packets import with_ends
from tests.lib.tap import TUN, through

PAYLOAD = bytes(range(256)) * 12
ETH_BYTES = 14
RELEASED, CARRIER = 0xEB7, 0xEB6
"""Of bpf/lib/fragment.h."""

PROGRAMS = pytest.mark.parametrize("program", ["pod_ingress", "node_ingress", "node_ingress_l3"])
ON_A_DEVICE = pytest.mark.skipif(not TUN.exists(), reason=f"no {TUN}: no device to send through")


def _cut(world: World, *, ident: int = 77) -> tuple[list[Packet], list[Packet]]:
    """A datagram to a service in four pieces, and what becomes of them."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 53), (world.net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    request = world.udp(client, vip, payload=PAYLOAD)
    wanted = with_ends(request, dst=backend)
    return world.fragments(request, ident=ident), world.fragments(wanted, ident=ident)


def _send(world: World, program: str, packets: list[Packet], *, tc_index: int = 0) -> list[bytes]:
    """What leaves a device with that program, each from its Ethernet header on."""
    ethernet = not program.endswith("_l3")
    sent = [bytes(packet)[0 if ethernet else ETH_BYTES :] for packet in packets]
    fd = world.programs[program]
    left = through(fd, world.family, sent, ethernet=ethernet, tc_index=tc_index)
    return left if ethernet else [bytes(packets[0])[:ETH_BYTES] + packet for packet in left]


def _held(world: World) -> dict[int, bytes]:
    """Slot -> packet."""
    return {key.slot: value.packet[: value.length_bytes] for key, value in world.entries("held")}


@PROGRAMS
def test_piece_before_the_first_is_copied_and_left_to_the_stack(world: World, program: str) -> None:
    """Nobody knows whose it is: no byte changes, and every byte of the packet is kept."""
    at = ETH_BYTES if program.endswith("_l3") else 0
    (_, *later), _ = _cut(world)
    for piece in later:
        world.run(program, bytes(piece)[at:]).expect_untouched()
    assert _held(world) == dict(enumerate(bytes(piece)[ETH_BYTES:] for piece in later))


def test_piece_that_comes_twice_is_held_once(world: World) -> None:
    """The copy of a copy takes no slot."""
    (_, second, third, _), _ = _cut(world)
    for piece in (third, second, third, second, third):
        world.run("node_ingress", piece)
    assert _held(world) == {0: bytes(third)[ETH_BYTES:], 1: bytes(second)[ETH_BYTES:]}


def test_more_pieces_than_slots_are_not_held(world: World) -> None:
    """What one datagram can cost is bounded."""
    client, vip = (world.net.outside, 40000), (world.net.vip, 53)
    pieces = world.fragments(world.udp(client, vip, payload=bytes(4000)), size=200)
    assert len(pieces) > HELD_SLOTS + 1
    for piece in pieces[1:]:
        world.run("node_ingress", piece).expect_untouched()
    assert _held(world) == {slot: bytes(pieces[1 + slot])[ETH_BYTES:] for slot in range(HELD_SLOTS)}


@pytest.mark.parametrize("excess", [0, 1])
def test_piece_larger_than_its_room_is_not_held(world: World, excess: int) -> None:
    """The last byte there is room for, and one more."""
    client, vip = (world.net.outside, 40000), (world.net.vip, 53)
    headers = 20 if world.family is Family.V4 else 48
    size = HELD_BYTES - headers + 8 & ~7
    datagram = world.udp(client, vip, payload=bytes(size + HELD_BYTES - headers - 8 + excess))
    _, last = world.fragments(datagram, size=size)
    assert len(last) == ETH_BYTES + HELD_BYTES + excess
    world.run("node_ingress", last).expect_untouched()
    assert len(_held(world)) == 1 - excess


@IPV4_ONLY
def test_padding_of_the_frame_is_not_held(world: World) -> None:
    """A short piece fills a frame with bytes that are not the packet's."""
    client, vip = (world.net.outside, 40000), (world.net.vip, 53)
    _, last = world.fragments(world.udp(client, vip, payload=bytes(800)), size=800)
    world.run("node_ingress", bytes(last) + bytes(18)).expect_untouched()
    assert _held(world) == {0: bytes(last)[ETH_BYTES:]}


def test_full_table_forgets_the_pieces_of_others(world: World) -> None:
    """A flood of pieces costs the memory of the table and no more; the newest is held."""
    client, vip = (world.net.outside, 40000), (world.net.vip, 53)
    last = bytearray(bytes(world.fragments(world.udp(client, vip, payload=PAYLOAD))[-1]))
    at = 18 if world.family is Family.V4 else 60
    for ident in range(1, 3 * HELD_ENTRIES):
        last[at : at + 2] = ident.to_bytes(2, "big")
        world.run("node_ingress", bytes(last)).expect_untouched()
    held = [value.packet[: value.length_bytes] for _, value in world.entries("held")]
    assert bytes(last)[ETH_BYTES:] in held
    assert len(set(held)) == len(held) <= HELD_ENTRIES


def test_ports_of_an_id_used_long_ago_are_not_taken(world: World) -> None:
    """A client's ids come round: an old first piece is of another datagram."""
    (first, second, *_), (_, wanted, *_) = _cut(world)
    world.run("node_ingress", first)
    world.age("fragments", FRAGMENT_S - 1)
    world.run("node_ingress", second).expect(wanted)
    world.age("fragments", 3)
    world.run("node_ingress", second).expect_untouched()
    assert _held(world) == {0: bytes(second)[ETH_BYTES:]}


def test_slots_of_an_id_used_long_ago_are_taken_again(world: World) -> None:
    """Those who never got their first piece make room for the next datagram of that id."""
    (_, second, third, _), _ = _cut(world)
    world.run("node_ingress", second)
    world.age("held", FRAGMENT_S + 2)
    world.run("node_ingress", third)
    assert _held(world) == {0: bytes(third)[ETH_BYTES:]}


@ON_A_DEVICE
@PROGRAMS
@pytest.mark.parametrize("order", ["reversed", "first last", "first between"])
def test_pieces_follow_when_the_first_comes(world: World, program: str, order: str) -> None:
    """First the first one, then each of the others once, all translated, every byte."""
    pieces, wanted = _cut(world)
    turns = {"reversed": [3, 2, 1, 0], "first last": [1, 2, 3, 0], "first between": [2, 3, 0, 1]}
    left = _send(world, program, [pieces[i] for i in turns[order]])
    # The stack gets what came too early, as it came.
    early = turns[order].index(0)
    assert left[:early] == [bytes(pieces[i]) for i in turns[order][:early]]
    assert left[early] == bytes(wanted[0])
    assert sorted(left[early:]) == sorted(map(bytes, wanted))
    assert not _held(world)


@ON_A_DEVICE
def test_first_piece_that_comes_twice_calls_once(world: World) -> None:
    """Nothing goes round again: who was called for is not held any more."""
    pieces, wanted = _cut(world)
    left = _send(world, "node_ingress", [*pieces[::-1], pieces[0], pieces[0]])
    assert sorted(left[3:]) == sorted(map(bytes, [*wanted, wanted[0], wanted[0]]))


@ON_A_DEVICE
def test_pieces_of_old_are_not_called(world: World) -> None:
    """They are of another datagram with that id."""
    (first, *later), (wanted, *_) = _cut(world)
    for piece in later:
        world.run("node_ingress", piece)
    world.age("held", FRAGMENT_S + 2)
    assert _send(world, "node_ingress", [first]) == [bytes(wanted)]


@ON_A_DEVICE
def test_pieces_to_no_service_pass_once_and_untouched(world: World) -> None:
    """Other people's fragments, against their order, too."""
    _cut(world)
    other = world.udp((world.net.outside, 40000), (world.net.outside_too, 53), payload=PAYLOAD)
    pieces = world.fragments(other)[::-1]
    assert _send(world, "node_ingress", pieces) == [bytes(piece) for piece in pieces]


@ON_A_DEVICE
def test_pieces_that_came_in_again_are_not_held_again(world: World) -> None:
    """Were the ports forgotten meanwhile, a piece would else go round for ever."""
    (_, *later), _ = _cut(world)
    left = _send(world, "node_ingress", later, tc_index=RELEASED)
    assert left == [bytes(piece) for piece in later]
    assert not _held(world)


@ON_A_DEVICE
def test_carrier_with_nothing_to_carry_ends(world: World) -> None:
    """Somebody else was faster: the first piece itself has gone its way already."""
    (first, *_), _ = _cut(world)
    assert _send(world, "node_ingress", [first], tc_index=CARRIER) == []


@ON_A_DEVICE
def test_answer_of_a_pod_to_itself_follows_its_first_piece(world: World) -> None:
    """Answers that are translated where they come in are held as requests are."""
    pod, vip, backend = (world.net.a, 40000), (world.net.vip, 53), (world.net.a, 5353)
    hairpin = (world.net.hairpin, pod[1])
    world.service(*vip, Protocol.UDP, backends=[backend])
    world.run("pod_ingress", world.udp(pod, vip))
    answer = world.udp(backend, hairpin, payload=PAYLOAD)
    wanted = world.fragments(with_ends(answer, src=vip, dst=pod, turned=True))
    sent = [bytes(piece) for piece in world.fragments(answer)[::-1]]
    left = through(world.programs["pod_ingress"], world.family, sent, turned=True)
    assert left == [bytes(piece) for piece in wanted]


@ON_A_DEVICE
def test_as_many_pieces_as_there_are_slots_follow(world: World) -> None:
    """Each carrier makes the next one."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 53), (world.net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    request = world.udp(client, vip, payload=os.urandom(200 * HELD_SLOTS))
    pieces = world.fragments(request, size=200)
    wanted = world.fragments(with_ends(request, dst=backend), size=200)
    assert len(pieces) == HELD_SLOTS + 1
    left = _send(world, "node_ingress", pieces[::-1])
    assert left[HELD_SLOTS:] == [bytes(piece) for piece in wanted]
