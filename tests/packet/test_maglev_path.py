"""Choosing by the client's hash: every node chooses alike."""

from __future__ import annotations

from collections import Counter

from ebpf_svc.dataplane.ebpf import maglev
from tests.lib.packet_world import World
from tests.lib.packets import Address

SIZE = 1021


def _choices(world: World, frontend: Address, clients: int) -> dict[int, Address]:
    packet = world.tcp((world.net.outside, 0), frontend)
    return world.choices("node_ingress", packet, range(1024, 1024 + clients))


def test_client_gets_one_backend_whichever_node_it_asks(world: World) -> None:
    """The hash knows the client and the service port, not the node's address."""
    nodes = [(world.net.node, 30080), (world.net.node_too, 30080)]
    backends = [(world.net.a, port) for port in range(8000, 8010)]
    service = world.service(*nodes[0], backends=backends, maglev_size=SIZE)
    service.add_frontend(*nodes[1], flags=service.frontends[0].flags)
    first = _choices(world, nodes[0], 200)
    world.hash("flows").clear()
    assert _choices(world, nodes[1], 200) == first
    assert len(set(first.values())) == len(backends)


def test_clients_spread_evenly_over_the_backends(world: World) -> None:
    """No backend gets more than its share by more than chance allows (five sigma)."""
    frontend = (world.net.node, 30080)
    backends = [(world.net.a, port) for port in range(8000, 8010)]
    world.service(*frontend, backends=backends, maglev_size=SIZE)
    clients = 4000
    count = Counter(_choices(world, frontend, clients).values())
    sigma = (clients * 0.1 * 0.9) ** 0.5
    assert set(count) == set(backends)
    assert all(abs(n - clients / 10) < 5 * sigma for n in count.values()), count


def test_client_moves_only_when_its_slot_does(world: World) -> None:
    """Removing a backend moves its clients and, by Maglev's law, few others."""
    frontend = (world.net.node, 30080)
    backends = [(world.net.a, port) for port in range(8000, 8010)]
    service = world.service(*frontend, backends=backends, maglev_size=SIZE)
    before = _choices(world, frontend, 2000)
    world.hash("flows").clear()
    service.set_backends(backends[1:], maglev_size=SIZE)
    after = _choices(world, frontend, 2000)
    stayed = [client for client, backend in before.items() if backend != backends[0]]
    moved = sum(before[client] != after[client] for client in stayed)
    names = [f"{address}:{port}" for address, port in backends]
    old, new = maglev.table(names, SIZE, "seed"), maglev.table(names[1:], SIZE, "seed")
    slots_moved = sum(o > 0 and o - 1 != n for o, n in zip(old, new, strict=True))
    assert moved / len(stayed) < 2 * slots_moved / SIZE + 0.02
