"""A cluster with an agent on every node and pods to serve and to ask: shared by many tests.

    node1: web1 web2 serve, shell1 and sandbox1 ask      node2: web3 serves, shell2 asks

Services come and go through `publish` and `withdraw`; both return once every agent has them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ebpf_svc.config import Settings, SocketLB
from ebpf_svc.errors import CommandError
from ebpf_svc.host.kubeproxy import LINK
from ebpf_svc.status import read_names
from ebpf_svc.testbed import drivers
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node, Pod
from ebpf_svc.testbed.podnet import PodNetwork
from ebpf_svc.testbed.traces import traces
from ebpf_svc.testbed.traffic import serve
from tests.lib import netfilter
from tests.lib.manifests import Endpoint, Web, node_manifests
from tests.lib.waiting import eventually

SYNC_S = 5.0
ARRAYS = ("backends", "slots")
"""Maps too large to be worth a dump."""


class World:
    """What the behaviour tests stand on; `close()` removes it."""

    def __init__(
        self,
        pod_network: PodNetwork,
        *,
        cache_dir: Path,
        mode: str = "ebpf",
        settings: Mapping[str, Any] | None = None,
        ebpf: Mapping[str, Any] | None = None,
        prepare: Callable[[Cluster], None] = lambda cluster: None,
    ) -> None:
        """Build it and start its agents.

        Args:
            pod_network: how pods are attached.
            cache_dir: where agents keep compiled programs.
            mode: the dataplane.
            settings: fields of `Settings` that differ from the testbed's.
            ebpf: the same of `EbpfSettings`.
            prepare: what to change of the cluster before there are agents.
        """
        self.mode = mode
        self.failed = False
        """A test that used this world failed."""
        self.cluster = Cluster.create(pod_network=pod_network, cache_dir=cache_dir)
        try:
            node1, node2 = self.cluster.nodes
            self.web1, self.web2 = node1.add_pod("web1"), node1.add_pod("web2")
            self.web3 = node2.add_pod("web3")
            self.shell1, self.shell2 = node1.add_pod("shell1"), node2.add_pod("shell2")
            self.sandbox1 = node1.add_sandbox_pod("sandbox1")
            self.webs = (self.web1, self.web2, self.web3)
            self.cluster.route_services(node1)
            self.manifests = self.cluster.folder / "manifests"
            self.manifests.mkdir()
            for node in self.cluster.nodes:
                netfilter.suit(node, mode)
            self._write("nodes", node_manifests(self.cluster.nodes))
            update = dict(settings or {})
            self._ebpf = dict(ebpf or {})
            self.agents = tuple(
                Agent(node, self._settings(node).model_copy(update=update), mode=mode)
                for node in self.cluster.nodes
            )
            prepare(self.cluster)
            if self.uses_drivers:
                drivers.prepare(self.cluster.router, (*self.askers, *self.webs))
            # Together: each spends most of its start waiting for its own imports.
            for agent in self.agents:
                agent.start(wait=False)
            for agent in self.agents:
                agent.wait_ready()
        except BaseException:
            self.close()
            raise
        self._numbers = itertools.count(1)

    def _settings(self, node: Node) -> Settings:
        settings = self.cluster.settings(node, self.manifests)
        return settings.model_copy(update={"ebpf": settings.ebpf.model_copy(update=self._ebpf)})

    @property
    def uses_drivers(self) -> bool:
        """Programs in drivers forward (XDP), so no checksum is left to hardware."""
        return bool(self._ebpf.get("xdp"))

    @property
    def translates_host_packets(self) -> bool:
        """Processes of nodes are translated by packet, not when they name whom they call."""
        is_off = self._ebpf.get("socket_lb") is SocketLB.OFF
        return self.mode in netfilter.MODES or is_off

    @property
    def askers(self) -> tuple[Host, ...]:
        """One host of each kind: pods of both nodes, a sandboxed pod, node processes, outside."""
        cluster = self.cluster
        return (self.shell1, self.shell2, self.sandbox1, *cluster.nodes, cluster.client)

    def new_web(self, **options: Any) -> Web:
        """A service that shares no address with any before; not yet published."""
        return Web(next(self._numbers), **options)

    def publish(self, web: Web, endpoints: Sequence[Endpoint | Pod]) -> None:
        """Give a service these endpoints; returns once every agent has told its kernel.

        The pods behind it answer on its target port from then on.
        """
        for one in endpoints:
            pod = one.pod if isinstance(one, Endpoint) else one
            serve(pod, tcp=[web.target_port], udp=[web.target_port])
        before = self._revisions()
        if self._write(web.name, web.manifests(endpoints)):
            self._await_sync(before)
        for agent in self.agents:
            if agent.running:
                assert agent.status()["failed"] == []

    def withdraw(self, *webs: Web) -> None:
        """Take services away again."""
        before = self._revisions()
        paths = [path for path in (self._path(web.name) for web in webs) if path.exists()]
        for path in paths:
            path.unlink()
        if paths:
            self._await_sync(before)
        # Several files may take an agent several passes, and the next test counts them.
        gone = {web.name for web in webs}
        for agent in self.agents:
            if agent.running:
                eventually(partial(_has_none, agent, gone), within_s=SYNC_S)

    @contextmanager
    def configured(self, **changes: Any) -> Iterator[None]:
        """Agents with other settings, started anew for it and once more afterwards."""
        before = [agent.config.read_text() for agent in self.agents]
        try:
            for agent, text in zip(self.agents, before, strict=True):
                agent.config.write_text(json.dumps({**json.loads(text), **changes}))
            self._restart()
            yield
        finally:
            for agent, text in zip(self.agents, before, strict=True):
                agent.config.write_text(text)
            self._restart()

    def _restart(self) -> None:
        for agent in self.agents:
            agent.kill()
        for agent in self.agents:
            agent.start(wait=False)
        for agent in self.agents:
            agent.wait_ready()

    def heal(self) -> None:
        """Start the agents that an earlier test left dead."""
        for agent in self.agents:
            if not agent.running:
                agent.start()

    def own_addresses(self, node: Node) -> set[str]:
        """Every address of a node, not those of services: what masquerading may choose from."""
        links = json.loads(node.run(["ip", "-j", "address"]))
        return {
            entry["local"]
            for link in links
            if link["ifname"] != LINK
            for entry in link["addr_info"]
        }

    def close(self) -> None:
        """End agents and cluster; raises LeftoverError when something stays behind."""
        self.cluster.close()

    def report(self, folder: Path) -> None:
        """Write down everything that explains a failure."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "topology.txt").write_text(self.cluster.describe() + "\n")
        shutil.copytree(self.manifests, folder / "manifests", dirs_exist_ok=True)
        for agent in self.agents:
            if agent.log_path.exists():
                shutil.copy(agent.log_path, folder / f"{agent.node.name}.log")
            for name, text in _state_of(agent):
                (folder / f"{agent.node.name}-{name}").write_text(text)
            _dump_maps(agent.node.folders.bpffs, folder / f"{agent.node.name}-maps")

    def _path(self, name: str) -> Path:
        return self.manifests / f"{name}.yaml"

    def _write(self, name: str, objects: Sequence[Mapping[str, Any]]) -> bool:
        return write_manifests(self._path(name), objects)

    def _revisions(self) -> list[int]:
        return [agent.status().get("revision", 0) for agent in self.agents]

    def _await_sync(self, before: Sequence[int]) -> None:
        """Wait for the running agents only: a killed one has nothing to say."""
        for agent, old in zip(self.agents, before, strict=True):
            if agent.running:
                eventually(partial(_has_passed, agent, old), within_s=SYNC_S)


def _has_none(agent: Agent, gone: set[str]) -> bool:
    """Whether an agent serves none of these any more."""
    names = read_names(agent.settings.run_dir).values()
    return gone.isdisjoint(each.name for each in names)


def write_manifests(path: Path, objects: Sequence[Mapping[str, Any]]) -> bool:
    """Replace a file in one step, as a config map mount does; False when nothing changed."""
    # JSON documents are YAML, and written ten times faster.
    text = "\n---\n".join(json.dumps(one, indent=1) for one in objects) + "\n"
    if path.exists() and path.read_text() == text:
        return False
    # Beside the folder that is watched, not in it.
    scratch = path.parent.with_suffix(".scratch")
    scratch.write_text(text)
    scratch.replace(path)
    return True


def _has_passed(agent: Agent, revision: int) -> bool:
    return int(agent.status()["revision"]) > revision


def _state_of(agent: Agent) -> Iterator[tuple[str, str]]:
    """What a node holds, piece by piece; a piece that cannot be had is its error."""
    pieces: dict[str, Callable[[], str]] = {
        "status.json": lambda: json.dumps(dict(agent.status()), indent=2),
        "show.json": lambda: agent.command("show", "--json"),
        "nft.txt": lambda: agent.node.run(["nft", "list", "ruleset"]),
        "links.txt": lambda: agent.node.run(["ip", "-d", "-s", "address"]),
        "traces.json": lambda: json.dumps(dict(traces(agent.node)), indent=2),
    }
    for name, look in pieces.items():
        try:
            yield name, look()
        except (CommandError, OSError, ValueError) as error:
            yield name, f"{error}\n"


def _dump_maps(bpffs: Path, folder: Path) -> None:
    """Keep the content of the pinned hash maps, where bpftool is at hand.

    The arrays are mostly empty and large; what they mean `show` says better.
    """
    if shutil.which("bpftool") is None:
        return
    folder.mkdir(exist_ok=True)
    for pin in bpffs.rglob("*"):
        if pin.is_file() and not pin.name.startswith(ARRAYS):
            argv = ["bpftool", "map", "dump", "pinned", str(pin)]
            done = subprocess.run(argv, capture_output=True, check=False)
            if done.returncode == 0:
                (folder / pin.name).write_bytes(done.stdout[:1_000_000])
