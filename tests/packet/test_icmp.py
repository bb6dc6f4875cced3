"""ICMP errors about translated packets, in both directions."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.all import Ether, Packet

from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.packet_world import IPV4_ONLY, World
from tests.lib.packets import MASQUERADED, l4_of, with_ends

PROTOCOLS = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)
KINDS = ("unreachable", "too big", "time exceeded", "parameter problem")


def _errors(world: World) -> list[dict[str, Any]]:
    """Header fields of each kind of error."""
    if world.family is Family.V4:
        return [
            {"type": 3, "code": 3},
            {"type": 3, "code": 4, "nexthopmtu": 1400},
            {"type": 11, "code": 0},
            {"type": 12, "code": 0},
        ]
    return [{"type": 1, "code": 4}, {"type": 2}, {"type": 3}, {"type": 4}]


def _sent(packet: Packet, **ends: Any) -> Packet:
    """The packet as another knows it, for a quote: other ends, its transport checksum as it was.

    Nobody verifies the checksum of a quoted segment, for it is cut.
    """
    kept = _transport(packet).chksum
    packet = with_ends(packet, **ends)
    _transport(packet).chksum = kept
    return packet


def _transport(packet: Packet) -> Packet:
    layer = l4_of(packet)
    assert layer is not None
    return layer


@PROTOCOLS
@pytest.mark.parametrize("kind", range(4), ids=KINDS)
@pytest.mark.parametrize("backend_port", [80, 8080])
def test_error_from_a_router_about_a_request_reaches_the_client_as_about_the_service(
    world: World, proto: Protocol, kind: int, backend_port: int
) -> None:
    """Path MTU discovery works through a service: the client's socket knows what is meant."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.b, backend_port)
    world.service(*vip, proto, backends=[backend])
    request = world.l4(proto, client, vip, payload=b"x" * 1300)
    world.run("pod_ingress", request)
    fields = _errors(world)[kind]
    for router in (world.net.router, world.net.node):
        error = world.icmp_error(router, client[0], _sent(request, dst=backend), **fields)
        wanted = world.icmp_error(router, client[0], request, **fields)
        world.run("egress", error).expect(wanted)


@PROTOCOLS
@pytest.mark.parametrize("quoted_bytes", [28, 60, 576])
def test_error_from_the_backend_itself_comes_from_the_service(
    world: World, proto: Protocol, quoted_bytes: int
) -> None:
    """A port closed on the backend is a port closed on the service; short and long quotes."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.b, 8080)
    world.service(*vip, proto, backends=[backend])
    request = world.l4(proto, client, vip, payload=b"x" * 600)
    world.run("pod_ingress", request)
    how = {"quoted_bytes": quoted_bytes}
    error = world.icmp_error(backend[0], client[0], _sent(request, dst=backend), **how)
    wanted = world.icmp_error(vip[0], client[0], request, **how)
    world.run("egress", error).expect(wanted)


@PROTOCOLS
@pytest.mark.parametrize("kind", range(4), ids=KINDS)
@pytest.mark.parametrize("program", ["pod_ingress", "node_ingress"])
@pytest.mark.parametrize("masquerade", [Sources.NONE, Sources.ALL], ids=["plain", "masquerade"])
def test_error_about_an_answer_reaches_the_backend_as_about_its_own(
    world: World, proto: Protocol, kind: int, program: str, masquerade: Sources
) -> None:
    """The backend learns the path MTU towards its client, whoever on the way says so."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 80), (world.net.b, 8080)
    world.service(*vip, proto, backends=[backend], masquerade_for=masquerade)
    world.run(program, world.l4(proto, client, vip))
    answer = world.l4(proto, backend, client, payload=b"y" * 1300)
    sent = world.run("egress", answer).packet
    fields = _errors(world)[kind]
    for sender in (world.net.router, client[0]):
        error = world.icmp_error(sender, vip[0], sent, **fields)
        quoted = _sent(sent, src=backend)
        wanted = world.icmp_error(sender, backend[0], quoted, **fields)
        world.run(program, error).expect(wanted, mark=MASQUERADED if masquerade else 0)


def test_errors_about_a_connection_seen_under_another_port_find_it(world: World) -> None:
    """A client's quote tells the port the client has, a backend's the one it was shown."""
    client, backend = (world.net.outside, 40000), (world.net.a, 8080)
    vip, node_port = (world.net.vip, 80), (world.net.node, 30080)
    world.service(*vip, backends=[backend]).add_frontend(*node_port)
    world.run("node_ingress", world.tcp(client, vip))
    request = world.tcp(client, node_port)
    seen = world.run("node_ingress", request).src
    assert seen != client
    router = world.net.router
    error = world.icmp_error(router, client[0], _sent(request, src=seen, dst=backend))
    world.run("egress", error).expect(world.icmp_error(router, client[0], request))
    answer = world.tcp(node_port, client, "SA")
    error = world.icmp_error(client[0], node_port[0], answer)
    quoted = _sent(answer, src=backend, dst=seen)
    world.run("node_ingress", error).expect(world.icmp_error(client[0], backend[0], quoted))


def test_error_about_an_sctp_packet_is_translated(world: World) -> None:
    """SCTP has path MTU discovery, too."""
    client, vip, backend = (world.net.pod, 9), (world.net.vip, 9), (world.net.b, 9)
    world.service(*vip, Protocol.SCTP, backends=[backend])
    request = world.sctp(client, vip)
    world.run("pod_ingress", request)
    error = world.icmp_error(world.net.router, client[0], with_ends(request, dst=backend))
    wanted = world.icmp_error(world.net.router, client[0], request)
    world.run("egress", error).expect(wanted)


@IPV4_ONLY
def test_quoted_packet_with_a_longer_header_is_understood(world: World) -> None:
    """Options in the quoted header move its ports."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.b, 8080)
    world.service(*vip, backends=[backend])
    request = world.tcp(client, vip, **world.longer_header)
    world.run("pod_ingress", request)
    how = {"quoted_bytes": 40}
    error = world.icmp_error(world.net.router, client[0], _sent(request, dst=backend), **how)
    wanted = world.icmp_error(world.net.router, client[0], request, **how)
    world.run("egress", error).expect(wanted)


def test_error_about_strangers_is_not_touched(world: World) -> None:
    """Errors about connections that are no service's, or about nothing at all."""
    net = world.net
    client, vip, backend = (net.pod, 40000), (net.vip, 80), (net.b, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    quotes = [
        world.tcp((net.pod, 40001), backend),
        world.tcp(client, (net.b, 8081)),
        world.udp(client, backend),
        world.tcp((net.outside, 40000), (net.outside_too, 80)),
        world.icmp_echo(net.pod, net.b),
        world.fragments(world.udp(client, backend, payload=bytes(3000)))[1],
    ]
    for quoted in quotes:
        error = world.icmp_error(net.router, quoted[1].src, quoted)
        for program in ("pod_ingress", "node_ingress", "egress"):
            world.run(program, error).expect_untouched()
    for cut in (0, 10, 20, 23):
        error = world.icmp_error(net.router, net.pod, world.tcp(client, backend), quoted_bytes=cut)
        for program in ("pod_ingress", "node_ingress", "egress"):
            world.run(program, error).expect_untouched()


def test_error_whose_receiver_did_not_send_the_quoted_packet_is_not_touched(world: World) -> None:
    """An error is addressed to the sender of what it quotes; anything else is forged."""
    net = world.net
    client, vip, backend = (net.outside, 40000), (net.vip, 80), (net.b, 8080)
    world.service(*vip, backends=[backend])
    request = world.tcp(client, vip)
    world.run("node_ingress", request)
    answer = with_ends(world.tcp(backend, client, "SA"), src=vip)
    forged = world.icmp_error(net.outside_too, net.other_vip, answer)
    world.run("node_ingress", forged).expect_untouched()
    forged = world.icmp_error(net.router, net.outside_too, _sent(request, dst=backend))
    world.run("egress", forged).expect_untouched()


def test_later_fragment_that_looks_like_an_error_is_not_touched(world: World) -> None:
    """What follows its header is the middle of something, whatever it resembles."""
    net = world.net
    client, vip, backend = (net.pod, 40000), (net.vip, 80), (net.b, 8080)
    world.service(*vip, backends=[backend])
    request = world.tcp(client, vip)
    world.run("pod_ingress", request)
    error = world.icmp_error(net.router, client[0], _sent(request, dst=backend), quoted_bytes=40)
    whole = world.ip(
        net.router, client[0], **{world.next_header: error[1].fields[world.next_header]}
    )
    at = 34 if world.family is Family.V4 else 54
    datagram = Ether(bytes(whole / (bytes(800) + bytes(error)[at:])))
    later = world.fragments(datagram)[1]
    assert bytes(later).endswith(bytes(error)[at:])
    world.run("egress", later).expect_untouched()


def test_ping_to_a_service_is_not_touched(world: World) -> None:
    """Echo is no service's business (P17)."""
    world.service(world.net.vip, 80, backends=[(world.net.a, 80)])
    for program in ("pod_ingress", "node_ingress", "egress"):
        world.run(program, world.icmp_echo(world.net.pod, world.net.vip)).expect_untouched()
