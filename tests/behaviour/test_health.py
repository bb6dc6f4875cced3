"""What load balancers, kubelets and Prometheus see of an agent, from where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from ebpf_svc.errors import CommandError
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Node, Pod
from ebpf_svc.testbed.traffic import Outcome, Probe, ask, ask_all, connection
from tests.behaviour.conftest import Publish
from tests.lib.http import Reply, fetch
from tests.lib.manifests import Endpoint, Web, node_manifests
from tests.lib.waiting import eventually
from tests.lib.world import World, write_manifests

HEALTHZ, METRICS = 10256, 10249


def health_port(web: Web) -> int:
    """A port no other service of the world has."""
    return 31_000 + web.number


class Balanced:
    """A service a load balancer asks every node about."""

    def __init__(self, world: World, publish: Publish, endpoints: list[Endpoint | Pod]) -> None:
        self._world = world
        self.web = publish([])
        self.port = health_port(self.web)
        extra = {"healthCheckNodePort": self.port}
        self.web = replace(self.web, external_local=True, extra=extra)
        self.move(endpoints)

    def move(self, endpoints: list[Endpoint | Pod], **fields: Any) -> None:
        """Give it other endpoints, or other fields."""
        self.web = replace(self.web, **fields)
        self._world.publish(self.web, endpoints)

    def check(self, node: Node, family: Family = Family.V4) -> Reply:
        """Ask a node as a balancer outside would."""
        return fetch(self._world.cluster.client, node.address(family), self.port)

    def statuses(self) -> dict[tuple[str, str], int]:
        """Of every node in every family."""
        return {
            (node.name, family.label): self.check(node, family).status
            for node in self._world.cluster.nodes
            for family in Family
        }

    def await_statuses(self, *, node1: int, node2: int) -> None:
        """Wait until every node says so, in both families."""
        wanted = {
            (name, family.label): status
            for name, status in (("node1", node1), ("node2", node2))
            for family in Family
        }
        eventually(self.statuses, until=wanted.__eq__)


def metrics(world: World, node: Node) -> dict[str, float]:
    """Every series of an agent, as its own node gets them."""
    text = fetch(node, "127.0.0.1", METRICS, "/metrics").body.decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {series: float(value) for series, _, value in lines}


@pytest.mark.parametrize("path", ["/healthz", "/livez"])
def test_node_is_healthy_for_whoever_asks(world: World, path: str) -> None:
    """From the node itself and from outside, in both families (HS1, digest row 65)."""
    node = world.cluster.nodes[0]
    for asker, addresses in (
        (node, ("127.0.0.1", "::1")),
        (world.cluster.client, node.addresses),
        (world.shell1, node.addresses),
    ):
        for address in addresses:
            reply = fetch(asker, address, HEALTHZ, path)
            assert reply.status == 200, (asker, address)
            assert "lastUpdated" in reply.json
            assert {*reply.json["status"]} == {"IPv4", "IPv6"}


def test_metrics_are_for_the_node_alone(world: World) -> None:
    """They tell what a cluster runs: by default nobody outside the node gets them (HS7)."""
    node = world.cluster.nodes[0]
    assert fetch(node, "127.0.0.1", METRICS, "/proxyMode").body == world.mode.encode()
    assert fetch(node, "::1", METRICS, "/healthz").body == b"ok"
    assert fetch(world.cluster.client, node.address(Family.V4), METRICS, "/metrics").status == 0


def test_balancer_is_sent_where_the_endpoints_are(world: World, publish: Publish) -> None:
    """200 with the count on their node, 503 elsewhere, following them (H3-H7, digest row 48)."""
    balanced = Balanced(world, publish, [world.web1, world.web2])
    balanced.await_statuses(node1=200, node2=503)
    node1, node2 = world.cluster.nodes
    reply = balanced.check(node1)
    assert reply.headers["X-Load-Balancing-Endpoint-Weight"] == "2"
    assert reply.json == {
        "service": {"namespace": "tests", "name": balanced.web.name},
        "localEndpoints": 2,
        "serviceProxyHealthy": True,
    }
    assert balanced.check(node2, Family.V6).json["localEndpoints"] == 0
    balanced.move([world.web3])
    balanced.await_statuses(node1=503, node2=200)


def test_check_without_endpoints_is_answered_all_the_same(world: World, publish: Publish) -> None:
    """The balancer learns at once; it need not wait for a time-out (H2, digest row 23)."""
    Balanced(world, publish, []).await_statuses(node1=503, node2=503)


def test_check_fails_while_a_terminating_endpoint_still_serves(
    world: World, publish: Publish
) -> None:
    """No new clients come, those that do are served (H6, T3, digest rows 24 and 37)."""
    balanced = Balanced(world, publish, [world.web1])
    balanced.await_statuses(node1=200, node2=503)
    balanced.move([Endpoint(world.web1, ready=False, terminating=True)])
    balanced.await_statuses(node1=503, node2=503)
    node1 = world.cluster.nodes[0]
    target = balanced.web.at_node(node1, Family.V4, Protocol.TCP)
    ((answer,),) = ask_all([Probe(world.cluster.client, target)])
    assert (answer.outcome, answer.server) == (Outcome.OK, "web1")


def test_check_goes_with_policy_local_and_comes_back(world: World, publish: Publish) -> None:
    """With policy Cluster the port is closed: every node serves (H8, digest row 48)."""
    balanced = Balanced(world, publish, [world.web1])
    balanced.await_statuses(node1=200, node2=503)
    local = balanced.web.extra
    balanced.move([world.web1], external_local=False, extra={})
    balanced.await_statuses(node1=0, node2=0)
    balanced.move([world.web1], external_local=True, extra=local)
    balanced.await_statuses(node1=200, node2=503)


def test_agent_that_starts_again_has_its_ports_again(world: World, publish: Publish) -> None:
    """A crash leaves no port behind that the next agent would have to wait for."""
    balanced = Balanced(world, publish, [world.web1])
    balanced.await_statuses(node1=200, node2=503)
    node, agent = world.cluster.nodes[0], world.agents[0]
    agent.kill()
    assert fetch(node, "127.0.0.1", HEALTHZ, "/healthz").status == 0
    agent.start()
    assert fetch(node, "127.0.0.1", HEALTHZ, "/healthz").status == 200
    balanced.await_statuses(node1=200, node2=503)


def test_taken_port_is_had_once_it_is_free(world: World, publish: Publish) -> None:
    """Someone listens on a health-check node port: told, tried again, had (H7)."""
    web = publish([])
    node1 = world.cluster.nodes[0]
    with squatter(node1, health_port(web)):
        extra = {"healthCheckNodePort": health_port(web)}
        world.publish(replace(web, external_local=True, extra=extra), [world.web1])
        eventually(world.agents[0].log_tail, until=lambda log: str(health_port(web)) in log)
        assert "FailedToStartServiceHealthcheck" in world.agents[0].log_tail()

    def status() -> int:
        return fetch(node1, node1.address(Family.V4), health_port(web)).status

    eventually(status, until=(200).__eq__, within_s=8)


@contextmanager
def squatter(host: Host, port: int) -> Iterator[None]:
    """A program that has a port of a host, and does not speak HTTP."""
    code = (
        "import socket, time, sys\n"
        "taken = socket.create_server(('', int(sys.argv[1])))\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = host.popen(["python3", "-I", "-S", "-c", code, str(port)], stdout=-1)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def test_node_that_goes_away_tells_load_balancers(world: World) -> None:
    """The autoscaler's taint: /healthz says 503, /livez and the rest go on (N6, HS6)."""
    client, node = world.cluster.client, world.cluster.nodes[0]

    def statuses() -> tuple[int, int]:
        address = node.address(Family.V4)
        return tuple(  # type: ignore[return-value]
            fetch(client, address, HEALTHZ, path).status for path in ("/healthz", "/livez")
        )

    path = world.manifests / "nodes.yaml"
    objects = node_manifests(world.cluster.nodes)
    going = [dict(each) for each in objects]
    going[0]["spec"] = {
        "taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]
    }
    try:
        write_manifests(path, going)
        eventually(statuses, until=(503, 200).__eq__)
    finally:
        write_manifests(path, objects)
    eventually(statuses, until=(200, 200).__eq__)


def test_dropped_packets_are_counted_by_reason(world: World, publish: Publish) -> None:
    """A client of a Local service at the wrong node: dropped there, and told."""
    web = publish([world.web3], external_local=True)
    node1 = world.cluster.nodes[0]
    series = 'ebpf_svc_dropped_packets_total{reason="no_local_endpoint"}'
    before = metrics(world, node1)[series]
    target = web.at_node(node1, Family.V4, Protocol.TCP, timeout_s=0.3)
    ((answer,),) = ask_all([Probe(world.cluster.client, target)])
    assert answer.outcome is Outcome.TIMEOUT
    after = metrics(world, node1)
    assert after[series] > before
    no_local = "kubeproxy_sync_proxy_rules_no_local_endpoints_total"
    assert after[f'{no_local}{{ip_family="IPv4",traffic_policy="external"}}'] >= 1


def test_syncs_are_counted(world: World, publish: Publish) -> None:
    """A change shows in kube-proxy's metrics and ours."""
    node1 = world.cluster.nodes[0]
    before = metrics(world, node1)
    publish()
    after = metrics(world, node1)

    def grew(series: str) -> float:
        return after[series] - before[series]

    changes = "kubeproxy_sync_proxy_rules_{}_changes_total"
    assert (grew(changes.format("service")), grew(changes.format("endpoint"))) == (1, 2)
    assert grew("ebpf_svc_event_to_kernel_duration_seconds_count") >= 1
    assert grew('kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"}') >= 1
    assert grew('ebpf_svc_service_ports{ip_family="IPv6"}') == 2


def test_flows_are_counted(world: World, dataplane: str, publish: Publish) -> None:
    """A connection shows in its Service's flows."""
    node1 = world.cluster.nodes[0]
    web = publish()
    # On the packet path: the socket hooks keep no flows.
    (answer,) = ask(world.sandbox1, web.cluster.v4, 80)
    assert answer.ok
    after = metrics(world, node1)
    if dataplane == "ebpf":  # others count without a table of ours
        assert after['ebpf_svc_map_entries{map="frontends4"}'] >= 8
    flows = (
        f'ebpf_svc_service_flows{{ip_family="IPv4",namespace="tests",port="tcp",protocol="TCP",'
        f'service="{web.name}"}}'
    )

    # Tables are looked at every ten seconds at most.
    with connection(world.sandbox1, web.at_cluster_ip(Family.V4, Protocol.TCP)) as conn:
        assert conn.ping().ok
        eventually(
            lambda: metrics(world, node1).get(flows, 0),
            until=lambda count: count >= 1,
            within_s=15,
        )


def test_traffic_is_counted_by_service(world: World, publish: Publish) -> None:
    """The packet path counts packets, the socket hooks only the connection they translate."""
    node1 = world.cluster.nodes[0]
    web = publish()
    labels = (
        f'{{ip_family="IPv4",namespace="tests",port="tcp",protocol="TCP",service="{web.name}"}}'
    )

    def traffic() -> list[float]:
        found = metrics(world, node1)
        return [
            found.get(f"ebpf_svc_service_{what}_total{labels}", 0)
            for what in ("connections", "packets", "bytes")
        ]

    (answer,) = ask(world.sandbox1, web.cluster.v4, 80)
    assert answer.ok
    connections, packets, size = before = traffic()
    # SYN, SYN-ACK, ACK, two messages and the end at least.
    assert connections == 1
    assert packets >= 8
    assert size >= packets * 54
    (answer,) = ask(node1, web.cluster.v4, 80)
    assert answer.ok
    assert traffic() == [2, *before[1:]]


def test_metrics_of_every_series_are_sane(world: World) -> None:
    """No series is negative, and tables hold no more than they have room for."""
    collected = metrics(world, world.cluster.nodes[0])
    assert len(collected) > 100
    assert not {series for series, value in collected.items() if value < 0}
    capacity = {
        series.split('map="')[1].split('"')[0]: value
        for series, value in collected.items()
        if series.startswith("ebpf_svc_map_capacity")
    }
    for name, room in capacity.items():
        assert collected[f'ebpf_svc_map_entries{{map="{name}"}}'] <= room
    with pytest.raises(KeyError):
        collected["kubeproxy_sync_proxy_rules_nftables_sync_failures_total"]


def test_agent_may_insist_on_its_addresses(world: World, dataplane: str) -> None:
    """With bindAddressHardFail an address that is taken ends the agent with a reason (HS8)."""
    node, agent = world.cluster.nodes[0], world.agents[0]
    agent.stop()
    try:
        with squatter(node, METRICS), pytest.raises(CommandError) as caught:
            agent.command("run", "--mode", dataplane, "--bind-address-hard-fail")
        assert f"127.0.0.1:{METRICS}: Address already in use" in str(caught.value)
    finally:
        world.heal()
