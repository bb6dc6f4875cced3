"""The testbed itself, without any service: what the other tests take for granted.

client ── router ──┬── node1 ── a b sandbox
                   └── node2 ── c
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed import leftovers, namespace
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.namespace import TentativeAddress
from ebpf_svc.testbed.podnet import PodNetwork
from ebpf_svc.testbed.traffic import (
    Outcome,
    Probe,
    Target,
    ask,
    ask_all,
    connection,
    load,
    serve,
    spread,
    stop_serving,
)
from tests.lib.waiting import eventually

PROTOCOLS = (Protocol.TCP, Protocol.UDP)


@pytest.fixture(scope="module", params=list(PodNetwork))
def cluster(request: pytest.FixtureRequest, no_leftovers: None) -> Iterator[Cluster]:
    with Cluster.create(pod_network=request.param) as cluster:
        node1, node2 = cluster.nodes
        for pod in (node1.add_pod("a"), node1.add_pod("b"), node2.add_pod("c")):
            serve(pod, tcp=[80], udp=[80])
        node1.add_sandbox_pod("sandbox")
        yield cluster


@pytest.fixture(scope="module")
def bridge(no_leftovers: None) -> Iterator[Cluster]:
    with Cluster.create() as cluster:
        serve(cluster.nodes[0].add_pod("a"), tcp=[80], udp=[80])
        yield cluster


def _everyone(cluster: Cluster) -> tuple[Host, ...]:
    return (*cluster.pods, *cluster.nodes)


def test_pods_and_nodes_reach_every_pod(cluster: Cluster) -> None:
    """Every pod and node reaches every pod, in both families and protocols, under each CNI."""
    webs = [pod for pod in cluster.pods if pod.name != "sandbox"]
    probes = [
        Probe(host, Target(pod.address(family), 80, protocol))
        for host, pod, family, protocol in product(_everyone(cluster), webs, Family, PROTOCOLS)
    ]
    answers = ask_all(probes)
    wrong = [
        (probe.host.name, probe.target, answer)
        for probe, (answer,) in zip(probes, answers, strict=True)
        if answer.peer != probe.target.address or not answer.ok
    ]
    assert wrong == []


def test_pods_keep_their_address_towards_pods(cluster: Cluster) -> None:
    """No CNI rewrites a pod's address on its way to another pod."""
    a, c = (cluster.nodes[0].pods["a"], cluster.nodes[1].pods["c"])
    for family in Family:
        (answer,) = ask(a, c.address(family), 80)
        assert answer.client == a.address(family)


def test_outside_sees_pods_only_without_masquerade(cluster: Cluster) -> None:
    """A pod that asks the outside shows its node's address, unless the router knows the pods."""
    serve(cluster.client, tcp=[99])
    node = cluster.nodes[0]
    pod = node.pods["a"]
    for family in Family:
        (answer,) = ask(pod, cluster.client.address(family), 99)
        seen = node if cluster.cni_masquerade else pod
        assert answer.client == seen.address(family)


def test_router_drops_what_it_does_not_know(bridge: Cluster) -> None:
    """Nothing answers for an address nobody has: the client waits, as on an internet."""
    (answer,) = ask(bridge.client, "10.96.0.1", 80, timeout_s=0.2)
    assert answer.outcome is Outcome.TIMEOUT


def test_closed_port_is_refused(bridge: Cluster) -> None:
    """A port nobody serves is refused at once, TCP and UDP."""
    a = bridge.nodes[0].pods["a"]
    for family, protocol in product(Family, PROTOCOLS):
        (answer,) = ask(bridge.nodes[1], a.address(family), 81, protocol)
        assert answer.outcome is Outcome.REFUSED
        assert answer.latency_ms < 100


def test_large_datagrams_come_back_whole(bridge: Cluster) -> None:
    """Datagrams larger than the MTU are cut and joined on the way there and back."""
    a = bridge.nodes[0].pods["a"]
    for family in Family:
        (answer,) = ask(
            bridge.nodes[1], a.address(family), 80, Protocol.UDP,
            request_bytes=5000, reply_bytes=6000,
        )  # fmt: skip
        assert (answer.request_bytes, answer.reply_bytes) == (5000, 6000)


def test_source_port_is_the_one_asked_for(bridge: Cluster) -> None:
    """A fixed source port arrives at the server."""
    a = bridge.nodes[0].pods["a"]
    (answer,) = ask(bridge.nodes[0], a.address(Family.V4), 80, Protocol.UDP, source_port=4321)
    assert answer.client_port == 4321


def test_open_connection_notices_that_the_server_stops(bridge: Cluster) -> None:
    """A long-lived connection answers until its server closes the port."""
    a = bridge.nodes[0].pods["a"]
    serve(a, tcp=[7000])
    with connection(bridge.nodes[0], Target(a.address(Family.V6), 7000)) as conn:
        assert [conn.ping().server, conn.ping().server] == ["a", "a"]
        stop_serving(a, tcp=[7000])
        assert conn.ping().outcome is Outcome.ERROR


def test_load_counts_failures_with_their_reason(bridge: Cluster) -> None:
    """A load says how many requests failed, how and when."""
    a = bridge.nodes[0].pods["a"]
    serve(a, tcp=[7001])
    with load(bridge.nodes[0], [Target(a.address(Family.V4), 7001)], workers=2) as running:
        eventually(running.read, until=lambda account: account.ok > 10)
        assert running.read().failed == 0
        stop_serving(a, tcp=[7001])
        # The requests under way are reset; those after them are refused.
        eventually(
            running.read,
            until=lambda account: "refused" in {each["outcome"] for each in account.failures},
        )
    account = running.stop()
    assert account.servers == {"a": account.ok}
    assert {each["outcome"] for each in account.failures} <= {"refused", "error"}


def test_removed_pod_is_gone(bridge: Cluster) -> None:
    """A removed pod leaves neither processes nor devices, and its name may be used again."""
    node = bridge.nodes[0]
    pod = node.add_pod("brief")
    serve(pod, tcp=[80])
    node.remove_pod(pod)
    assert pod.device not in node.run(["ip", "-o", "link"])
    again = node.add_pod("brief", pod.addresses)
    serve(again, tcp=[80], name="again")
    assert spread(ask(node, pod.address(Family.V4), 80)) == {"again": 1}


def test_address_that_may_not_be_used_yet_is_waited_for(
    bridge: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the kernel has seen to an IPv6 address, not even a solicitation leaves from it."""
    space = bridge.client.namespace
    with space.netlink() as ip:
        ip.link("add", ifname="near", kind="veth", peer={"ifname": "far"})
        near, far = (ip.link_lookup(ifname=name)[0] for name in ("near", "far"))
        try:
            space.sysctl({"net/ipv6/conf/all/accept_dad": 1})
            ip.link("set", index=near, state="up")
            ip.addr("add", index=near, address="2001:db8:77::1", prefixlen=64)
            with monkeypatch.context() as patched:
                patched.setattr(namespace, "SETTLED_S", 0.1)
                with pytest.raises(TentativeAddress, match="2001:db8:77::1 on near"):
                    space.settle()
            ip.link("set", index=far, state="up")
            space.settle()
            assert "2001:db8:77::1" not in bridge.client.run(
                ["ip", "-6", "addr", "show", "tentative"]
            )
        finally:
            space.sysctl({"net/ipv6/conf/all/accept_dad": 0})
            ip.link("del", index=near)


def test_sandbox_runs_outside_the_cgroup_of_its_node(cluster: Cluster) -> None:
    """A sandboxed pod's processes are where no socket hook of the node sees them."""
    node = cluster.nodes[0]
    own, sandbox = node.pods["a"], node.pods["sandbox"]
    assert own.cgroup.is_relative_to(node.folders.cgroup)
    assert not sandbox.cgroup.is_relative_to(node.folders.cgroup)
    assert "sandbox" in sandbox.run(["cat", "/proc/self/cgroup"])


def test_cluster_is_built_and_removed_quickly(no_leftovers: None) -> None:
    """A cluster costs little enough to have one for each test that needs its own."""
    begun = time.monotonic()
    with Cluster.create(pod_network=PodNetwork.OVERLAY) as cluster:
        for node in cluster.nodes:
            node.add_pod(f"p{node.number}")
    assert time.monotonic() - begun < 2.5


def test_crashed_cluster_is_cleaned_up(no_leftovers: None) -> None:
    """After a crash `cleanup_leftovers` removes all; clusters of living processes stay."""
    script = (
        "import sys; from ebpf_svc.testbed.cluster import Cluster\n"
        "cluster = Cluster.create(); cluster.nodes[0].add_pod('a').peer\n"
        "print(cluster.id, flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True, cwd=Path.cwd()
    ) as process:
        assert process.stdout is not None
        crashed = process.stdout.readline().strip()
        assert crashed not in Cluster.cleanup_leftovers()
        os.kill(process.pid, signal.SIGKILL)
    assert leftovers.traces(crashed)
    assert Cluster.cleanup_leftovers() == (crashed,)
    assert leftovers.traces(crashed) == ()
