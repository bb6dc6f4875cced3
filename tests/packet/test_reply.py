"""A backend's answers on their way to the client."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.ebpf.constants import (
    BACKEND_CHAIN_MAX,
    NAT_PORTS,
    UDP_IDLE_S,
    Drop,
    FlowState,
)
from ebpf_svc.model.net import Protocol, Sources
from tests.lib.packet_world import World
from tests.lib.packets import MASQUERADED, Verdict, with_ends

TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


@TCP_AND_UDP
@pytest.mark.parametrize("backend_port", [80, 8080])
def test_answer_comes_from_the_address_the_client_called(
    world: World, proto: Protocol, backend_port: int
) -> None:
    """The client sees the service answer, whatever port the backend listens on."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, backend_port)
    world.service(*vip, proto, backends=[backend])
    world.run("pod_ingress", world.l4(proto, client, vip))
    answer = world.l4(proto, backend, client)
    world.run("egress", answer).expect(with_ends(answer, src=vip))


@TCP_AND_UDP
def test_answer_on_a_device_without_ethernet_comes_from_the_service(
    world: World, proto: Protocol
) -> None:
    """The way back through a tunnel is the way there."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, proto, backends=[backend])
    world.run("node_ingress", world.l4(proto, client, vip))
    answer = world.l4(proto, backend, client, payload=b"x" * 40)
    wanted = bytes(with_ends(answer, src=vip))[14:]
    world.run("egress_l3", bytes(answer)[14:]).expect(wanted)


def test_sctp_answer_comes_from_the_service(world: World) -> None:
    """SCTP's way back changes addresses only, too."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 9), (world.net.a, 9)
    world.service(*vip, Protocol.SCTP, backends=[backend])
    world.run("pod_ingress", world.sctp(client, vip))
    answer = world.sctp(backend, client)
    world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_udp_answer_without_checksum_stays_without(world: World) -> None:
    """No checksum is invented on the way back either."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 53), (world.net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    world.run("pod_ingress", world.udp(client, vip))
    answer = world.udp(backend, client)
    answer["UDP"].chksum = 0
    world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_tcp_connection_from_syn_to_fin(world: World) -> None:
    """A whole conversation: each side sees only whom it believes to talk to."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    for side, flags, payload in (
        ("client", "S", b""),
        ("backend", "SA", b""),
        ("client", "A", b""),
        ("client", "PA", b"GET / HTTP/1.1\r\n\r\n"),
        ("backend", "A", b""),
        ("backend", "PA", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("backend", "FA", b""),
        ("client", "FA", b""),
        ("backend", "A", b""),
    ):
        if side == "client":
            packet = world.tcp(client, vip, flags, payload)
            world.run("pod_ingress", packet).expect(with_ends(packet, dst=backend))
        else:
            packet = world.tcp(backend, client, flags, payload)
            world.run("egress", packet).expect(with_ends(packet, src=vip))
    ((_, flow),) = world.entries("flows")
    assert FlowState(flow.state) == (
        FlowState.ESTABLISHED | FlowState.CLIENT_FIN | FlowState.BACKEND_FIN
    )


def test_backend_that_talks_to_others_is_not_touched(world: World) -> None:
    """What is no answer to a service's client leaves as it is."""
    net = world.net
    client, vip, backend = (net.pod, 40000), (net.vip, 80), (net.a, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    for packet in (
        world.tcp(backend, (net.outside, 40000), "A"),
        world.tcp(backend, (net.pod, 40001), "A"),
        world.tcp((net.a, 8081), client, "A"),
        world.tcp((net.b, 8080), client, "A"),
        world.udp(backend, client),
    ):
        world.run("egress", packet).expect_untouched()


def test_request_that_leaves_towards_its_backend_is_not_touched_again(world: World) -> None:
    """On its way out the translated request meets the egress hook, which leaves it alone."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    request = world.run("pod_ingress", world.tcp(client, vip))
    world.run("egress", request.data).expect_untouched()


def test_answer_of_a_removed_backend_still_comes_from_the_service(world: World) -> None:
    """A connection lives on after its endpoint left the plan, in both directions (P12)."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    service = world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    service.set_backends([(world.net.b, 8080)])
    answer = world.tcp(backend, client, "PA", b"data")
    world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_answer_later_than_the_idle_time_is_no_answer(world: World) -> None:
    """A UDP flow unused for two minutes is over for the way back, too."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 53), (world.net.a, 53)
    world.service(*vip, Protocol.UDP, backends=[backend])
    world.run("pod_ingress", world.udp(client, vip))
    answer = world.udp(backend, client)
    world.age("flows", UDP_IDLE_S - 2)
    world.run("egress", answer).expect(with_ends(answer, src=vip))
    world.age("flows", UDP_IDLE_S + 2)
    world.run("egress", answer).expect_untouched()


def test_answers_keep_a_udp_flow_alive(world: World) -> None:
    """A stream that only the backend feeds does not go idle."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    a, b = (world.net.a, 53), (world.net.b, 53)
    service = world.service(*vip, Protocol.UDP, backends=[a])
    question = world.udp(client, vip)
    world.run("pod_ingress", question)
    service.set_backends([b], draining=[a])
    world.age("flows", UDP_IDLE_S - 2)
    world.run("egress", world.udp(a, client))
    world.age("flows", UDP_IDLE_S - 2)
    assert world.run("pod_ingress", question).dst == a


def test_client_that_calls_the_endpoint_itself_later_is_answered_by_it(world: World) -> None:
    """The flow of an ended connection does not disguise the answers of a new, direct one."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip, "S"))
    world.run("egress", world.tcp(backend, client, "SA"))
    world.run("pod_ingress", world.tcp(client, vip, "FA"))
    world.run("egress", world.tcp(backend, client, "FA"))
    for flags in ("SA", "A", "PA", "FA"):
        answer = world.tcp(backend, client, flags, b"direct" if flags == "PA" else b"")
        world.run("egress", answer).expect_untouched()


def test_syn_ack_repeated_after_the_client_closed_comes_from_the_service(world: World) -> None:
    """A client that is done at once may lose all its segments: the backend knows of no end yet."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    for flags in ("S", "A", "PA", "FA"):
        world.run("pod_ingress", world.tcp(client, vip, flags))
    answer = world.tcp(backend, client, "SA")
    for _ in range(2):
        world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_service_ports_that_share_an_endpoint_each_get_their_answers(world: World) -> None:
    """One pod behind many services: every client is answered by the service it called."""
    backend = (world.net.a, 8080)
    vips = [(world.net.vip, port) for port in range(1, BACKEND_CHAIN_MAX + 1)]
    for vip in vips:
        world.service(*vip, backends=[backend])
    for vip in vips:
        client = (world.net.pod, 40000 + vip[1])
        world.run("pod_ingress", world.tcp(client, vip))
    for vip in vips:
        answer = world.tcp(backend, (world.net.pod, 40000 + vip[1]), "SA")
        world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_node_port_and_cluster_ip_from_one_client_port_are_told_apart(world: World) -> None:
    """A client may use one port to two addresses of a service; each answers for itself."""
    client = (world.net.outside, 40000)
    vip, node_port = (world.net.vip, 80), (world.net.node, 30080)
    a, b = (world.net.a, 8080), (world.net.b, 8080)
    service = world.service(*vip, backends=[a])
    service.add_frontend(*node_port)
    world.run("node_ingress", world.tcp(client, vip))
    service.set_backends([b], draining=[a])
    world.run("node_ingress", world.tcp(client, node_port))
    for backend, frontend in ((a, vip), (b, node_port), (a, vip)):
        request = world.tcp(client, frontend, "A")
        world.run("node_ingress", request).expect(with_ends(request, dst=backend))
        answer = world.tcp(backend, client, "A")
        world.run("egress", answer).expect(with_ends(answer, src=frontend))


def test_second_flow_of_a_client_port_outlives_the_first(world: World) -> None:
    """When the first of two flows is swept or evicted, the other goes on in both directions."""
    client = (world.net.outside, 40000)
    vip, node_port = (world.net.vip, 80), (world.net.node, 30080)
    a, b = (world.net.a, 8080), (world.net.b, 8080)
    service = world.service(*vip, backends=[a])
    service.add_frontend(*node_port)
    world.run("node_ingress", world.tcp(client, vip))
    service.set_backends([b], draining=[a])
    world.run("node_ingress", world.tcp(client, node_port))
    flows = world.hash("flows")
    flows.delete([key for key, _ in flows.items() if flows.key.unpack(key).second == 0])
    assert len(world.entries("flows")) == 1
    answer = world.tcp(b, client, "A")
    world.run("egress", answer).expect(with_ends(answer, src=node_port))
    request = world.tcp(client, node_port, "A")
    world.run("node_ingress", request).expect(with_ends(request, dst=b))


@TCP_AND_UDP
def test_two_flows_of_a_client_port_never_share_a_backend(world: World, proto: Protocol) -> None:
    """At one backend they could not be told apart: the second goes to another one."""
    client = (world.net.outside, 40000)
    vip, node_port = (world.net.vip, 80), (world.net.node, 30080)
    a, b = (world.net.a, 8080), (world.net.b, 8080)
    for _ in range(20):
        service = world.service(*vip, proto, backends=[a, b])
        service.add_frontend(*node_port)
        first = world.run("node_ingress", world.l4(proto, client, vip)).dst
        second = world.run("node_ingress", world.l4(proto, client, node_port)).dst
        assert {first, second} == {a, b}
        for backend, frontend in ((first, vip), (second, node_port)):
            answer = world.l4(proto, backend, client)
            world.run("egress", answer).expect(with_ends(answer, src=frontend))
        world.reset()


@pytest.mark.parametrize("services", [1, 2])
def test_second_connection_of_a_client_port_to_a_backend_gets_another_port(
    world: World, services: int
) -> None:
    """Two frontends, of one service or of two, and a single backend: it sees two connections.

    As conntrack has it: each answer, and each ICMP error, comes from the address that was called.
    """
    client = (world.net.outside, 40000)
    vip, node_port, backend = (world.net.vip, 80), (world.net.node, 30080), (world.net.a, 8080)
    service = world.service(*vip, backends=[backend])
    if services == 1:
        service.add_frontend(*node_port)
    else:
        world.service(*node_port, backends=[backend])
    world.run("node_ingress", world.tcp(client, vip))
    ports = set()
    for flags in ("S", "S", "A", "PA"):
        request = world.tcp(client, node_port, flags)
        ran = world.run("node_ingress", request)
        ports.add(ran.src[1])
        ran.expect(with_ends(request, src=(client[0], ran.src[1]), dst=backend))
    (port,) = ports
    assert port in NAT_PORTS
    for seen, frontend in ((client[1], vip), (port, node_port)):
        answer = world.tcp(backend, (client[0], seen), "SA")
        world.run("egress", answer).expect(with_ends(answer, src=frontend, dst=client))
        request = world.tcp(client, frontend, "A")
        expected = with_ends(request, src=(client[0], seen), dst=backend)
        world.run("node_ingress", request).expect(expected)
    assert world.drops() == {}


def test_connection_with_another_port_makes_room_when_it_ends(world: World) -> None:
    """Ports that stand for others are given out again once nobody uses them."""
    client = (world.net.outside, 40000)
    vip, node_port, backend = (world.net.vip, 80), (world.net.node, 30080), (world.net.a, 8080)
    world.service(*vip, backends=[backend]).add_frontend(*node_port)
    world.run("node_ingress", world.tcp(client, vip))
    for _ in range(3):
        assert world.run("node_ingress", world.tcp(client, node_port)).src[1] in NAT_PORTS
        world.run("node_ingress", world.tcp(client, node_port, "FA"))
    world.run("node_ingress", world.tcp(client, vip, "FA"))
    again = world.tcp(client, node_port)
    world.run("node_ingress", again).expect(with_ends(again, dst=backend))
    answer = world.tcp(backend, client, "SA")
    world.run("egress", answer).expect(with_ends(answer, src=node_port))


def test_replies_of_an_endpoint_behind_forty_services_find_each(world: World) -> None:
    """More than a reply looks through one by one: the others' flows are found another way."""
    backend = (world.net.a, 8080)
    vips = [(world.net.vip, port) for port in range(1, 41)]
    for vip in vips:
        world.service(*vip, backends=[backend])
    for vip in vips:
        world.run("pod_ingress", world.tcp((world.net.pod, 40000 + vip[1]), vip))
    for vip in vips:
        answer = world.tcp(backend, (world.net.pod, 40000 + vip[1]), "SA")
        world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_client_port_is_told_apart_at_a_crowded_endpoint(world: World) -> None:
    """One client port to all of forty services with one endpoint: forty connections there."""
    client, backend = (world.net.pod, 40000), (world.net.a, 8080)
    vips = [(world.net.vip, port) for port in range(1, 41)]
    for vip in vips:
        world.service(*vip, backends=[backend])
    seen = {vip: world.run("pod_ingress", world.tcp(client, vip)).src for vip in vips}
    assert len(set(seen.values())) == len(vips)
    for vip, source in seen.items():
        answer = world.tcp(backend, source, "SA")
        world.run("egress", answer).expect(with_ends(answer, src=vip, dst=client))


def test_answer_carries_no_masquerade_mark(world: World) -> None:
    """The mark is for requests: an answer masqueraded would come from nowhere the client knows."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend], masquerade_for=Sources.ALL)
    request = world.tcp(client, vip)
    world.run("node_ingress", request).expect(with_ends(request, dst=backend), mark=MASQUERADED)
    answer = world.tcp(backend, client, "SA")
    world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_packet_to_the_discard_address_vanishes(world: World) -> None:
    """What a socket hook sent nowhere is gone without an error to its sender, and counted (P3)."""
    net = world.net
    packets = [
        world.tcp((net.node, 40000), (net.discard, 80)),
        world.udp((net.node, 40000), (net.discard, 53)),
    ]
    for packet in packets:
        world.run("egress", packet).expect_dropped(Verdict.STOLEN)
    assert world.drops() == {Drop.DISCARDED: len(packets)}
