"""Datagrams in pieces: the later ones carry no ports."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.ebpf.constants import FrontendFlag
from ebpf_svc.model.net import Protocol, Sources
from tests.lib.packet_world import World
from tests.lib.packets import MASQUERADED, Verdict, with_ends

PAYLOAD = bytes(range(256)) * 12
TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


@TCP_AND_UDP
@pytest.mark.parametrize("program", ["pod_ingress", "node_ingress"])
def test_every_fragment_of_a_request_goes_to_the_backend(
    world: World, proto: Protocol, program: str
) -> None:
    """The pieces arrive as one datagram with a right checksum, masquerade mark on each."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, proto, backends=[backend], masquerade_for=Sources.ALL)
    request = world.l4(proto, client, vip, payload=PAYLOAD)
    pieces = world.fragments(request)
    wanted = world.fragments(with_ends(request, dst=backend))
    assert len(pieces) == len(wanted) == 4
    for piece, expected in zip(pieces, wanted, strict=True):
        world.run(program, piece).expect(expected, mark=MASQUERADED)


@TCP_AND_UDP
def test_every_fragment_of_an_answer_comes_from_the_service(world: World, proto: Protocol) -> None:
    """The way back of a large answer."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, proto, backends=[backend])
    world.run("pod_ingress", world.l4(proto, client, vip))
    answer = world.l4(proto, backend, client, payload=PAYLOAD)
    wanted = world.fragments(with_ends(answer, src=vip))
    for piece, expected in zip(world.fragments(answer), wanted, strict=True):
        world.run("egress", piece).expect(expected)


def test_udp_fragments_without_checksum_stay_without(world: World) -> None:
    """No checksum appears in the first piece."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 53), (world.net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    request = world.udp(client, vip, payload=PAYLOAD)
    request["UDP"].chksum = 0
    wanted = world.fragments(with_ends(request, dst=backend))
    for piece, expected in zip(world.fragments(request), wanted, strict=True):
        world.run("pod_ingress", piece).expect(expected)


def test_piece_another_cpu_saw_a_moment_later_is_of_the_same_datagram(world: World) -> None:
    """Who read the clock before the second passed finds ports noted in the next one."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 53), (world.net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    request = world.udp(client, vip, payload=PAYLOAD)
    wanted = world.fragments(with_ends(request, dst=backend))
    for piece, expected in zip(world.fragments(request), wanted, strict=True):
        world.run("pod_ingress", piece).expect(expected)
        world.age("fragments", -2)


def test_fragments_of_two_datagrams_are_told_apart(world: World) -> None:
    """Their ids say which is which, however they interleave."""
    net = world.net
    client, backend = (net.pod, 40000), (net.a, 5353)
    vips = [(net.vip, 53), (net.vip, 54)]
    services = [world.service(*vips[0], Protocol.UDP, backends=[backend])]
    services.append(world.service(*vips[1], Protocol.UDP, backends=[(net.b, 5353)]))
    requests = [world.udp(client, vip, payload=PAYLOAD) for vip in vips]
    ends = [backend, (net.b, 5353)]
    pieces = [world.fragments(request, ident=7 + i) for i, request in enumerate(requests)]
    wanted = [
        world.fragments(with_ends(request, dst=end), ident=7 + i)
        for i, (request, end) in enumerate(zip(requests, ends, strict=True))
    ]
    for step in range(4):
        for which in (0, 1):
            world.run("pod_ingress", pieces[which][step]).expect(wanted[which][step])


def test_fragments_to_two_receivers_with_one_id_are_told_apart(world: World) -> None:
    """An id is unique for a sender and receiver only, and they may differ in one of the two."""
    net = world.net
    client, vip, backend = (net.pod, 40000), (net.vip, 53), (net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    request = world.udp(client, vip, payload=PAYLOAD)
    wanted = world.fragments(with_ends(request, dst=backend))
    for piece, expected in zip(world.fragments(request), wanted, strict=True):
        world.run("pod_ingress", piece).expect(expected)
    other_vip = (net.other_vip, 53)
    world.service(*other_vip, Protocol.UDP, backends=[backend])
    for other in (
        world.udp(client, other_vip, payload=PAYLOAD),
        world.udp((net.outside_too, 40000), vip, payload=PAYLOAD),
    ):
        for piece in world.fragments(other)[1:]:
            world.run("pod_ingress", piece).expect_untouched()


def test_later_fragment_whose_first_never_came_passes(world: World) -> None:
    """Nobody knows where it belongs: the stack may wait for the rest."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    world.service(*vip, Protocol.UDP, backends=[(world.net.a, 5353)])
    pieces = world.fragments(world.udp(client, vip, payload=PAYLOAD))
    for piece in pieces[1:]:
        for program in ("pod_ingress", "node_ingress", "egress"):
            world.run(program, piece).expect_untouched()


def test_fragments_to_no_service_are_not_touched_nor_remembered(world: World) -> None:
    """Other people's fragments cost no memory of ours."""
    world.service(world.net.vip, 53, Protocol.UDP, backends=[(world.net.a, 5353)])
    other = world.udp((world.net.pod, 40000), (world.net.outside, 53), payload=PAYLOAD)
    for piece in world.fragments(other):
        for program in ("pod_ingress", "egress"):
            world.run(program, piece).expect_untouched()
    assert not world.entries("fragments")


def test_fragments_of_a_hairpin_go_there_and_back(world: World) -> None:
    """A pod that sends itself a large datagram gets all of it, and all of the answer."""
    pod, vip, backend = (world.net.a, 40000), (world.net.vip, 53), (world.net.a, 5353)
    hairpin = (world.net.hairpin, pod[1])
    world.service(*vip, Protocol.UDP, backends=[backend])
    request = world.udp(pod, vip, payload=PAYLOAD)
    wanted = world.fragments(with_ends(request, src=hairpin, dst=backend, turned=True))
    for piece, expected in zip(world.fragments(request), wanted, strict=True):
        world.run("pod_ingress", piece).expect(expected, verdict=Verdict.REDIRECT)
    answer = world.udp(backend, hairpin, payload=PAYLOAD)
    wanted = world.fragments(with_ends(answer, src=vip, dst=pod, turned=True))
    for piece, expected in zip(world.fragments(answer), wanted, strict=True):
        world.run("pod_ingress", piece).expect(expected, verdict=Verdict.REDIRECT)


def test_first_fragment_to_a_service_without_endpoints_is_refused(world: World) -> None:
    """One refusal for the datagram; the pieces that follow die of themselves."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    world.service(*vip, Protocol.UDP, backends=[], flags=FrontendFlag.REJECT)
    first, *later = world.fragments(world.udp(client, vip, payload=PAYLOAD))
    result = world.run("pod_ingress", first)
    assert result.verdict in (Verdict.REDIRECT, Verdict.SHOT)
    for piece in later:
        world.run("pod_ingress", piece).expect_untouched()
