"""A pod that calls a service and is its own backend."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.ebpf.constants import Drop
from ebpf_svc.model.net import Protocol, Sources
from tests.lib.packet_world import World
from tests.lib.packets import MASQUERADED, Verdict, with_ends

TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


@TCP_AND_UDP
@pytest.mark.parametrize("masquerade", [Sources.NONE, Sources.ALL], ids=["plain", "masquerade"])
def test_pod_that_is_its_own_backend_talks_to_itself_and_back(
    world: World, proto: Protocol, masquerade: Sources
) -> None:
    """There with the hairpin source by the device it came, back from the service (P9)."""
    pod, vip, backend = (world.net.a, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, proto, backends=[backend], masquerade_for=masquerade)
    hairpin = (world.net.hairpin, pod[1])

    request = world.l4(proto, pod, vip)
    arrives = world.run("pod_ingress", request).expect(
        with_ends(request, src=hairpin, dst=backend, turned=True), verdict=Verdict.REDIRECT
    )
    world.run("egress", arrives).expect_untouched()

    answer = world.l4(proto, backend, hairpin)
    arrives = world.run("pod_ingress", answer).expect(
        with_ends(answer, src=vip, dst=pod, turned=True), verdict=Verdict.REDIRECT
    )
    world.run("egress", arrives).expect_untouched()


def test_whole_hairpin_connection(world: World) -> None:
    """From SYN to FIN through both translations."""
    pod, vip, backend = (world.net.a, 40000), (world.net.vip, 80), (world.net.a, 80)
    hairpin = (world.net.hairpin, pod[1])
    service = world.service(*vip, backends=[backend])
    for side, flags in (
        *(("client", "S"), ("backend", "SA"), ("client", "A"), ("client", "PA")),
        *(("backend", "PA"), ("client", "FA"), ("backend", "FA"), ("client", "A")),
    ):
        payload = b"hello" if "P" in flags else b""
        if side == "client":
            packet = world.tcp(pod, vip, flags, payload)
            wanted = with_ends(packet, src=hairpin, dst=backend, turned=True)
        else:
            packet = world.tcp(backend, hairpin, flags, payload)
            wanted = with_ends(packet, src=vip, dst=pod, turned=True)
        world.run("pod_ingress", packet).expect(wanted, verdict=Verdict.REDIRECT)
    service.set_backends([(world.net.b, 80)])
    again = world.tcp(pod, vip)
    world.run("pod_ingress", again).expect(with_ends(again, dst=(world.net.b, 80)))


def test_hairpin_among_several_services_comes_back_from_the_right_one(world: World) -> None:
    """One pod behind two services calls itself through both."""
    backend = (world.net.a, 8080)
    vips = [(world.net.vip, 80), (world.net.other_vip, 80)]
    for vip in vips:
        world.service(*vip, backends=[backend])
    for port, vip in zip((40000, 40001), vips, strict=True):
        world.run("pod_ingress", world.tcp((world.net.a, port), vip))
    for port, vip in zip((40000, 40001), vips, strict=True):
        answer = world.tcp(backend, (world.net.hairpin, port), "SA")
        world.run("pod_ingress", answer).expect(
            with_ends(answer, src=vip, dst=(world.net.a, port), turned=True),
            verdict=Verdict.REDIRECT,
        )


def test_answer_to_nobody_at_the_hairpin_address_is_dropped(world: World) -> None:
    """The hairpin address is ours: what is sent there without a flow must not leave the node."""
    backend = (world.net.a, 8080)
    world.service(world.net.vip, 80, backends=[backend])
    stray = world.tcp(backend, (world.net.hairpin, 40000), "A")
    world.run("pod_ingress", stray).expect_dropped()
    assert world.drops() == {Drop.DISCARDED: 1}


def test_answer_to_the_hairpin_address_of_another_kind_of_flow_is_dropped(world: World) -> None:
    """Masqueraded to itself, a backend answers to the node: its own port proves nothing."""
    backend, node_port = (world.net.a, 8080), (world.net.node, 30080)
    world.service(*node_port, backends=[backend])
    world.run("node_ingress", world.tcp((world.net.a, 40000), node_port))
    stray = world.tcp(backend, (world.net.hairpin, 40000), "SA")
    world.run("pod_ingress", stray).expect_dropped()


def test_packet_from_elsewhere_to_the_hairpin_address_is_none_of_ours(world: World) -> None:
    """Only at a pod's device does the address mean anything: nobody from outside gets in by it."""
    pod, vip, backend = (world.net.a, 40000), (world.net.vip, 80), (world.net.a, 8080)
    world.service(*vip, backends=[backend])
    world.run("pod_ingress", world.tcp(pod, vip))
    answer = world.tcp(backend, (world.net.hairpin, pod[1]), "SA")
    world.run("node_ingress", answer).expect_untouched()


def test_backend_that_calls_itself_from_elsewhere_is_masqueraded(world: World) -> None:
    """Seen at a node's device there is no pod device to turn round at: masquerade it (P9)."""
    backend, node_port = (world.net.a, 8080), (world.net.node, 30080)
    world.service(*node_port, backends=[backend])
    request = world.tcp((world.net.a, 40000), node_port)
    world.run("node_ingress", request).expect(with_ends(request, dst=backend), mark=MASQUERADED)


def test_pod_with_another_backend_is_not_turned_round(world: World) -> None:
    """Hairpin is decided by the backend chosen, not by membership."""
    pod, vip, backend = (world.net.a, 40000), (world.net.vip, 80), (world.net.b, 8080)
    service = world.service(*vip, backends=[backend])
    service.set_backends([backend], draining=[(world.net.a, 8080)])
    request = world.tcp(pod, vip)
    world.run("pod_ingress", request).expect(with_ends(request, dst=backend))
