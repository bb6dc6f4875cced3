"""Clients that stay with their backend (sessionAffinity: ClientIP)."""

from __future__ import annotations

import pytest

from ebpf_svc.model.net import Protocol, Sources
from tests.lib.packet_world import World
from tests.lib.packets import Address, with_ends

TIMEOUT_S = 600
TCP_AND_UDP = pytest.mark.parametrize("proto", [Protocol.TCP, Protocol.UDP], ids=str)


def _ports(world: World) -> list[Address]:
    return [(world.net.a, port) for port in range(8000, 8020)]


@TCP_AND_UDP
def test_client_keeps_its_backend_from_port_to_port(world: World, proto: Protocol) -> None:
    """Every connection of a client goes where its first went (P13)."""
    vip = (world.net.vip, 80)
    world.service(*vip, proto, backends=_ports(world), affinity_s=TIMEOUT_S)
    chosen = {
        world.run("pod_ingress", world.l4(proto, (world.net.pod, port), vip)).dst
        for port in range(40000, 40020)
    }
    assert len(chosen) == 1


def test_client_keeps_its_backend_across_the_addresses_of_a_service(world: World) -> None:
    """Affinity is the service port's, not the frontend's (P13)."""
    frontends = [(world.net.vip, 80), (world.net.node, 30080), (world.net.other_vip, 80)]
    service = world.service(*frontends[0], backends=_ports(world), affinity_s=TIMEOUT_S)
    for frontend in frontends[1:]:
        service.add_frontend(*frontend)
    chosen = {
        world.run("pod_ingress", world.tcp((world.net.pod, 40000 + i), frontend)).dst
        for i, frontend in enumerate(frontends * 5)
    }
    assert len(chosen) == 1


def test_clients_are_kept_apart(world: World) -> None:
    """Another client and another service port have choices of their own (P13)."""
    net = world.net
    for port in (80, 81):
        world.service(net.vip, port, backends=_ports(world), affinity_s=TIMEOUT_S)
    for client in (net.pod, net.outside):
        for port in (80, 81):
            world.run("pod_ingress", world.tcp((client, 40000), (net.vip, port)))
    keys = {(key.client, key.service, key.by_netns) for key, _ in world.entries("affinity")}
    assert len(keys) == 4
    assert {netns for _, _, netns in keys} == {0}


def test_affinity_ends_after_its_time_without_a_connection(world: World) -> None:
    """A client that was away longer than the timeout chooses anew (P13)."""
    client, vip = world.net.pod, (world.net.vip, 80)
    service = world.service(*vip, backends=[(world.net.a, 1)], affinity_s=TIMEOUT_S)
    assert world.run("pod_ingress", world.tcp((client, 40000), vip)).dst == (world.net.a, 1)
    service.set_backends([(world.net.a, 1), *_ports(world)])
    world.age("affinity", TIMEOUT_S - 5)
    assert world.run("pod_ingress", world.tcp((client, 40001), vip)).dst == (world.net.a, 1)
    chosen = set()
    for port in range(40002, 40012):
        world.age("affinity", TIMEOUT_S + 5)
        chosen.add(world.run("pod_ingress", world.tcp((client, port), vip)).dst)
    assert len(chosen) > 1


def test_client_another_cpu_saw_a_moment_later_is_not_forgotten(world: World) -> None:
    """Who read the clock before the second passed finds a client seen in the next one (P13)."""
    vip = (world.net.vip, 80)
    world.service(*vip, backends=_ports(world), affinity_s=TIMEOUT_S)
    chosen = set()
    for port in range(40000, 40010):
        chosen.add(world.run("pod_ingress", world.tcp((world.net.pod, port), vip)).dst)
        world.age("affinity", -2)
    assert len(chosen) == 1


def test_every_new_connection_renews_affinity(world: World) -> None:
    """The timeout slides (P13)."""
    client, vip = world.net.pod, (world.net.vip, 80)
    service = world.service(*vip, backends=[(world.net.a, 1)], affinity_s=TIMEOUT_S)
    world.run("pod_ingress", world.tcp((client, 40000), vip))
    service.set_backends([(world.net.a, 1), *_ports(world)])
    for port in range(40001, 40010):
        world.age("affinity", TIMEOUT_S * 2 // 3)
        assert world.run("pod_ingress", world.tcp((client, port), vip)).dst == (world.net.a, 1)


def test_backend_that_left_the_list_holds_nobody(world: World) -> None:
    """A client whose backend drains or is gone chooses among those that are there (B10)."""
    client, vip = world.net.pod, (world.net.vip, 80)
    gone, there = (world.net.a, 1), (world.net.b, 2)
    for draining in ([], [gone]):
        service = world.service(*vip, backends=[gone], affinity_s=TIMEOUT_S)
        assert world.run("pod_ingress", world.tcp((client, 40000), vip)).dst == gone
        service.set_backends([there], draining=draining)
        assert world.run("pod_ingress", world.tcp((client, 40001), vip)).dst == there
        service.set_backends([gone, there])
        assert world.run("pod_ingress", world.tcp((client, 40002), vip)).dst == there
        world.reset()


def test_affinity_to_a_remote_backend_does_not_leave_the_local_list(world: World) -> None:
    """What a pod chose among all endpoints means nothing where only local ones serve (B10)."""
    net = world.net
    client, frontend = net.outside, (net.node, 30080)
    remote, local = (net.b, 8080), (net.a, 8080)
    world.service(
        *frontend,
        backends=[remote],
        local=[local],
        local_for=Sources.EXTERNAL,
        affinity_s=TIMEOUT_S,
    )
    assert world.run("pod_ingress", world.tcp((client, 40000), frontend)).dst == remote
    assert world.run("node_ingress", world.tcp((client, 40001), frontend)).dst == local


def test_service_without_affinity_remembers_nobody(world: World) -> None:
    """No entry is written for services that do not ask."""
    vip = (world.net.vip, 80)
    world.service(*vip, backends=_ports(world))
    world.run("pod_ingress", world.tcp((world.net.pod, 40000), vip))
    assert not world.entries("affinity")


def test_client_on_maglev_keeps_its_backend_even_forgotten(world: World) -> None:
    """With affinity the hash leaves the port out: a node that never saw the client agrees."""
    client, frontend = world.net.outside, (world.net.node, 30080)
    world.service(*frontend, backends=_ports(world), affinity_s=TIMEOUT_S, maglev_size=251)
    chosen = set()
    for port in range(40000, 40010):
        chosen.add(world.run("node_ingress", world.tcp((client, port), frontend)).dst)
        world.hash("affinity").clear()
    assert len(chosen) == 1


def test_datagram_from_a_port_in_use_keeps_to_the_clients_backend(world: World) -> None:
    """Another address of the service, the same client port: affinity goes before telling apart."""
    client, vip, node_port = (world.net.pod, 5353), (world.net.vip, 53), (world.net.node, 30053)
    for _ in range(10):
        service = world.service(*vip, Protocol.UDP, backends=_ports(world), affinity_s=TIMEOUT_S)
        service.add_frontend(*node_port)
        first = world.run("pod_ingress", world.udp(client, vip)).dst
        second = world.run("pod_ingress", world.udp(client, node_port))
        assert first == second.dst
        answer = world.udp(second.dst, second.src)
        world.run("egress", answer).expect(with_ends(answer, src=node_port, dst=client))
        world.reset()
