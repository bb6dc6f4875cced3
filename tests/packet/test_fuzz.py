"""Anything at all through every program: never a wrong rewrite.

Seeded: a failure prints the seed and the packet. `EBPF_SVC_FUZZ_SEED` and `EBPF_SVC_FUZZ_ROUNDS`
choose another run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from scapy.all import IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, PadN

from ebpf_svc.dataplane.ebpf.constants import FrontendFlag
from ebpf_svc.dataplane.ebpf.programs import DEVICE_PROGRAMS
from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.packet_oracle import Oracle
from tests.lib.packet_world import World
from tests.lib.packets import Address, with_ends

SEED = int(os.environ.get("EBPF_SVC_FUZZ_SEED", "20240607"))
ROUNDS = int(os.environ.get("EBPF_SVC_FUZZ_ROUNDS", "5000"))
_UNKNOWN_TYPE = b"\x88\xb5"
"""The kernel runs no test on an IP packet shorter than its header; programs do not look at it."""


@pytest.mark.parametrize("program", DEVICE_PROGRAMS)
def test_no_packet_is_rewritten_wrongly(world: World, program: str) -> None:
    """Cut, twisted and spliced packets pass as they are or are translated without a flaw."""
    oracle = _furnish(world)
    corpus = list(_corpus(world))
    rng = random.Random(f"{SEED} {program} {world.family}")
    l3 = 0 if program.endswith("_l3") else 14
    _open_flows(world, corpus)
    met = [packet for packet in corpus if _run(world, oracle, program, packet, l3)]
    honest = oracle.touched
    for _ in range(ROUNDS):
        _run(world, oracle, program, _mutate(rng, corpus + 3 * met, 34), l3)
    print(f"seed {SEED}: {honest} of {len(corpus)} honest packets touched, then {oracle.touched}")
    assert honest >= len(corpus) // 10, "the corpus hardly met a service: the test shows nothing"
    assert oracle.touched - honest >= ROUNDS // 20


def _run(world: World, oracle: Oracle, program: str, packet: bytes, l3: int) -> bool:
    """Send a packet and have it judged; whether it did not leave as it came."""
    header = 34 if world.family is Family.V4 else 54
    if len(packet) < header:
        packet = packet[:12] + _UNKNOWN_TYPE + packet[14:]
    packet = packet[14 - l3 :]
    if len(packet) < 14:
        return False  # the kernel runs no test on less
    touched = oracle.touched
    result = world.run(program, packet)
    wrong = oracle.judge(program, result, l3)
    assert wrong is None, (
        f"{wrong}\nEBPF_SVC_FUZZ_SEED={SEED} {program} IPv{int(world.family)}\n"
        f"verdict {result.verdict}\nsent {result.sent.hex()}\ngot  {result.data.hex()}"
    )
    return oracle.touched > touched


def _furnish(world: World) -> Oracle:
    """Services of every protocol, one that refuses, one whose backend also calls it."""
    net = world.net
    known: dict[tuple[str, int, int], frozenset[Address]] = {}
    for proto, port, endpoints in (
        (Protocol.TCP, 80, [(net.a, 8080), (net.b, 8080)]),
        (Protocol.UDP, 53, [(net.a, 5353), (net.c, 53)]),
        (Protocol.SCTP, 9, [(net.a, 9), (net.b, 9)]),
        (Protocol.TCP, 81, [(net.a, 8080)]),
    ):
        service = world.service(net.vip, port, proto, backends=endpoints)
        service.add_frontend(net.node, 30000 + port, masquerade_for=Sources.ALL)
        for address in ((net.vip, port), (net.node, 30000 + port)):
            known[(*address, proto.number)] = frozenset(endpoints)
    for proto in (Protocol.TCP, Protocol.UDP):
        world.service(net.other_vip, 80, proto, backends=[], flags=FrontendFlag.REJECT)
        known[net.other_vip, 80, proto.number] = frozenset()
    return Oracle(world.family, known)


def _corpus(world: World) -> Iterator[bytes]:
    """Honest packets of every kind the programs know."""
    net = world.net
    clients = [(net.pod, 40000), (net.outside, 40001), (net.a, 40002)]
    longer = [{}, world.longer_header]
    if world.family is Family.V6:
        pad = PadN(optdata=bytes(4))
        chain = IPv6ExtHdrHopByHop(options=[pad]) / IPv6ExtHdrDestOpt(options=[pad])
        longer.append({"extension": chain})
    for client in clients:
        for how in longer:
            for flags in ("S", "A", "PA"):
                for address in ((net.vip, 80), (net.node, 30080), (net.vip, 81)):
                    yield bytes(world.tcp(client, address, flags, b"data", **how))
            yield bytes(world.udp(client, (net.vip, 53), b"question", **how))
            yield bytes(world.tcp(client, (net.other_vip, 80), **how))
            yield bytes(world.udp(client, (net.other_vip, 80), **how))
        yield bytes(world.sctp(client, (net.vip, 9)))
        yield bytes(world.udp(client, (net.node, 30053)))
        yield bytes(world.tcp(client, (net.outside_too, 80)))
        yield bytes(world.icmp_echo(client[0], net.vip))
        large = world.udp(client, (net.vip, 53), bytes(range(250)) * 8)
        for piece in world.fragments(large, ident=client[1]):
            yield bytes(piece)
        for backend, port, proto in (
            *(((net.a, 8080), 80, "tcp"), ((net.b, 8080), 80, "tcp")),
            *(((net.a, 5353), 53, "udp"), ((net.c, 53), 53, "udp"), ((net.a, 9), 9, "sctp")),
        ):
            build = getattr(world, proto)
            hairpin = (net.hairpin, client[1])
            request = build(client, (net.vip, port))
            for receiver in (client, hairpin):
                yield bytes(build(backend, receiver))
            if proto == "udp":
                for piece in world.fragments(build(backend, client, bytes(2000)), ident=port):
                    yield bytes(piece)
            sent = with_ends(request, dst=backend)
            yield bytes(world.icmp_error(net.router, client[0], sent))
            answer = with_ends(build(backend, client), src=(net.vip, port))
            yield bytes(world.icmp_error(client[0], net.vip, answer))


def _open_flows(world: World, corpus: list[bytes]) -> None:
    for packet in corpus:
        if len(packet) > 54:
            world.run("pod_ingress" if b"\x9c\x42" in packet else "node_ingress", packet)


def _mutate(rng: random.Random, corpus: list[bytes], header_end: int) -> bytes:
    """One to three things done to a packet of the corpus."""
    packet = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 2, 3))):
        how = rng.randrange(8)
        if how == 0:
            del packet[rng.randrange(14, len(packet) + 1) :]
        elif how == 1:
            packet += rng.randbytes(rng.randrange(1, 60))
        elif how == 2:
            other = rng.choice(corpus)
            cut = rng.randrange(14, min(len(packet), len(other)) + 1)
            packet = packet[:cut] + other[cut:]
        elif how in (3, 4) and len(packet) > 15:
            _set_field(rng, packet, header_end)
        elif len(packet) > 15:
            for _ in range(rng.choice((1, 1, 2, 8))):
                at = rng.randrange(14, min(len(packet), 14 + 100))
                packet[at] = rng.choice((0, 1, 0x45, 0x60, 0x80, 0xFF, rng.randrange(256)))
    return bytes(packet)


def _set_field(rng: random.Random, packet: bytearray, header_end: int) -> None:
    """Write a treacherous value where headers keep lengths, offsets, kinds and flags."""
    four = packet[14] >> 4 == 4
    if four:
        places = [(14, 1), (16, 2), (20, 2), (23, 1), (36, 2), (38, 2), (40, 2), (46, 1)]
    else:
        places = [(14, 1), (18, 2), (20, 1), (54, 1), (55, 1), (56, 2), (58, 2), (66, 1)]
    at, size = rng.choice(places)
    near = rng.choice((0, 1, 4, 5, 6, 8, 15, 17, 19, 20, 28, 39, 40, 44, 58, 60, 132, 255))
    if size == 2:
        near = rng.choice((near, near << 8, 0x2000, 0x1FFF, 0xFFFF, len(packet) - 14, header_end))
    if at + size <= len(packet):
        packet[at : at + size] = (near & ((1 << 8 * size) - 1)).to_bytes(size, "big")
