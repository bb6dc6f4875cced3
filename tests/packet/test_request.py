"""A client's packets on their way to a backend."""

from __future__ import annotations

from collections import Counter

import pytest
from scapy.all import (
    SCTP,
    UDP,
    Ether,
    IPOption_NOP,
    IPOption_RR,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    Raw,
    SCTPChunkInit,
)

from ebpf_svc.dataplane.ebpf.constants import Drop
from ebpf_svc.model.net import Family, Protocol
from tests.lib.packet_world import IPV4_ONLY, IPV6_ONLY, World
from tests.lib.packets import with_ends

TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)
SOURCES = pytest.mark.parametrize("program", ["pod_ingress", "node_ingress"])


@TCP_AND_UDP
@SOURCES
@pytest.mark.parametrize("backend_port", [80, 8080])
def test_packet_to_a_service_goes_to_its_backend(
    world: World, program: str, proto: Protocol, backend_port: int
) -> None:
    """A request to a frontend arrives at the backend, whether or not the ports are the same."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, backend_port)
    world.service(*vip, proto, backends=[backend])
    request = world.l4(proto, client, vip)
    world.run(program, request).expect(with_ends(request, dst=backend))


@TCP_AND_UDP
def test_packet_on_a_device_without_ethernet_goes_to_its_backend(
    world: World, proto: Protocol
) -> None:
    """A tunnel device hands over packets that start with their IP header."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, proto, backends=[backend])
    request = world.l4(proto, client, vip, payload=b"x" * 40)
    wanted = bytes(with_ends(request, dst=backend))[14:]
    world.run("node_ingress_l3", bytes(request)[14:]).expect(wanted)


def test_first_packet_leaves_a_flow_that_says_who_is_who(world: World) -> None:
    """Both directions and every later packet are told from this one entry."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    service = world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    ((key, value),) = world.entries("flows")
    assert (key.client, key.client_port) == world.wire(client)
    assert (key.service, key.proto, key.second) == (service.id, 6, 0)
    assert (value.frontend_addr, value.frontend_port) == world.wire(vip)
    assert (value.backend_addr, value.backend_port) == world.wire(backend)
    assert (value.state, value.flags) == (0, 0)


def test_payload_of_any_length_keeps_a_right_checksum(world: World) -> None:
    """Odd lengths, empty and full segments: the checksum follows the addresses alone."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    for proto in (Protocol.TCP, Protocol.UDP):
        world.service(*vip, proto, backends=[backend])
        for length in (0, 1, 2, 3, 63, 1000, 1400):
            request = world.l4(proto, client, vip, payload=bytes(range(256))[:length] * 1)
            world.run("pod_ingress", request).expect(with_ends(request, dst=backend))


def test_udp_without_checksum_stays_without(world: World) -> None:
    """A sender that computes no UDP checksum (IPv4) gets none invented, and no wrong one."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 53), (world.net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    request = world.udp(client, vip)
    request[UDP].chksum = 0
    left = world.run("pod_ingress", request).expect(with_ends(request, dst=backend))
    assert left[UDP].chksum == 0


def test_udp_checksum_that_becomes_zero_is_written_as_all_ones(world: World) -> None:
    """Zero on the wire would mean "none": RFC 768 has the other zero sent."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 53), (world.net.a, 5353)
    world.service(*vip, Protocol.UDP, backends=[backend])
    probe = with_ends(world.udp(client, vip, payload=b"\0\0"), dst=backend)
    request = world.udp(client, vip, payload=probe[UDP].chksum.to_bytes(2, "big"))
    left = world.run("pod_ingress", request)
    assert left.packet[UDP].chksum == 0xFFFF
    assert left.dst == backend


@IPV4_ONLY
def test_ipv4_options_travel_along(world: World) -> None:
    """A header with options is longer: ports and checksums are found all the same."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    for proto in (Protocol.TCP, Protocol.UDP):
        world.service(*vip, proto, backends=[backend])
        for options in ([IPOption_NOP()] * 4, [IPOption_RR(length=39, routers=["0.0.0.0"] * 9)]):
            request = world.l4(proto, client, vip, payload=b"x" * 30, options=options)
            assert request.getlayer(1).ihl > 5
            world.run("pod_ingress", request).expect(with_ends(request, dst=backend))


EXTENSIONS = {
    "hop-by-hop": IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)]),
    "destination options": IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 12)]),
    "spent routing": IPv6ExtHdrRouting(addresses=[], segleft=0),
    "atomic fragment": IPv6ExtHdrFragment(offset=0, m=0, id=7),
    "three": IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 4)])
    / IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])
    / IPv6ExtHdrRouting(addresses=[], segleft=0),
}


@IPV6_ONLY
@TCP_AND_UDP
@pytest.mark.parametrize("extension", EXTENSIONS.values(), ids=EXTENSIONS)
def test_ipv6_extension_headers_travel_along(
    world: World, proto: Protocol, extension: object
) -> None:
    """The transport header is found behind every chain RFC 8200 recommends."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, proto, backends=[backend])
    request = world.l4(proto, client, vip, extension=extension)
    world.run("pod_ingress", request).expect(with_ends(request, dst=backend))


@IPV6_ONLY
def test_ipv6_with_endless_extension_headers_is_left_to_the_stack(world: World) -> None:
    """A chain longer than any honest sender's is passed as it is."""
    vip = (world.net.vip, 80)
    world.service(*vip, backends=[(world.net.a, 8080)])
    option = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])
    long_option = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 140)])
    for extension in (option / option / option / option / option, long_option):
        request = world.tcp((world.net.pod, 40000), vip, extension=extension)
        world.run("pod_ingress", request).expect_untouched()


def test_sctp_with_the_same_port_goes_to_its_backend(world: World) -> None:
    """SCTP's checksum covers no addresses: the packet changes nothing but them."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 9), (world.net.a, 9)
    world.service(*vip, Protocol.SCTP, backends=[backend])
    request = world.sctp(client, vip)
    wanted = with_ends(request, dst=backend)
    assert bytes(wanted[SCTP]) == bytes(request[SCTP])
    world.run("pod_ingress", request).expect(wanted)


def test_sctp_to_another_port_is_dropped_and_counted(world: World) -> None:
    """Its CRC covers the ports and cannot be mended: better nothing than a corrupt packet."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 9), (world.net.a, 10)
    world.service(*vip, Protocol.SCTP, backends=[backend])
    world.run("pod_ingress", world.sctp(client, vip)).expect_dropped()
    assert world.drops() == {Drop.REWRITE_FAILED: 1}


def test_packet_to_no_service_is_not_touched(world: World) -> None:
    """Another port, another address, another protocol: none of our business (P15, P16)."""
    net = world.net
    world.service(net.vip, 80, backends=[(net.a, 8080)])
    client = (net.pod, 40000)
    strangers = [
        world.tcp(client, (net.vip, 81)),
        world.tcp(client, (net.outside, 80)),
        world.udp(client, (net.vip, 80)),
        world.sctp(client, (net.vip, 80)),
        world.tcp((net.vip, 80), client, "SA"),
        world.icmp_echo(net.pod, net.vip),
        Ether(bytes(world.ip(net.pod, net.vip, **{world.next_header: 47}) / Raw(b"\0" * 40))),
    ]
    for program in world.ingress_programs:
        for packet in strangers:
            world.run(program, packet).expect_untouched()
    for packet in strangers:
        world.run("egress", packet).expect_untouched()
    assert not world.entries("flows")
    assert not world.drops()


def test_mark_of_others_stays(world: World) -> None:
    """Only our own bit is ever added to a packet's mark."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    request = world.tcp(client, vip)
    world.run("pod_ingress", request, mark=0x10001).expect(
        with_ends(request, dst=backend), mark=0x10001
    )


def test_requests_spread_evenly_over_the_backends(world: World) -> None:
    """Every backend gets its share of new connections (P12); the bounds are five sigma."""
    vip = (world.net.vip, 80)
    backends = [(world.net.a, port) for port in range(8000, 8008)]
    world.service(*vip, backends=backends)
    request = world.tcp((world.net.pod, 0), vip)
    count = Counter(world.choices("pod_ingress", request, range(20_000, 24_000)).values())
    assert set(count) == set(backends)
    share = 4000 / len(backends)
    sigma = (4000 * (1 / 8) * (7 / 8)) ** 0.5
    assert all(abs(n - share) < 5 * sigma for n in count.values()), count


def test_packets_that_open_one_flow_agree_on_the_backend(world: World) -> None:
    """Two questions of one socket may find no flow, each on its CPU: whichever flow stays, it is
    the other's, too.
    """
    vip, ports = (world.net.vip, 53), range(20_000, 20_200)
    world.service(*vip, Protocol.UDP, backends=[(world.net.a, port) for port in range(8000, 8008)])
    request = world.udp((world.net.pod, 0), vip)
    first = world.choices("pod_ingress", request, ports)
    world.hash("flows").clear()
    assert world.choices("pod_ingress", request, ports) == first


def test_header_beyond_the_packet_is_left_to_the_stack(world: World) -> None:
    """A segment cut within its own header is passed as it is, never written to."""
    net = world.net
    world.service(net.vip, 80, backends=[(net.a, 8080)])
    world.service(net.vip, 80, Protocol.UDP, backends=[(net.a, 8080)])
    header = 34 if world.family is Family.V4 else 54
    for whole, least in (
        (world.tcp((net.pod, 1), (net.vip, 80)), header + 20),
        (world.udp((net.pod, 1), (net.vip, 80)), header + 8),
    ):
        for length in range(header, least):
            world.run("pod_ingress", bytes(whole)[:length]).expect_untouched()
    assert not world.entries("flows")


def test_sctp_chunk_is_read_by_scapy(world: World) -> None:
    """The packets above are what they claim to be."""
    assert SCTPChunkInit in world.sctp((world.net.pod, 1), (world.net.vip, 9))
