"""Node ports take numbers, not sockets: nothing listens, and what else uses a number may go on.

client ── router ──┬── node1 ── web1 shell1 sandbox1
                   └── node2 ── web3
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.traffic import ask, serve, stop_serving
from tests.behaviour.conftest import Publish
from tests.lib.manifests import PROTOCOLS, Web
from tests.lib.probing import NODE_PORT_1, NODE_PORT_2, assert_held, table
from tests.lib.world import World


@contextmanager
def on_node(node: Node, port: int) -> Iterator[None]:
    """A process of the node listens on that number, TCP and UDP."""
    serve(node, tcp=[port], udp=[port], name="host process")
    try:
        yield
    finally:
        stop_serving(node, tcp=[port], udp=[port])


def listening(node: Node, port: int) -> str:
    """Sockets of a node that listen on a number."""
    return node.run(["ss", "-Hltun", "sport", "=", f":{port}"])


def test_one_number_serves_both_protocols_without_a_socket(world: World, publish: Publish) -> None:
    """TCP and UDP on one node port, and `ss` shows nothing there, before, during or after (P15)."""
    web = publish([world.web1, world.web3])
    for node in world.cluster.nodes:
        assert listening(node, web.node_port) == ""
    rows = table(world, web, askers=world.askers, kinds=[NODE_PORT_1, NODE_PORT_2], count=2)
    assert_held(rows)
    world.withdraw(web)
    for node in world.cluster.nodes:
        assert listening(node, web.node_port) == ""
        for protocol in PROTOCOLS:
            address = node.address(Family.V4)
            (answer,) = ask(world.cluster.client, address, web.node_port, protocol)
            assert answer.outcome.value == "refused"


def test_process_on_the_number_of_a_node_port_gives_way(world: World, publish: Publish) -> None:
    """Who listens before the service comes is not asked while it is there, and is again afterwards.

    The agent has no reason to complain: it wants no socket.
    """
    node1, client = world.cluster.nodes[0], world.cluster.client
    web: Web = publish([])
    world.withdraw(web)
    said = len(world.agents[0].log_path.read_text())
    with on_node(node1, web.node_port):
        rows = table(world, web, askers=[client], kinds=[NODE_PORT_1])
        assert_held(rows, lambda row: row.servers == {"host process"})
        world.publish(web, [world.web1, world.web3])
        askers = (client, world.shell1, world.sandbox1)
        rows = table(world, web, askers=askers, kinds=[NODE_PORT_1], count=3)
        assert_held(rows, lambda row: row.ok and row.servers <= {"web1", "web3"})
        world.withdraw(web)
        rows = table(world, web, askers=[client], kinds=[NODE_PORT_1])
        assert_held(rows, lambda row: row.servers == {"host process"})
    assert complaints(world.agents[0].log_path.read_text()[said:]) == []


def complaints(log: str) -> list[str]:
    """Lines above the level of information."""
    lines = [line for line in log.splitlines() if line.strip()]
    return [line for line in lines if _level(line) in ("warning", "error", "critical")]


def _level(line: str) -> str:
    try:
        return str(json.loads(line).get("level", "")).lower()
    except ValueError:
        words = line.lower().split()
        return next((word for word in words if word in ("warning", "error")), "")


def _answers_come_back(
    world: World, web: Web, protocol: Protocol, askers: Sequence[Host], *, connected: bool = True
) -> None:
    """Ask pods, nodes and the outside from the number of a node port."""
    port = 9_100
    node2 = world.cluster.nodes[1]
    servers = (world.web1, world.web3, node2, world.cluster.client)
    options = {"source_port": web.node_port, "connected": connected, "timeout_s": 5.0}
    for host in servers:
        serve(host, tcp=[port], udp=[port])
    try:
        for asker, host, family in product(askers, servers, Family):
            place = host.address(family), port, protocol
            (answer,) = ask(asker, *place, **options)
            assert answer.server == host.name, (asker, host, answer)
        for family in Family:
            # A service's own answers to that number.
            place = web.cluster.of(family), 80, protocol
            (answer,) = ask(askers[0], *place, **options)
            assert answer.ok, answer
    finally:
        for host in servers:
            stop_serving(host, tcp=[port], udp=[port])


def test_connection_from_the_number_of_a_node_port_gets_its_answers(
    world: World, publish: Publish
) -> None:
    """What goes out from a number that is a node port comes back to its socket (B9)."""
    askers = (world.cluster.nodes[0], world.sandbox1, world.shell1)
    _answers_come_back(world, publish([world.web1, world.web3]), Protocol.TCP, askers)


def test_datagrams_from_the_number_of_a_node_port_get_their_answers(
    world: World, publish: Publish
) -> None:
    """The same for a node's connected UDP socket, such as a resolver's (B9)."""
    askers = [world.cluster.nodes[0]]
    _answers_come_back(world, publish([world.web1, world.web3]), Protocol.UDP, askers)


def test_datagrams_of_an_unconnected_socket_get_their_answers(
    world: World, publish: Publish
) -> None:
    """The same for one that names whom it asks with each datagram (B9).

    Strangers' requests still come in, and are served.
    """
    web = publish([world.web1, world.web3])
    node1, client = world.cluster.nodes[0], world.cluster.client
    with on_node(node1, web.node_port):
        rows = table(world, web, askers=[client], kinds=[NODE_PORT_1], count=3)
        assert_held(rows, lambda row: row.ok and row.servers <= {"web1", "web3"})
    _answers_come_back(world, web, Protocol.UDP, [node1], connected=False)
    local = publish([world.web1, world.web3], external_local=True)
    _answers_come_back(world, local, Protocol.UDP, [node1], connected=False)
    rows = table(world, web, askers=[client], kinds=[NODE_PORT_1], count=3)
    assert_held(rows, lambda row: row.ok and row.servers <= {"web1", "web3"})
