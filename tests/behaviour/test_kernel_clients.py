"""Clients inside the kernel: a file system that is mounted from a service.

The kernel connects from a thread of its own, outside every node's cgroup, so the socket hooks are
attached to all of the machine here, as on a real node.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ebpf_svc.config import Settings, SocketLB
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cgroup import cgroup2_root
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Node, Pod
from ebpf_svc.testbed.namespace import python_argv
from ebpf_svc.testbed.patience import PATIENCE
from ebpf_svc.testbed.traffic import Target
from tests.lib.manifests import Web, node_manifests
from tests.lib.waiting import eventually, wait_out
from tests.lib.world import write_manifests

SIZES_MIB = {"web1": 1024, "web2": 2048}
"""What the server in a pod says it holds: so the client knows who answers."""
TRIED_S = 10.0
"""How long the client tries a server before it says that there is none."""
REFUSED_S = 2.0
"""How long there is no endpoint while the client tries."""
UNKNOWN_ERROR = "connect returned unhandled error"
"""What the kernel logs before it tries again at once, without end."""

every_translation = pytest.mark.parametrize("socket_lb", [SocketLB.FULL, SocketLB.OFF], ids=str)


@pytest.fixture(scope="module")
def nfs() -> None:
    """A kernel that can mount what another machine exports."""
    subprocess.run(["modprobe", "-qa", "nfs", "nfsv3"], check=False, capture_output=True)
    if "\tnfs\n" not in Path("/proc/filesystems").read_text():
        pytest.skip("this kernel has no client of NFS")


@pytest.fixture
def cluster(artifact_cache: Path, no_leftovers: None, nfs: None) -> Iterator[Cluster]:
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        yield cluster


@contextmanager
def _mounted(node: Node, family: Family, target: Target) -> Iterator[Path]:
    """A file system that a service exports, mounted by a node."""
    path = node.folders.root / f"mounted-{family.label}"
    path.mkdir()
    options = (
        "nfsvers=3,proto={tcp},mountproto={tcp},nolock,soft,retrans=1,timeo={tenths},"
        "port={port},mountport={port},addr={address},mountaddr={address}"
    ).format(
        tcp="tcp" if family is Family.V4 else "tcp6",
        tenths=int(TRIED_S * PATIENCE * 10),
        port=target.port,
        address=target.address,
    )
    host = target.address if family is Family.V4 else f"[{target.address}]"
    node.run(["mount", "-i", "-t", "nfs", "-o", options, f"{host}:/", str(path)])
    try:
        yield path
    finally:
        node.run(["umount", "-fl", str(path)])


def _server(mounted: Path) -> str:
    """Who answers the file system now; what went wrong when nobody does."""
    try:
        found = os.statvfs(mounted)
    except OSError as error:
        return str(error)
    size_mib = found.f_blocks * found.f_frsize >> 20
    return next((name for name, each in SIZES_MIB.items() if each == size_mib), str(size_mib))


def _talks_to(node: Node, address: str) -> bool:
    """Whether a socket of the node's is connected to that address."""
    return address in node.run(["ss", "-Htn", "state", "established"])


@every_translation
def test_mounted_file_system_moves_on_with_its_service(
    cluster: Cluster, socket_lb: SocketLB
) -> None:
    """P2: the kernel keeps the service's address, not the endpoint's that its socket was connected
    to. When that pod ends it is refused, with an error it knows how to wait with, and then reaches
    the other one.
    """
    (node,) = cluster.nodes
    web, pods = Web(1), (node.add_pod("web1"), node.add_pod("web2"))
    servers = [_serve(pod, web) for pod in pods]
    agent = Agent(node, _settings(cluster, node, socket_lb))
    with agent, ExitStack() as stack, ThreadPoolExecutor() as threads:
        _publish(agent, web, pods[:1])
        targets = [web.at_cluster_ip(family, Protocol.TCP) for family in Family]
        mounted = [
            stack.enter_context(_mounted(node, *each)) for each in zip(Family, targets, strict=True)
        ]
        assert [*map(_server, mounted)] == ["web1", "web1"]
        for family, target in zip(Family, targets, strict=True):
            # What the hooks translate never has the service's address.
            assert _talks_to(node, target.address) is (socket_lb is SocketLB.OFF)
            assert _talks_to(node, pods[0].address(family)) is (socket_lb is SocketLB.FULL)
        _publish(agent, web, [])
        servers[0].kill()
        answers = [threads.submit(_server, each) for each in mounted]
        wait_out(REFUSED_S)
        assert not any(answer.done() for answer in answers)
        _publish(agent, web, pods[1:])
        assert [answer.result() for answer in answers] == ["web2", "web2"]
    assert UNKNOWN_ERROR not in node.run(["dmesg"])


def _settings(cluster: Cluster, node: Node, socket_lb: SocketLB) -> Settings:
    """Of an agent whose hooks see every process of the machine, and kernel threads."""
    manifests = cluster.folder / "manifests"
    manifests.mkdir()
    write_manifests(manifests / "nodes.yaml", node_manifests([node]))
    settings = cluster.settings(node, manifests)
    ebpf = {"cgroup_root": cgroup2_root(), "socket_lb": socket_lb}
    return settings.model_copy(update={"ebpf": settings.ebpf.model_copy(update=ebpf)})


def _publish(agent: Agent, web: Web, pods: Sequence[Pod]) -> None:
    """Give the service these endpoints; returns once the kernel has them."""
    before = agent.status().get("revision", 0)
    assert agent.settings.manifests is not None
    write_manifests(agent.settings.manifests / "web.yaml", web.manifests(pods))
    eventually(lambda: agent.status()["revision"] > before)


def _serve(pod: Pod, web: Web) -> subprocess.Popen[str]:
    """Let a pod export a file system; returns its server, which says who it is."""
    argv = python_argv("tests.lib.nfs_server", site_packages=False)
    server = pod.popen([*argv, str(web.target_port), str(SIZES_MIB[pod.name])])
    eventually(lambda: str(web.target_port) in pod.run(["ss", "-Htln"]))
    return server
