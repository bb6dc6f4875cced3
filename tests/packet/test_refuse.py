"""Packets that go nowhere: refused, dropped, and who is let in."""

from __future__ import annotations

import pytest
from scapy.all import ICMP, IP, TCP, ICMPv6DestUnreach, IPv6

from ebpf_svc.dataplane.ebpf.constants import Drop, FrontendFlag
from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.packet_world import World
from tests.lib.packets import MASQUERADED, Verdict, fresh, with_ends

TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


BOTH_INGRESSES = pytest.mark.parametrize("program", ["pod_ingress", "node_ingress"])
PAYLOADS = pytest.mark.parametrize("payload", [b"", b"odd", b"x" * 1200], ids=len)


@BOTH_INGRESSES
@PAYLOADS
def test_udp_service_without_endpoints_refuses_at_once(
    world: World, program: str, payload: bytes
) -> None:
    """The client gets ICMP port unreachable from the service itself, about its own packet (P2)."""
    client, vip = (world.net.outside, 40000), (world.net.vip, 80)
    world.service(*vip, Protocol.UDP, backends=[], flags=FrontendFlag.REJECT)
    request = world.udp(client, vip, payload=payload)
    answer = world.icmp_error(vip[0], client[0], request, quoted_bytes=28)
    answer.src, answer.dst = request.dst, request.src
    if world.family is Family.V4:
        answer[IP].ttl, answer[IP].id, answer[IP].chksum = 64, 0, None
        assert (answer[ICMP].type, answer[ICMP].code) == (3, 3)
    else:
        answer[IPv6].hlim = 64
        assert (answer[ICMPv6DestUnreach].type, answer[ICMPv6DestUnreach].code) == (1, 4)
    world.run(program, request).expect(bytes(answer), verdict=Verdict.REDIRECT)
    assert world.drops() == {Drop.NO_ENDPOINT: 1}
    assert not world.entries("flows")


@BOTH_INGRESSES
@PAYLOADS
@pytest.mark.parametrize("header", ["plain", "longer"])
def test_tcp_service_without_endpoints_resets_at_once(
    world: World, program: str, payload: bytes, header: str
) -> None:
    """The client gets a reset that acknowledges its SYN, whatever its headers carry (P2)."""
    client, vip = (world.net.outside, 40000), (world.net.vip, 80)
    world.service(*vip, backends=[], flags=FrontendFlag.REJECT)
    longer = world.longer_header if header == "longer" else {}
    request = world.tcp(client, vip, payload=payload, **longer)
    request[TCP].seq, request[TCP].options = 0xFFFFFFFF, [("MSS", 1460), ("SAckOK", b"")]
    request[TCP].dataofs = None
    request.clear_cache()
    request = fresh(request)
    answer = with_ends(request, src=vip, dst=client, turned=True)
    tcp = answer[TCP]
    tcp.seq, tcp.ack, tcp.flags, tcp.window = 0, 0, "RA", 0
    network = answer[IP] if world.family is Family.V4 else answer[IPv6]
    setattr(network, "ttl" if world.family is Family.V4 else "hlim", 64)
    world.run(program, request).expect(with_ends(answer), verdict=Verdict.REDIRECT)
    assert world.drops() == {Drop.NO_ENDPOINT: 1}
    assert not world.entries("flows")


def test_refusal_of_a_datagram_with_options_is_silent(world: World) -> None:
    """Its answer would not be worth the code: such a client waits."""
    vip = (world.net.vip, 80)
    world.service(*vip, Protocol.UDP, backends=[], flags=FrontendFlag.REJECT)
    request = world.udp((world.net.pod, 40000), vip, **world.longer_header)
    world.run("pod_ingress", request).expect_dropped()
    assert world.drops() == {Drop.NO_ENDPOINT: 1}


def test_established_connection_is_not_refused_when_endpoints_vanish(world: World) -> None:
    """Only newcomers are turned away (P12)."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    service = world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip))
    service.set_backends([])
    service.frontends.clear()
    service.add_frontend(*vip, flags=FrontendFlag.REJECT)
    data = world.tcp(client, vip, "PA", b"data")
    world.run("pod_ingress", data).expect(with_ends(data, dst=backend))
    newcomer = world.tcp((world.net.pod, 40001), vip)
    world.run("pod_ingress", newcomer).expect_dropped(Verdict.REDIRECT)


@TCP_AND_UDP
def test_list_without_endpoints_drops_in_silence(world: World, proto: Protocol) -> None:
    """Endpoints exist, but none this policy allows: the client runs into its timeout (P3, P4)."""
    vip = (world.net.vip, 80)
    world.service(*vip, proto, backends=[(world.net.a, 8080)], local_for=Sources.ALL)
    request = world.l4(proto, (world.net.pod, 40000), vip)
    world.run("pod_ingress", request).expect_dropped()
    world.run("node_ingress", request).expect_dropped()
    assert world.drops() == {Drop.NO_LOCAL_ENDPOINT: 2}
    assert not world.entries("flows")


def test_local_policy_sends_each_kind_of_client_to_its_list(world: World) -> None:
    """eTP Local: outsiders get the local endpoint, pods every one (P5, P7)."""
    net = world.net
    frontend, remote, local = (net.node, 30080), (net.b, 8080), (net.a, 8080)
    world.service(*frontend, backends=[remote], local=[local], local_for=Sources.EXTERNAL)
    for program, client, backend in (
        ("node_ingress", net.outside, local),
        ("pod_ingress", net.pod, remote),
        ("node_ingress", net.pod, remote),  # a pod whose packets come by the node's device
        ("pod_ingress", net.outside, remote),  # a pod with an address of its own: the device tells
    ):
        request = world.tcp((client, 40000), frontend)
        world.run(program, request).expect(with_ends(request, dst=backend))
        world.hash("flows").clear()


@pytest.mark.parametrize("masquerade", list(Sources)[1:], ids=lambda s: s.name)
def test_masquerade_mark_follows_the_kind_of_client(world: World, masquerade: Sources) -> None:
    """Each class of clients is masqueraded or not as the frontend says (P6, P7, P8)."""
    net = world.net
    vip, backend = (net.vip, 80), (net.a, 8080)
    world.service(*vip, backends=[backend], masquerade_for=masquerade)
    for program, client, source in (
        ("node_ingress", net.outside, Sources.EXTERNAL),
        ("pod_ingress", net.pod, Sources.POD),
        ("node_ingress", net.pod, Sources.POD),
        ("pod_ingress", net.outside, Sources.POD),
    ):
        mark = MASQUERADED if source & masquerade else 0
        for flags in ("S", "A", "PA"):  # every packet of the flow, not only the first
            request = world.tcp((client, 40000), vip, flags)
            world.run(program, request).expect(with_ends(request, dst=backend), mark=mark)
        world.hash("flows").clear()


def test_masquerade_adds_its_bit_to_the_mark(world: World) -> None:
    """Bits others set stay."""
    vip, backend = (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend], masquerade_for=Sources.ALL)
    request = world.tcp((world.net.outside, 40000), vip)
    world.run("node_ingress", request, mark=0x1).expect(
        with_ends(request, dst=backend), mark=MASQUERADED | 1
    )


def test_source_ranges_let_in_who_is_inside(world: World) -> None:
    """Sources outside are dropped before anything is chosen, pods and outsiders alike (P10)."""
    net = world.net
    vip, backend = (net.vip, 443), (net.a, 8443)
    bits = 32 if world.family is Family.V4 else 128
    world.service(
        *vip,
        backends=[backend],
        source_ranges=[f"{net.outside}/{bits}", world.cluster_cidr],
    )
    for program, client, let_in in (
        ("node_ingress", net.outside, True),
        ("node_ingress", net.outside_too, False),
        ("pod_ingress", net.pod, True),
        ("pod_ingress", net.outside_too, False),
    ):
        request = world.tcp((client, 40000), vip)
        result = world.run(program, request)
        if let_in:
            result.expect(with_ends(request, dst=backend))
        else:
            result.expect_dropped()
    assert world.drops() == {Drop.SOURCE_RANGE: 2}


def test_source_ranges_of_one_frontend_do_not_let_into_another(world: World) -> None:
    """Every filtered frontend has a set of its own (P10)."""
    net = world.net
    bits = 32 if world.family is Family.V4 else 128
    backend = (net.a, 8443)
    world.service(net.vip, 443, backends=[backend], source_ranges=[f"{net.outside}/{bits}"])
    world.service(net.other_vip, 443, backends=[backend], source_ranges=[])
    world.service(net.node, 30443, backends=[backend])
    client, other = (net.outside, 40000), (net.outside, 40001)
    assert world.run("node_ingress", world.tcp(client, (net.vip, 443))).dst == backend
    world.run("node_ingress", world.tcp(client, (net.other_vip, 443))).expect_dropped()
    assert world.run("node_ingress", world.tcp(other, (net.node, 30443))).dst == backend


def test_narrowed_source_ranges_leave_connections_alone(world: World) -> None:
    """The filter is asked when a connection opens, as in kube-proxy's NEW state (P10)."""
    client, vip, backend = (world.net.outside, 40000), (world.net.vip, 443), (world.net.a, 8443)
    service = world.service(*vip, backends=[backend])
    world.run("node_ingress", world.tcp(client, vip))
    service.frontends.clear()
    service.add_frontend(*vip, source_ranges=[])
    data = world.tcp(client, vip, "A")
    world.run("node_ingress", data).expect(with_ends(data, dst=backend))


def test_source_outside_the_ranges_learns_nothing_of_a_service_without_endpoints(
    world: World,
) -> None:
    """The filter comes before the refusal (P10 before P2)."""
    vip = (world.net.vip, 443)
    world.service(*vip, backends=[], flags=FrontendFlag.REJECT, source_ranges=[])
    world.run("node_ingress", world.tcp((world.net.outside, 40000), vip)).expect_dropped()
    assert world.drops() == {Drop.SOURCE_RANGE: 1}
