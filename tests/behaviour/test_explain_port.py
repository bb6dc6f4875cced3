"""`ebpf-svc explain --client-port` on a node: a pod sees the port that was told before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from ebpf_svc.dataplane.ebpf.constants import NAT_PORTS, UDP_IDLE_S
from ebpf_svc.dataplane.ebpf.dataplane import EbpfDataplane
from ebpf_svc.host.nft import PORTS
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.traffic import Probe, Target, ask_all, connection, serve, stop_serving
from tests.behaviour.conftest import Publish
from tests.behaviour.test_explain import Told, looking
from tests.lib.manifests import PROTOCOLS, Web
from tests.lib.world import World

FIRST_PORT = 22_000
SERVER_PORT = 9_200
CASES = list(itertools.product(Family, PROTOCOLS))

ports = itertools.count(FIRST_PORT)
"""Of clients: each is used in one case alone."""


@pytest.fixture
def by_program(dataplane: str) -> None:
    """For what only the eBPF dataplane tells."""
    if dataplane != "ebpf":
        pytest.skip("which port a pod sees connection tracking decides")


def _told(world: World, asker: Host, target: Target, family: Family) -> Mapping[str, Any]:
    with looking(world) as told:
        said = told.of(asker, target, family, port=target.source_port)
    assert said["program"]["agrees"], said["program"]["differences"]
    return said


def _seen(asker: Host, target: Target) -> int:
    """The port from which a pod sees a request."""
    ((answer,),) = ask_all([Probe(asker, target)])
    assert answer.ok, answer
    return answer.client_port


def _pairs(world: World, web: Web, family: Family, protocol: Protocol) -> list[tuple[Host, Target]]:
    """Who reaches pods and services of node1 by packets that keep their source, and where."""
    node1, node2 = world.cluster.nodes
    return [
        (world.sandbox1, web.at_cluster_ip(family, protocol)),
        (node2, web.at_node(node1, family, protocol)),
    ]


def _pod(world: World, web: Web, family: Family, protocol: Protocol) -> Target:
    return Target(world.web1.address(family), web.target_port, protocol)


def _calls(world: World, web: Web) -> Iterator[tuple[Host, Target, Target, Family]]:
    """Who, a service and its pod itself, both from one port."""
    for family, protocol in CASES:
        for asker, plain in _pairs(world, web, family, protocol):
            target = replace(plain, source_port=next(ports))
            direct = replace(_pod(world, web, family, protocol), source_port=target.source_port)
            yield asker, target, direct, family


@pytest.mark.usefixtures("by_program")
def test_port_in_use_for_a_pod_itself_is_another_for_its_service(
    world: World, publish: Publish
) -> None:
    """While a client's connection to a pod is open, the port its service's would have is told."""
    web = publish([world.web1], external_local=True)
    for asker, target, direct, family in _calls(world, web):
        with connection(asker, direct) as held:
            assert held.ping().client_port == direct.source_port
            said = _told(world, asker, target, family)
            endpoint = f"{said['backend']}"
            (use,) = said["port"]["in_use"]
            assert (use["called"], use["endpoint"]) == (endpoint, endpoint)
            assert said["port"]["seen"] in NAT_PORTS
            (step,) = said["steps"]["port"]
            begins = f"client port {target.source_port} is in use for a direct call to"
            assert step.startswith(f"{begins} {endpoint} (")
            assert step.endswith(f", so the endpoint sees port {said['port']['seen']}.")
            assert _seen(asker, target) == said["port"]["seen"]
            assert held.ping().ok
            free = replace(target, source_port=next(ports))
            said = _told(world, asker, free, family)
            assert said["port"] == {
                "client": free.source_port,
                "seen": free.source_port,
                "in_use": [],
                "passed_over": [],
                "answers": None,
            }
            assert _seen(asker, free) == free.source_port


@pytest.mark.usefixtures("by_program")
def test_port_in_use_for_a_service_is_another_for_the_pod_itself(
    world: World, publish: Publish
) -> None:
    """A call to the pod itself keeps all but its port while one to its service is open: told."""
    web = publish([world.web1], external_local=True)
    for asker, target, direct, family in _calls(world, web):
        said = _told(world, asker, direct, family)
        assert (said["verdict"], said["port"]["seen"]) == ("untouched", direct.source_port)
        assert "is not in use towards" in said["steps"]["port"][0]
        with connection(asker, target) as held:
            assert held.ping().client_port == target.source_port
            said = _told(world, asker, direct, family)
            assert (said["verdict"], said["service"]) == ("other_port", None)
            (use,) = said["port"]["in_use"]
            assert use["called"].endswith(f":{target.port}")
            assert said["summary"].endswith(f"the endpoint sees port {said['port']['seen']}")
            assert said["headers"][1]["source"].endswith(f":{said['port']['seen']}")
            assert not any("left alone" in each for each in said["steps"]["frontend"])
            assert _seen(asker, direct) == said["port"]["seen"] != direct.source_port
            assert held.ping().ok


@pytest.mark.usefixtures("by_program")
def test_port_of_a_masquerade_is_told_where_it_can_be(world: World, publish: Publish) -> None:
    """On the fast path the port that stands for a client's is told, also where the first choice is
    taken; that netfilter draws its own is said (P6).
    """
    web, node1, client = publish([world.web3]), world.cluster.nodes[0], world.cluster.client
    is_fast = world.agents[0].settings.ebpf.fast_path
    for family, protocol in CASES:
        plain = web.at_node(node1, family, protocol)
        with looking(world) as told:
            first, second = _ports_that_begin_alike(told, client.address(family), plain)
        with connection(client, replace(plain, source_port=first)) as held:
            rival = held.ping().client_port
            target = replace(plain, source_port=second)
            said = _told(world, client, target, family)
            seen = _seen(client, target)
            if said["way"]["path"] != "fast":
                assert (said["port"]["seen"], said["port"]["passed_over"]) == (None, [])
                assert "cannot be known before" in said["steps"]["port"][-1]
                assert seen in range(PORTS[0], PORTS[1] + 1)
                assert not is_fast or "none of" in said["way"]["why"]
                # Of a flow that is open connection tracking knows it.
                said = _told(world, client, replace(plain, source_port=first), family)
                assert (said["chosen_by"], said["port"]["seen"]) == ("flow", rival)
                assert said["headers"][2]["source"].endswith(f":{rival}")
                continue
            (passed,) = said["port"]["passed_over"]
            assert (passed["port"], passed["holder"].rpartition(":")[2]) == (rival, str(first))
            assert said["steps"]["port"][1].startswith(f"Taken there before it: {rival} (")
            assert seen == said["port"]["seen"] != rival


def _ports_that_begin_alike(told: Told, client: str, target: Target) -> tuple[int, int]:
    """Two of the client's ports for which the same port of the node is tried first."""
    key, found = FrontendKey(target.address, target.port, target.protocol), {}
    assert isinstance(told.scene.dataplane, EbpfDataplane)
    with told.scene.dataplane.looking_at(Family.V6 if ":" in client else Family.V4) as maps:
        assert maps is not None
        for port in range(26_000, 32_000):
            first = maps[0].client_hash(key, (client, port)) % len(NAT_PORTS)
            if first in found:
                return found[first], port
            found[first] = port
    raise AssertionError("no two ports begin alike")


@pytest.mark.usefixtures("by_program")
def test_answer_to_a_process_of_the_node_is_told(world: World, publish: Publish) -> None:
    """Whom a process asked from the number of a node port gets through to it, strangers to the pod;
    everybody, once its socket is closed (B9).
    """
    node1, client = world.cluster.nodes[0], world.cluster.client
    serve(client, udp=[SERVER_PORT])
    try:
        for family, is_connected in itertools.product(Family, (False, True)):
            web = publish([world.web1], external_local=True)
            port = web.node_port
            asked = Target(client.address(family), SERVER_PORT, Protocol.UDP, source_port=port,
                           connected=is_connected)  # fmt: skip
            target = web.at_node(node1, family, Protocol.UDP, source_port=SERVER_PORT)
            with connection(node1, asked) as held:
                assert held.ping().ok
                said = _told(world, client, target, family)
                assert (said["verdict"], said["reason"]) == ("untouched", "own_answer")
                assert said["summary"] == "an answer to a process of this node: left to it"
                assert said["port"]["answers"]["is_connected"] is is_connected
                assert (said["port"]["answers"]["idle_s"] or 0) <= UDP_IDLE_S
                (step,) = said["steps"]["answer"]
                assert step.endswith("no request (B9).")
                assert held.ping().ok
                stranger = replace(target, source_port=next(ports))
                assert _told(world, client, stranger, family)["verdict"] == "forwarded"
                assert _seen(client, stranger) == stranger.source_port
            assert _told(world, client, target, family)["verdict"] == "forwarded"
    finally:
        stop_serving(client, udp=[SERVER_PORT])


def test_port_that_only_the_kernel_knows_is_said_to_be(
    world: World, publish: Publish, dataplane: str
) -> None:
    """What cannot be known of a port is said: at sockets, and where connection tracking chooses."""
    web = publish([world.web1])
    target = web.at_cluster_ip(Family.V4, Protocol.TCP)
    with looking(world) as told:
        said = told.of(world.shell1, target, Family.V4, port=next(ports))
        unnamed = told.of(world.shell1, target, Family.V4)
    assert ("port" in unnamed["steps"], unnamed["port"]) == (False, None)
    if dataplane != "ebpf":
        assert said["port"] is None
        assert said["steps"]["port"][0].startswith("not known before: ")
    elif said["at"] == "socket":
        assert said["port"] is None
        assert f"{said['backend']} --client-port" in said["steps"]["port"][1]
    else:
        assert said["port"]["seen"] == said["port"]["client"]


@pytest.mark.usefixtures("by_program")
def test_command_tells_what_a_port_is_in_use_for(world: World, publish: Publish) -> None:
    """The port has a line of its own, and only when one was named."""
    web, asker, family = publish([world.web1]), world.sandbox1, Family.V4
    direct = replace(_pod(world, web, family, Protocol.TCP), source_port=next(ports))
    words = ("explain", asker.address(family), f"{web.cluster.v4}:80", "--sandbox")
    with connection(asker, direct):
        named = world.agents[0].command(*words, "--client-port", str(direct.source_port))
        unnamed = world.agents[0].command(*words)
    assert f"port        client port {direct.source_port} is in use for a direct call" in named
    assert "\nport " not in unnamed
