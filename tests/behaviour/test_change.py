"""What happens to traffic while endpoints and agents come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.traffic import (
    Account,
    Answer,
    Connection,
    Load,
    Target,
    ask,
    connection,
    load,
)
from tests.behaviour.conftest import Publish
from tests.behaviour.gaps import reason_of
from tests.lib import netfilter
from tests.lib.kernel import running_kernel
from tests.lib.manifests import PROTOCOLS, Endpoint, Web
from tests.lib.probing import every_pod_network
from tests.lib.variants import Variant
from tests.lib.waiting import eventually
from tests.lib.world import World

DESTROYED = ("ECONNABORTED", "EDESTADDRREQ")
"""What a program hears on a UDP socket that was destroyed: when it waits, when it sends."""


def _targets(world: World, web: Web, asker: Host, protocols: Sequence[Protocol]) -> list[Target]:
    """Both families, at the addresses that kind of client uses.

    Where netfilter carries, each request has a port of its own. The kernel would choose some twice,
    and two things that tests of their own are about would happen by chance: IPVS takes flows of one
    port that meet at a pod for one, and a datagram from the port of an earlier flow still goes to a
    pod that drains.
    """
    node1, node2 = world.cluster.nodes
    options = {"own_port": world.mode in netfilter.MODES}
    return [
        target
        for family in Family
        for protocol in protocols
        for target in (
            [web.at_node(node, family, protocol, **options) for node in (node1, node2)]
            if asker is world.cluster.client
            else [
                web.at_cluster_ip(family, protocol, **options),
                web.at_external_ip(family, protocol, **options),
            ]
        )
    ]


@contextmanager
def _loads(
    world: World, web: Web, protocols: Sequence[Protocol] = PROTOCOLS
) -> Iterator[dict[str, Load]]:
    """Everyone keeps asking during the block; every answer is counted."""
    askers = (world.shell1, world.sandbox1, world.cluster.nodes[0], world.cluster.client)
    with ExitStack() as stack:
        yield {
            asker.name: stack.enter_context(load(asker, _targets(world, web, asker, protocols)))
            for asker in askers
        }


def _served(running: dict[str, Load], count: int) -> None:
    """Wait until every load has had that many answers since its last reset."""
    eventually(
        lambda: {name: one.read().ok for name, one in running.items()},
        until=lambda served: all(ok >= count for ok in served.values()),
        within_s=15,
    )


def _settled(running: dict[str, Load]) -> dict[str, Account]:
    """Wait until all requests have ended that are under way; returns the accounts until now."""
    counted = {name: one.read(reset=True) for name, one in running.items()}
    eventually(
        lambda: {name: one.read().least for name, one in running.items()},
        until=lambda least: all(least.values()),
        within_s=15,
    )
    return counted


def _assert_none_failed(*phases: dict[str, Account]) -> None:
    """No request of any phase failed; those that did are told whole."""
    __tracebackhide__ = True
    lost = [
        (name, account.failed, account.failures)
        for phase in phases
        for name, account in phase.items()
        if account.failed
    ]
    assert not lost, lost


@every_pod_network
def test_backends_change_under_load_without_a_failed_request(
    world: World, publish: Publish
) -> None:
    """A pod joins, another drains and leaves: no request is lost, the new serves, the old rests."""
    web = publish([world.web1, world.web2])
    with _loads(world, web) as running:
        _served(running, 40)
        world.publish(web, world.webs)
        _served(running, 80)
        leaving = Endpoint(world.web1, ready=False, serving=True, terminating=True)
        world.publish(web, [leaving, world.web2, world.web3])
        before = _settled(running)
        _served(running, 20)
        world.publish(web, [world.web2, world.web3])
        drained = _settled(running)
        between = {name: one.read(reset=True) for name, one in running.items()}
        _served(running, 40)
    after = {name: one.stop() for name, one in running.items()}
    _assert_none_failed(before, drained, between, after)
    assert all("web3" in account.servers for account in before.values())
    assert all(set(account.servers) == {"web2", "web3"} for account in after.values())


@every_pod_network
def test_pod_leaves_at_once_under_load_without_a_failed_request(
    world: World, publish: Publish, variant: Variant
) -> None:
    """A pod is gone without having drained: what it was asked it answers, and it is asked no more.

    Over UDP where answers under way arrive; those modes that lose them have a row of that.
    """
    late = ["test_answer_under_way_when_its_pod_leaves_arrives"]
    loses = reason_of(variant.name, variant.mode, late, running_kernel())
    web = publish()
    with _loads(world, web, [Protocol.TCP] if loses else PROTOCOLS) as running:
        _served(running, 40)
        world.publish(web, [world.web2, world.web3])
        before = _settled(running)
        between = {name: one.read(reset=True) for name, one in running.items()}
        _served(running, 40)
    after = {name: one.stop() for name, one in running.items()}
    _assert_none_failed(before, between, after)
    assert all("web1" in account.servers for account in before.values())
    assert all(set(account.servers) == {"web2", "web3"} for account in after.values())


def test_agent_killed_and_restarted_under_load_without_a_failed_request(
    world: World, publish: Publish
) -> None:
    """Traffic does not need the agent: neither its death nor its return costs a request (Z2)."""
    web = publish()
    with _loads(world, web) as running:
        _served(running, 40)
        for agent in world.agents:
            agent.kill()
        dead = {name: one.read(reset=True) for name, one in running.items()}
        _served(running, 40)
        for agent in world.agents:
            agent.start(wait=False)
        for agent in world.agents:
            agent.wait_ready()
        returned = {name: one.read(reset=True) for name, one in running.items()}
        _served(running, 40)
    after = {name: one.stop() for name, one in running.items()}
    _assert_none_failed(dead, returned, after)


def test_agent_learns_on_start_what_changed_while_it_was_dead(
    world: World, publish: Publish
) -> None:
    """A pod that left while nobody watched gets no more requests once the agent is back."""
    web = publish([world.web1, world.web3])
    for agent in world.agents:
        agent.kill()
    world.publish(web, [world.web2])
    for agent in world.agents:
        agent.start()
    for asker in world.askers:
        target = web.at_cluster_ip(Family.V4, Protocol.TCP)
        assert {one.server for one in ask(asker, target.address, target.port, count=4)} == {"web2"}


@every_pod_network
def test_open_connections_outlive_agent_and_endpoint(world: World, publish: Publish) -> None:
    """Established TCP stays with its pod when the agent dies or the pod leaves (P12)."""
    web = publish([world.web1, world.web3])
    with ExitStack() as stack:
        conns = _connections(world, web, stack)
        first = {name: conn.ping().server for name, conn in conns.items()}
        world.agents[0].restart()
        assert {name: conn.ping().server for name, conn in conns.items()} == first
        world.publish(web, [world.web2])
        assert {name: conn.ping().server for name, conn in conns.items()} == first


def test_open_connections_outlive_their_service(world: World, publish: Publish) -> None:
    """Established TCP goes on when the whole service is deleted (P12)."""
    web = publish([world.web1, world.web3])
    with ExitStack() as stack:
        conns = _connections(world, web, stack)
        first = {name: conn.ping().server for name, conn in conns.items()}
        world.withdraw(web)
        assert {name: conn.ping().server for name, conn in conns.items()} == first


def _connections(world: World, web: Web, stack: ExitStack) -> dict[tuple[str, str], Connection]:
    """Open TCP connections of every kind of client, by its name and the family."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    return {
        (asker.name, family.label): stack.enter_context(connection(asker, target))
        for family in Family
        for asker, target in (
            (world.shell1, web.at_cluster_ip(family, Protocol.TCP)),
            (world.sandbox1, web.at_cluster_ip(family, Protocol.TCP)),
            (node1, web.at_cluster_ip(family, Protocol.TCP)),
            (client, web.at_node(node1, family, Protocol.TCP)),
        )
    }


def _udp_flows(
    world: World, web: Web, stack: ExitStack, *, connected: bool
) -> dict[str, Connection]:
    """UDP sockets with a fixed port: one flow each, for as long as they live."""
    node1, client = world.cluster.nodes[0], world.cluster.client
    return {
        f"{asker.name} {target.address}": stack.enter_context(connection(asker, target))
        for family in Family
        for asker, target in (
            (world.shell1, web.at_cluster_ip(family, Protocol.UDP, connected=connected)),
            (world.sandbox1, web.at_cluster_ip(family, Protocol.UDP, connected=connected)),
            (node1, web.at_cluster_ip(family, Protocol.UDP, connected=connected)),
            (client, web.at_node(node1, family, Protocol.UDP, connected=connected)),
        )
    }


@pytest.mark.smoke
@every_pod_network
def test_udp_flow_stays_with_its_backend_and_moves_on_when_it_goes(
    world: World, publish: Publish
) -> None:
    """A UDP client with a fixed port is never stuck with a pod that is gone (C7, C10)."""
    web = publish([world.web1, world.web3])
    with ExitStack() as stack:
        flows = _udp_flows(world, web, stack, connected=False)
        begun = {name: flow.ping() for name, flow in flows.items()}
        first = {name: one.server for name, one in begun.items()}
        assert set(first.values()) <= {"web1", "web3"}, begun
        assert {name: flow.ping().server for name, flow in flows.items()} == first
        world.publish(web, [world.web2])
        moved = {name: flow.ping() for name, flow in flows.items()}
        assert {name: one.server or one for name, one in moved.items()} == dict.fromkeys(
            flows, "web2"
        )


def test_udp_flows_outlive_a_restart_of_the_agent(world: World, publish: Publish) -> None:
    """Whoever starts lets flows of endpoints that are still there alone (C2, C7)."""
    web = publish()
    with ExitStack() as stack:
        flows = _udp_flows(world, web, stack, connected=False)
        first = {name: flow.ping().server for name, flow in flows.items()}
        assert set(first.values()) <= {"web1", "web2", "web3"}
        for agent in world.agents:
            agent.kill()
        for agent in world.agents:
            agent.start()
        assert {name: flow.ping().server for name, flow in flows.items()} == first


def test_udp_flow_to_a_draining_endpoint_stays(world: World, publish: Publish) -> None:
    """A terminating pod that still serves keeps its UDP flows and gets no new ones (C5)."""
    web = publish([world.web1])
    with ExitStack() as stack:
        flows = _udp_flows(world, web, stack, connected=False)
        assert {flow.ping().server for flow in flows.values()} == {"web1"}
        leaving = Endpoint(world.web1, ready=False, serving=True, terminating=True)
        world.publish(web, [leaving, world.web3])
        assert {flow.ping().server for flow in flows.values()} == {"web1"}
        late = _udp_flows(world, web, stack, connected=False)
        assert {flow.ping().server for flow in late.values()} == {"web3"}


def test_connected_udp_socket_learns_that_its_backend_is_gone(
    world: World, publish: Publish
) -> None:
    """A connected UDP socket whose pod left is moved or told with an error, not left in silence."""
    web = publish([world.web1])
    with ExitStack() as stack:
        flows = _udp_flows(world, web, stack, connected=True)
        assert {flow.ping().server for flow in flows.values()} == {"web1"}
        world.publish(web, [world.web2])
        staying = dict(flows)

        def still_there() -> dict[str, Answer]:
            """Who has not moved: an answer under way is waited for, so for a moment all may."""
            said = {name: flow.ping() for name, flow in staying.items()}
            for name, one in said.items():
                if one.server == "web2" or one.detail in DESTROYED:
                    del staying[name]
                else:
                    assert one.server == "web1", one
            return {name: said[name] for name in staying}

        # Connection tracking forgets at once; only the agent that ends sockets waits (LINGER_S).
        within_s = 5.0 if world.mode == "ebpf" else 0.0
        eventually(still_there, until=lambda left: not left, within_s=within_s)
