"""A process of the node sends datagrams from the number of a node port: answers are its own (B9).

Its socket is a real one of this machine's; the packets are ours.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ebpf_svc.dataplane.ebpf.constants import UDP_IDLE_S
from ebpf_svc.model.net import Family, Protocol
from tests.lib.packet_world import World
from tests.lib.packets import Address, Result, with_ends

pytestmark = pytest.mark.root

LOOPBACK_INDEX = 1
INGRESS = pytest.mark.parametrize("program", World.ingress_programs)


@dataclass(frozen=True)
class Asker:
    """A process with an unconnected socket bound to a number that is a node port, too."""

    world: World
    sock: socket.socket
    node: Address
    """Its socket, and the node port."""
    backend: Address
    server: Address
    """Whom it asks, beyond the cluster."""

    def asks(self, **how: int) -> Result:
        """A question of its leaves the node."""
        return self.world.run("egress", self.world.udp(self.node, self.server), **how)

    def comes(self, client: Address, program: str = "node_ingress") -> Result:
        """A datagram to those ends comes in."""
        return self.world.run(program, self.world.udp(client, self.node, b"answer"))

    def expect_served(self, client: Address) -> None:
        """What comes from there is a request and goes to the service."""
        result = self.comes(client)
        result.expect(with_ends(result.packet, dst=self.backend))

    def time_passes(self, seconds: int) -> None:
        """Notes get older."""
        notes = self.world.hash("reverse")
        for key, value in list(notes.items()):
            fields = notes.value.unpack(value)._asdict()
            fields["service"] = (fields["service"] - seconds) % 2**32
            notes.update([(key, notes.value.pack(**fields))])


@pytest.fixture
def asker(world: World) -> Iterator[Asker]:
    """Bound to any address, as a resolver's socket is."""
    kind = socket.AF_INET if world.family is Family.V4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        node = world.net.node, sock.getsockname()[1]
        backend = world.net.a, 53
        world.service(*node, Protocol.UDP, backends=[backend])
        yield Asker(world, sock, node, backend, (world.net.outside, 53))


@INGRESS
def test_answer_to_an_unconnected_socket_is_left_to_it(asker: Asker, program: str) -> None:
    """Whether who was asked is beyond the cluster or a pod."""
    asker.asks().expect_untouched()
    for _ in range(3):
        asker.comes(asker.server, program).expect_untouched()
    assert not asker.world.entries("flows")


def test_request_of_whoever_was_not_asked_is_served(asker: Asker) -> None:
    """A process is bound to the number and asks others; strangers call the service all the same."""
    asker.expect_served((asker.world.net.outside_too, 53))
    asker.asks()
    asker.expect_served((asker.world.net.outside_too, 53))
    asker.expect_served((asker.world.net.outside, 54))
    other = asker.world.net.node_too, asker.node[1]
    asker.world.service(*other, Protocol.UDP, backends=[asker.backend])
    request = asker.world.udp(asker.server, other)
    asker.world.run("node_ingress", request).expect(with_ends(request, dst=asker.backend))


def test_answer_that_comes_too_late_is_a_request(asker: Asker) -> None:
    """Two minutes after the last datagram either way, as netfilter would have it."""
    asker.asks()
    asker.time_passes(UDP_IDLE_S - 2)
    asker.comes(asker.server).expect_untouched()
    asker.time_passes(UDP_IDLE_S - 2)
    asker.asks()
    asker.time_passes(UDP_IDLE_S - 2)
    asker.comes(asker.server).expect_untouched()
    asker.time_passes(UDP_IDLE_S + 2)
    asker.expect_served(asker.server)


def test_question_after_a_long_silence_is_answered_again(asker: Asker) -> None:
    """Nothing opened a flow meanwhile, so nothing stands in its way."""
    asker.asks()
    asker.time_passes(10 * UDP_IDLE_S)
    asker.asks()
    asker.comes(asker.server).expect_untouched()


def test_answer_whose_socket_is_closed_is_a_request(asker: Asker) -> None:
    """Nobody waits for it any more."""
    asker.asks()
    asker.sock.close()
    asker.expect_served(asker.server)


def test_client_of_the_service_keeps_its_flow_when_it_is_asked(asker: Asker) -> None:
    """Who came first has the ends: the flow was there before the question."""
    asker.expect_served(asker.server)
    asker.asks()
    asker.expect_served(asker.server)


def test_tcp_leaves_no_note_and_is_not_asked_for_one(asker: Asker) -> None:
    """Its SYNs say who opens; a server that was asked may be a client of the same number."""
    world, node = asker.world, asker.node
    world.service(*node, Protocol.TCP, backends=[asker.backend])
    world.run("egress", world.tcp(node, asker.server)).expect_untouched()
    assert not world.entries("reverse")
    asker.asks()
    request = world.tcp(asker.server, node)
    world.run("node_ingress", request).expect(with_ends(request, dst=asker.backend))
    answer = world.tcp(asker.server, (world.net.node, node[1] ^ 1), "SA")
    world.run("node_ingress", answer).expect_untouched()


def test_what_else_leaves_is_not_noted(asker: Asker) -> None:
    """Numbers that are no frontend, and what a service answers."""
    world = asker.world
    world.run("egress", world.udp((world.net.node, asker.node[1] ^ 1), asker.server))
    client = world.net.outside_too, 40000
    asker.expect_served(client)
    answer = world.udp(asker.backend, client)
    world.run("egress", answer).expect(with_ends(answer, src=asker.node))
    assert not world.entries("reverse")


def test_what_the_node_forwards_is_not_noted(asker: Asker) -> None:
    """A pod with the node's address as source takes nobody's requests."""
    try:
        asker.asks(came_by=LOOPBACK_INDEX).expect_untouched()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this kernel runs no program on a packet that came by a device")
    assert not asker.world.entries("reverse")
    asker.expect_served(asker.server)
