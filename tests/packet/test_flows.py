"""What becomes of a flow while the lists of endpoints change under it."""

from __future__ import annotations

import pytest
from scapy.all import SCTPChunkAbort, SCTPChunkData, SCTPChunkInitAck, SCTPChunkShutdown

from ebpf_svc.dataplane.ebpf.constants import SYN_IDLE_S, UDP_IDLE_S
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.model.net import Protocol
from tests.lib.packet_world import World
from tests.lib.packets import with_ends


def test_sctp_association_outlives_its_endpoint_in_the_list(world: World) -> None:
    """Only UDP flows are moved (C4): an SCTP association cannot change its peer."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 9)
    a, b = (world.net.a, 9), (world.net.b, 9)
    service = world.service(*vip, Protocol.SCTP, backends=[a])
    world.run("pod_ingress", world.sctp(client, vip))
    world.run("egress", world.sctp(a, client, SCTPChunkInitAck))
    service.set_backends([b])
    world.age("flows", 86_400)
    assert world.run("pod_ingress", world.sctp(client, vip, SCTPChunkData)).dst == a


def test_sctp_association_opened_anew_goes_where_endpoints_are(world: World) -> None:
    """SCTP clients keep their port: the next association must not follow the last to a dead end."""
    client, vip = (world.net.pod, 9), (world.net.vip, 9)
    a, b = (world.net.a, 9), (world.net.b, 9)
    for end in (None, SCTPChunkShutdown, SCTPChunkAbort):
        service = world.service(*vip, Protocol.SCTP, backends=[a])
        world.run("pod_ingress", world.sctp(client, vip))
        world.run("egress", world.sctp(a, client, SCTPChunkInitAck))
        if end is not None:
            world.run("egress", world.sctp(a, client, end))
        service.set_backends([b], draining=[] if end is None else [a])
        assert world.run("pod_ingress", world.sctp(client, vip)).dst == b
        world.reset()


def test_sctp_association_made_elsewhere_is_left_alone(world: World) -> None:
    """What did not open here was translated by another proxy, as with TCP."""
    vip = (world.net.vip, 9)
    world.service(*vip, Protocol.SCTP, backends=[(world.net.a, 9)])
    data = world.sctp((world.net.pod, 9), vip, SCTPChunkData)
    world.run("pod_ingress", data).expect_untouched()


def test_connection_that_ends_is_forgotten_at_the_next_syn(world: World) -> None:
    """A client may use its port again at once: the new connection is free to go elsewhere."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 80)
    a, b = (world.net.a, 8080), (world.net.b, 8080)
    for side, flags in (("client", "FA"), ("client", "R"), ("backend", "FA"), ("backend", "RA")):
        service = world.service(*vip, backends=[a])
        world.run("pod_ingress", world.tcp(client, vip, "S"))
        world.run("egress", world.tcp(a, client, "SA"))
        if side == "client":
            world.run("pod_ingress", world.tcp(client, vip, flags))
        else:
            world.run("egress", world.tcp(a, client, flags))
        service.set_backends([b])
        assert world.run("pod_ingress", world.tcp(client, vip, "A")).dst == a
        assert world.run("pod_ingress", world.tcp(client, vip, "S")).dst == b
        assert world.run("pod_ingress", world.tcp(client, vip, "A")).dst == b
        world.reset()


def test_repeated_syn_keeps_its_backend_while_that_serves(world: World) -> None:
    """A retransmitted SYN is the same connection; to a dead backend it would never be one."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 80)
    a, b = (world.net.a, 8080), (world.net.b, 8080)
    service = world.service(*vip, backends=[a])
    syn = world.tcp(client, vip, "S")
    world.run("pod_ingress", syn)
    service.set_backends([b], draining=[a])
    assert world.run("pod_ingress", syn).dst == a
    service.set_backends([b])
    assert world.run("pod_ingress", syn).dst == b


def test_half_open_connection_is_forgotten_in_time(world: World) -> None:
    """A SYN nobody answered holds its backend for a minute, not for ever."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 80)
    a, b = (world.net.a, 8080), (world.net.b, 8080)
    service = world.service(*vip, backends=[a])
    syn = world.tcp(client, vip, "S")
    world.run("pod_ingress", syn)
    service.set_backends([b], draining=[a])
    world.age("flows", SYN_IDLE_S - 2)
    assert world.run("pod_ingress", syn).dst == a
    world.age("flows", SYN_IDLE_S + 2)
    assert world.run("pod_ingress", syn).dst == b


def test_established_tcp_stays_with_its_backend_whatever_happens_to_it(world: World) -> None:
    """Removing an endpoint neither moves nor breaks a connection (P12)."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 80)
    a, b = (world.net.a, 8080), (world.net.b, 8080)
    service = world.service(*vip, backends=[a])
    world.run("pod_ingress", world.tcp(client, vip, "S"))
    world.run("egress", world.tcp(a, client, "SA"))
    data = world.tcp(client, vip, "PA", payload=b"GET /")
    for backends in ([a, b], [b], []):
        service.set_backends(backends)
        world.run("pod_ingress", data).expect(with_ends(data, dst=a))
    world.age("flows", 86_400)
    world.run("pod_ingress", data).expect(with_ends(data, dst=a))


def test_udp_flow_stays_while_its_backend_serves(world: World) -> None:
    """A flow to an endpoint that still serves outlives any change of the lists (C5)."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    a, b = (world.net.a, 53), (world.net.b, 53)
    service = world.service(*vip, Protocol.UDP, backends=[a])
    question = world.udp(client, vip)
    world.run("pod_ingress", question)
    service.set_backends([b], draining=[a])
    world.run("pod_ingress", question).expect(with_ends(question, dst=a))


def test_udp_flow_moves_on_when_its_backend_stops_serving(world: World) -> None:
    """The very next datagram goes to a backend that is there (C5, C7)."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    a, b = (world.net.a, 53), (world.net.b, 53)
    service = world.service(*vip, Protocol.UDP, backends=[a])
    question = world.udp(client, vip)
    world.run("pod_ingress", question)
    service.set_backends([b])
    world.run("pod_ingress", question).expect(with_ends(question, dst=b))
    answer = world.udp(b, client)
    world.run("egress", answer).expect(with_ends(answer, src=vip))


def test_idle_udp_flow_picks_anew(world: World) -> None:
    """A flow unused for two minutes is over, as netfilter would have it."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    a, b = (world.net.a, 53), (world.net.b, 53)
    service = world.service(*vip, Protocol.UDP, backends=[a])
    question = world.udp(client, vip)
    world.run("pod_ingress", question)
    service.set_backends([b], draining=[a])
    world.age("flows", UDP_IDLE_S - 2)
    assert world.run("pod_ingress", question).dst == a
    world.age("flows", UDP_IDLE_S + 2)
    assert world.run("pod_ingress", question).dst == b


@pytest.mark.parametrize("flags", ["A", "PA", "SA", "FA", "R", "RA"])
def test_mid_stream_tcp_without_a_flow_passes(world: World, flags: str) -> None:
    """A connection made under another proxy before the switch is left to it."""
    vip = (world.net.vip, 80)
    world.service(*vip, backends=[(world.net.a, 8080)])
    world.run("pod_ingress", world.tcp((world.net.pod, 40000), vip, flags)).expect_untouched()
    assert not world.entries("flows")


def test_deleted_service_keeps_its_connections_and_gets_no_new_ones(world: World) -> None:
    """TCP lives on when its Service is deleted; to newcomers the address means nothing (P12)."""
    client, vip, backend = (world.net.pod, 40000), (world.net.vip, 80), (world.net.a, 8080)
    service = world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(client, vip, "S"))
    service.drain()
    data = world.tcp(client, vip, "PA", payload=b"more")
    world.run("pod_ingress", data).expect(with_ends(data, dst=backend))
    answer = world.tcp(backend, client, "A")
    world.run("egress", answer).expect(with_ends(answer, src=vip))
    newcomer = world.tcp((world.net.pod, 40001), vip, "S")
    world.run("pod_ingress", newcomer).expect_untouched()


def test_deleted_udp_service_gets_nothing_any_more(world: World) -> None:
    """Its endpoints are gone from the plan, and with them its flows (C5)."""
    vip = (world.net.vip, 53)
    service = world.service(*vip, Protocol.UDP, backends=[(world.net.a, 53)])
    question = world.udp((world.net.pod, 40000), vip)
    world.run("pod_ingress", question)
    service.drain()
    world.run("pod_ingress", question).expect_untouched()


def test_requests_keep_a_udp_flow_alive(world: World) -> None:
    """A stream nobody answers, as of statsd or syslog, stays with its backend."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    a, b = (world.net.a, 53), (world.net.b, 53)
    service = world.service(*vip, Protocol.UDP, backends=[a])
    datagram = world.udp(client, vip)
    world.run("pod_ingress", datagram)
    service.set_backends([b], draining=[a])
    for _ in range(3):
        world.age("flows", UDP_IDLE_S - 2)
        assert world.run("pod_ingress", datagram).dst == a


@pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)
def test_flow_another_cpu_saw_a_moment_later_is_not_over(world: World, proto: Protocol) -> None:
    """Who read the clock before the second passed finds a flow seen in the next one (C5)."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    a, b = (world.net.a, 53), (world.net.b, 53)
    service = world.service(*vip, proto, backends=[a])
    request, answer = world.l4(proto, client, vip), world.l4(proto, a, client)
    world.run("pod_ingress", request)
    service.set_backends([b], draining=[a])
    for program, packet, wanted in (
        ("pod_ingress", request, with_ends(request, dst=a)),
        ("egress", answer, with_ends(answer, src=vip)),
    ):
        world.age("flows", -2)
        world.run(program, packet).expect(wanted)


def test_udp_flow_does_not_follow_its_backends_id_to_another_owner(world: World) -> None:
    """An id given out again brings no flows to its next endpoint or service port."""
    client, vip = (world.net.pod, 40000), (world.net.vip, 53)
    a, b = (world.net.a, 53), (world.net.b, 53)
    for owner in ({"service": 99}, {"at_port": wire_port(54)}):
        service = world.service(*vip, Protocol.UDP, backends=[a])
        datagram = world.udp(client, vip)
        assert world.run("pod_ingress", datagram).dst == a
        service.set_backends([b], draining=[a])
        world.change_backend(1, **owner)
        assert world.run("pod_ingress", datagram).dst == b
        world.reset()
