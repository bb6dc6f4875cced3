"""sessionAffinity: ClientIP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest

from ebpf_svc.model.net import Protocol
from ebpf_svc.testbed.host import Pod
from tests.behaviour.conftest import Publish
from tests.lib.manifests import Endpoint, Web
from tests.lib.probing import (
    BALANCER,
    CLUSTER_IP,
    EXTERNAL_IP,
    KINDS,
    LOCALHOST,
    NODE_PORT_1,
    NODE_PORT_2,
    Row,
    assert_held,
    table,
)
from tests.lib.waiting import wait_out
from tests.lib.world import World

TIMEOUT_S = 2
TICK_S = 1.1
"""The dataplane counts whole seconds: a timeout may last one longer."""


def _by_client(rows: Iterable[Row]) -> dict[tuple[str, int, str], set[str]]:
    """Servers each client reached, a client being told apart as affinity does (P13)."""

    def key(row: Row) -> tuple[str, int, str]:
        return row.asker.name, int(row.family), row.target.protocol.value

    ordered = sorted(rows, key=key)
    return {
        one: {server for row in group for server in row.servers}
        for one, group in groupby(ordered, key)
    }


def _ask(world: World, web: Web, count: int = 1) -> dict[tuple[str, int, str], set[str]]:
    rows = table(world, web, askers=world.askers, kinds=[CLUSTER_IP], count=count)
    assert_held(rows)
    return _by_client(rows)


@pytest.mark.smoke
def test_client_keeps_its_pod(world: World, publish: Publish) -> None:
    """A client keeps its pod, whichever address of the service it calls (P13)."""
    web = publish(affinity_s=60)
    (node1, node2), client = world.cluster.nodes, world.cluster.client
    # Addresses that node1 translates: affinity is a node's own knowledge.
    kinds = (CLUSTER_IP, NODE_PORT_1, EXTERNAL_IP, BALANCER)
    askers = (world.shell1, world.sandbox1, client)
    # So that addresses which go round by themselves do not go round in step.
    assert_held(table(world, web, askers=[node2], kinds=[NODE_PORT_1]))
    first = _by_client(table(world, web, askers=(*askers, node1), kinds=[CLUSTER_IP]))
    # One address after the other: a client that calls two at once may use one port for both, and
    # two such connections never share a backend (docs/decisions/0002-one-flow-entry.md).
    rows = [
        row for kind in kinds for row in table(world, web, askers=askers, kinds=[kind], count=6)
    ]
    # To who translates late, 127.0.0.1 is a client of its own.
    loopback = () if world.translates_host_packets else (LOCALHOST,)
    rows += table(world, web, askers=[node1], kinds=(*kinds, *loopback), count=6)
    assert_held(rows)
    assert _by_client(rows) == first


def test_clients_spread_over_the_pods(world: World, publish: Publish) -> None:
    """Affinity holds clients, not the service: different clients get different pods."""
    web = publish(affinity_s=60)
    chosen = _ask(world, web, count=3)
    assert all(len(servers) == 1 for servers in chosen.values())
    assert {server for servers in chosen.values() for server in servers} == {
        "web1",
        "web2",
        "web3",
    }


@dataclass(frozen=True)
class PartedWeb(Web):
    """A service whose UDP port is served by its last endpoint, and its TCP port by the others."""

    def manifests(self, endpoints: Sequence[Endpoint | Pod]) -> list[dict[str, Any]]:
        service, *whole = super().manifests(endpoints)
        parts = []
        for number, one in enumerate((*whole, *whole)):
            is_udp = number >= len(whole)
            protocol = Protocol.UDP if is_udp else Protocol.TCP
            parts.append({
                **one,
                "metadata": {**one["metadata"], "name": f"{self.name}-{number}"},
                "ports": [port for port in one["ports"] if port["protocol"] == protocol.value],
                "endpoints": one["endpoints"][-1:] if is_udp else one["endpoints"][:-1],
            })  # fmt: skip
        return [service, *parts]


def test_service_ports_remember_clients_each_for_itself(world: World) -> None:
    """What a client has on one port neither decides nor ends what it has on another (P13)."""
    web = PartedWeb(world.new_web().number, affinity_s=60)
    world.publish(web, world.webs)
    try:
        first = _ask(world, web)
        for _ in range(4):
            assert _ask(world, web, count=2) == first
        for (_, _, protocol), servers in first.items():
            assert servers <= ({"web3"} if protocol == "UDP" else {"web1", "web2"})
    finally:
        world.withdraw(web)


def test_each_request_renews_affinity_and_silence_ends_it(world: World, publish: Publish) -> None:
    """The timeout slides; once it has passed without a request the client may be moved (P13)."""
    web = publish(affinity_s=TIMEOUT_S)
    first = _ask(world, web)
    for _ in range(4):
        wait_out(TIMEOUT_S * 0.4)
        assert _ask(world, web) == first
    wait_out(TIMEOUT_S + TICK_S)
    # Two dozen clients choose anew: that all choose as before has a chance of 3^-24.
    assert _ask(world, web) != first


def test_affinity_to_a_pod_that_left_ends(world: World, publish: Publish) -> None:
    """A client whose pod left the service is moved once and then kept (B10)."""
    web = publish([world.web1, world.web3], affinity_s=60)
    _ask(world, web)
    world.publish(web, [world.web2, world.web3])
    moved = _ask(world, web, count=3)
    assert all(len(servers) == 1 for servers in moved.values())
    assert {server for servers in moved.values() for server in servers} <= {"web2", "web3"}
    assert _ask(world, web) == moved


def test_affinity_to_a_pod_that_terminates_ends_at_the_next_connection(
    world: World, publish: Publish
) -> None:
    """A pod on its way out serves what is open; affinity brings it no new connection (P13, T2)."""
    web = publish([world.web1, world.web3], affinity_s=60)
    assert {server for servers in _ask(world, web).values() for server in servers} == {
        "web1",
        "web3",
    }
    leaving = Endpoint(world.web1, ready=False, serving=True, terminating=True)
    world.publish(web, [leaving, world.web3])
    assert set().union(*_ask(world, web, count=2).values()) == {"web3"}


def test_client_keeps_its_pod_through_either_node(
    world: World, publish: Publish, programs: None
) -> None:
    """Maglev and affinity: a node knows nothing of another's clients, and finds the same pod."""
    client = world.cluster.client
    for _ in range(4):
        web = publish(affinity_s=60)
        rows = table(world, web, askers=[client], kinds=[NODE_PORT_1, NODE_PORT_2], count=4)
        assert_held(rows)
        # Whatever port it comes from: the address alone is looked at.
        assert all(len(servers) == 1 for servers in _by_client(rows).values())


def test_affinity_survives_a_restart_of_the_agent(world: World, publish: Publish) -> None:
    """What the kernel remembers does not hang on the agent's life."""
    web = publish(affinity_s=60)
    first = _ask(world, web)
    for agent in world.agents:
        agent.kill()
    for agent in world.agents:
        agent.start(wait=False)
    for agent in world.agents:
        agent.wait_ready()
    assert _ask(world, web) == first


def test_turning_affinity_off_acts_on_new_connections(world: World, publish: Publish) -> None:
    """A service changed to no affinity spreads its clients again (P13)."""
    web = publish(affinity_s=60)
    _ask(world, web)
    plain = Web(web.number)
    world.publish(plain, world.webs)
    rows = table(world, plain, askers=[world.shell1, world.sandbox1], kinds=KINDS[:1], count=15)
    assert_held(rows, lambda row: row.ok and len(row.servers) > 1)
