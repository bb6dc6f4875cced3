"""Clients that call an endpoint itself, from a port they also use for a service of it.

To the endpoint the two would be one; connection tracking gives the later one another port.
"""

from __future__ import annotations

import itertools

import pytest

from ebpf_svc.dataplane.ebpf.constants import MASQUERADE_MARK, NAT_PORTS, TCP_IDLE_S, UDP_IDLE_S
from ebpf_svc.model.net import Protocol, Sources
from tests.lib.packet_world import World
from tests.lib.packets import Address, Packet, with_ends

pytestmark = pytest.mark.root

PROTOCOLS = [Protocol.TCP, Protocol.UDP]
by_protocol = pytest.mark.parametrize("proto", PROTOCOLS, ids=str)


class Calls:
    """One port of a client, which calls an endpoint by this and that address."""

    def __init__(self, world: World, proto: Protocol, *, hook: str = "pod_ingress") -> None:
        net = world.net
        self._world, self._proto, self._hook = world, proto, hook
        self.client = (net.pod if hook == "pod_ingress" else net.outside, 40000)
        self.vip, self.endpoint = (net.vip, 80), (net.a, 8080)
        self.is_masqueraded = False

    def call(self, to: Address, flags: str = "S") -> int:
        """Send a packet to that address; the port the endpoint sees."""
        request = self._packet(self.client, to, flags)
        ran = self._world.run(self._hook, request)
        assert ran.src[0] == self.client[0]
        wanted = with_ends(request, src=ran.src, dst=self.endpoint)
        is_masqueraded = self.is_masqueraded and to != self.endpoint
        ran.expect(wanted, mark=MASQUERADE_MARK if is_masqueraded else 0)
        return ran.src[1]

    def answer(self, port: int, called: Address, flags: str = "SA") -> None:
        """What the endpoint says to that port comes to the client, from the address it called."""
        said = self._packet(self.endpoint, (self.client[0], port), flags)
        self._world.run("egress", said).expect(with_ends(said, src=called, dst=self.client))

    def _packet(self, src: Address, dst: Address, flags: str) -> Packet:
        if self._proto is Protocol.TCP:
            return self._world.tcp(src, dst, flags)
        if self._proto is Protocol.SCTP:
            return self._world.sctp(src, dst)
        return self._world.udp(src, dst)


@by_protocol
@pytest.mark.parametrize("hook", ["pod_ingress", "node_ingress"])
@pytest.mark.parametrize("masquerade", [Sources.NONE, Sources.ALL], ids=["kept", "masqueraded"])
@pytest.mark.parametrize("is_direct_first", [False, True], ids=["service-first", "direct-first"])
def test_later_call_from_a_port_in_use_gets_another_at_the_endpoint(
    world: World, proto: Protocol, hook: str, masquerade: Sources, is_direct_first: bool
) -> None:
    """Both go on, in any order, and each answer comes from the address that was called."""
    calls = Calls(world, proto, hook=hook)
    calls.is_masqueraded = masquerade is Sources.ALL
    world.service(*calls.vip, proto, backends=[calls.endpoint], masquerade_for=masquerade)
    order = [calls.vip, calls.endpoint]
    first, second = order[::-1] if is_direct_first else order
    assert calls.call(first) == calls.client[1]
    port = calls.call(second)
    assert port in NAT_PORTS
    for flags, said in (("S", "SA"), ("A", "A"), ("PA", "PA")):
        for to, seen in ((first, calls.client[1]), (second, port)):
            assert calls.call(to, flags) == seen
            calls.answer(seen, to, said)
    assert world.drops() == {}


@by_protocol
def test_one_port_may_call_two_services_and_the_endpoint(world: World, proto: Protocol) -> None:
    """However many addresses lead to the endpoint, it sees as many clients."""
    calls = Calls(world, proto)
    other = (world.net.other_vip, 80)
    called = (calls.vip, other, calls.endpoint)
    for order in itertools.permutations(called):
        world.reset()
        for vip in called[:2]:
            world.service(*vip, proto, backends=[calls.endpoint])
        ports = {to: calls.call(to) for to in order}
        assert len(set(ports.values())) == 3
        for to in called:
            assert calls.call(to, "A") == ports[to]
            calls.answer(ports[to], to)


@pytest.mark.parametrize("flags", ["FA", "R"])
def test_port_of_a_call_that_has_ended_is_free(world: World, flags: str) -> None:
    """A direct call's for the service, and the service's for a direct call."""
    calls = Calls(world, Protocol.TCP)
    world.service(*calls.vip, backends=[calls.endpoint])
    for to in (calls.endpoint, calls.vip, calls.endpoint, calls.vip):
        assert calls.call(to) == calls.client[1]
        calls.answer(calls.client[1], to)
        calls.call(to, flags)


def test_call_with_another_port_that_has_ended_leaves_nothing(world: World) -> None:
    """The next one from that port keeps it, as the service's flow is over, too."""
    calls = Calls(world, Protocol.TCP)
    world.service(*calls.vip, backends=[calls.endpoint])
    calls.call(calls.vip)
    port = calls.call(calls.endpoint)
    for to in (calls.vip, calls.endpoint):
        calls.call(to, "FA")
    assert calls.call(calls.endpoint) == calls.client[1] != port
    assert calls.call(calls.endpoint, "A") == calls.client[1]
    calls.answer(calls.client[1], calls.endpoint, "A")


def test_datagram_to_the_endpoint_is_forgotten_as_a_flow_is(world: World) -> None:
    """After as long without one as a flow of UDP lives, the service's has the port."""
    calls = Calls(world, Protocol.UDP)
    world.service(*calls.vip, Protocol.UDP, backends=[calls.endpoint])
    calls.call(calls.endpoint)
    world.age_notes(UDP_IDLE_S + 1)
    assert calls.call(calls.vip) == calls.client[1]


def test_packets_are_looked_for_as_long_as_one_may_have_another_port(world: World) -> None:
    """A day after the last one a packet to an endpoint costs nothing again."""
    calls = Calls(world, Protocol.TCP)
    world.service(*calls.vip, backends=[calls.endpoint])
    calls.call(calls.vip)
    port = calls.call(calls.endpoint)
    other = world.tcp(calls.client, (world.net.b, 9090), "A")
    for _ in range(2):
        world.age_notes(TCP_IDLE_S - 5)
        world.run("pod_ingress", other).expect(other)
        assert calls.call(calls.endpoint, "A") == port
    world.age_notes(TCP_IDLE_S + 1)
    world.run("pod_ingress", other).expect(other)
    assert calls.call(calls.endpoint, "A") == calls.client[1]


def test_sctp_keeps_its_port(world: World) -> None:
    """Its checksum covers the ports: the direct call goes on as it is."""
    calls = Calls(world, Protocol.SCTP)
    world.service(*calls.vip[:1], 8080, Protocol.SCTP, backends=[calls.endpoint])
    calls.call((calls.vip[0], 8080))
    assert calls.call(calls.endpoint) == calls.client[1]


def test_fragments_keep_their_port(world: World) -> None:
    """Of a datagram in pieces to the endpoint itself the ports stay what they are."""
    calls = Calls(world, Protocol.UDP)
    world.service(*calls.vip, Protocol.UDP, backends=[calls.endpoint])
    calls.call(calls.vip)
    datagram = world.udp(calls.client, calls.endpoint, bytes(64))
    for piece in world.fragments(datagram, size=32):
        world.run("pod_ingress", piece).expect(piece)
