"""A node that changes its mode under traffic, and what may be lost on the way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings, Mode
from ebpf_svc.config.settings import METRICS_PORT
from ebpf_svc.control import Progress, Step, SwitchRequest, ask
from ebpf_svc.errors import CommandError
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.traces import traces
from ebpf_svc.testbed.traffic import Answer, Connection, Load, Target, connection, load, serve
from tests.lib.manifests import Web, node_manifests
from tests.lib.waiting import eventually
from tests.lib.world import write_manifests

WEB = Web(1)
PING_S = 0.05
DRAIN_S = 10.0
"""How long the old mode may wait for what is open. It does that long where UDP flows count."""
DEADLINE_S = 60.0
LOSSY = {
    "ebpf": "while a clsact qdisc comes or goes, the kernel drops what its device sends",
    "userspace": "UDP flows are made to ask the rules anew: an answer under way is not translated",
}
"""Modes which one cannot come from or go to without losing a packet under way, with why."""
LOSSY_AT_ITS_END = {
    "ipvs": (
        "Rules are not asked for a tracked flow: its entry in connection tracking has to go, and "
        "with it as whom the client is masqueraded: an answer under way comes back to nobody. "
        "A socket of the node itself has the cluster IP it calls for its own address, which goes "
        "with kube-ipvs0."
    ),
}
"""Modes that single packets of masqueraded flows and calls of the node are lost with, with why."""
LOSSY_BESIDE = {
    ("ipvs", "ebpf"): (
        "A socket hook connects a pod to the endpoint itself. Where IPVS remembers the same port, "
        "from a connection that ended up to two minutes ago, it takes the answers for its own."
    ),
}
"""Steps in which new connections of pods may fail while the old mode waits, with why."""
LOST = 2
"""How many a client may lose in such a step, on open sockets of a family or on new ones."""
SYN_S = 3.0
"""There TCP may have to repeat a SYN, after a second; elsewhere none is lost."""
TOLD = 4
SETTLED = 20
"""Answers of each load that count as traffic."""


class Site:
    """A node with an agent, endpoints here and elsewhere, and those who ask for them."""

    def __init__(self, cluster: Cluster, mode: str) -> None:
        self.cluster, self.mode = cluster, mode
        self.node, node2 = cluster.nodes
        webs = [self.node.add_pod("web1"), node2.add_pod("web2")]
        for web in webs:
            serve(web, tcp=[WEB.target_port], udp=[WEB.target_port])
        self.shell, self.sandbox = self.node.add_pod("shell1"), self.node.add_sandbox_pod("box1")
        manifests = cluster.folder / "manifests"
        manifests.mkdir()
        objects = [*node_manifests(cluster.nodes), *WEB.manifests(webs)]
        write_manifests(manifests / "all.yaml", objects)
        self.agent = Agent(self.node, cluster.settings(self.node, manifests), mode=mode)

    @property
    def askers(self) -> tuple[Host, ...]:
        return (self.shell, self.sandbox, self.node, self.cluster.client)

    def target(
        self, asker: Host, family: Family, protocol: Protocol, timeout_s: float = 1.0
    ) -> Target:
        """Cluster IPs from inside, the node port from outside."""
        options = {"connected": False, "timeout_s": timeout_s}
        if asker is self.cluster.client:
            return WEB.at_node(self.node, family, protocol, **options)
        return WEB.at_cluster_ip(family, protocol, **options)

    def losing(self, before: str, after: str) -> set[str]:
        """Who may lose a packet or two when this mode follows on that, as `wrong_in` names it."""
        open_udp = tuple(f"{family.label} UDP" for family in Family)
        found: set[str] = set()
        if is_lossy(before, after):
            found |= {f"{each.name} {what}" for each in self.askers for what in (*open_udp, "UDP")}
        if before in LOSSY_AT_ITS_END:
            masqueraded = (self.node, self.cluster.client)
            found |= {f"{each.name} {what}" for each in masqueraded for what in open_udp}
            found |= {f"{self.node.name} {what}" for what in ("UDP", "TCP")}
        if (before, after) in LOSSY_BESIDE:
            found |= {f"{self.shell.name} {what}" for what in ("UDP", "TCP")}
        return found

    def open(self, stack: ExitStack, protocol: Protocol) -> dict[str, Connection]:
        """A connection, or a datagram socket, of everyone in each family."""
        return {
            f"{asker.name} {family.label} {protocol.value}": stack.enter_context(
                connection(asker, self.target(asker, family, protocol))
            )
            for asker in self.askers
            for family in Family
        }

    def without_cgroup(self, server: MockApiServer | None = None) -> Agent:
        """An agent that cannot run eBPF: the cgroup of its socket hooks is not there."""
        settings = self.agent.settings
        told: dict[str, object] = {
            "ebpf": settings.ebpf.model_copy(update={"cgroup_root": Path("/nowhere")})
        }
        if server is not None:
            told |= {"manifests": None, "kubernetes": KubernetesSettings(master=server.url)}
        return Agent(self.node, settings.model_copy(update=told), mode=self.mode)

    @contextmanager
    def api_server(self) -> Iterator[MockApiServer]:
        """An API server on the node's loopback, with the node in it; closed with the block."""

        def make_socket() -> socket.socket:
            with self.node.namespace.entered():
                return socket.socket()

        with closing(MockApiServer(make_socket=make_socket).start()) as server:
            server.put("Node", node_manifests([self.node])[0])
            yield server

    def page(self, path: str) -> str:
        """A page of the metrics address."""
        return self.node.run(["curl", "-s", f"http://127.0.0.1:{METRICS_PORT}{path}"])

    def load(self, stack: ExitStack, *, is_lossy: bool) -> dict[str, Load]:
        """Everyone keeps opening connections and sending from new sockets."""
        tcp_s = SYN_S if is_lossy else 1.0
        return {
            asker.name: stack.enter_context(
                load(
                    asker,
                    [
                        target
                        for family in Family
                        for target in (
                            self.target(asker, family, Protocol.TCP, tcp_s),
                            self.target(asker, family, Protocol.UDP),
                        )
                    ],
                    workers=1,
                    pause_ms=20.0,
                )
            )
            for asker in self.askers
        }

    def held(self) -> Mapping[str, tuple[str, ...]]:
        """What the node's kernel holds, without what changes from run to run."""
        found = dict(traces(self.node))
        found["cgroup program"] = tuple(line.partition(" ")[0] for line in found["cgroup program"])
        found["chain"] = tuple(
            line
            for tool in ("iptables-save", "ip6tables-save")
            for line in _lines(self.node, [tool])
            if line.startswith(":") and ("KUBE" in line or "EBPF" in line)
        )
        devices = _lines(self.node, ["ip", "-br", "link", "show", "type", "dummy"])
        # Not their hardware addresses, which are random.
        found["device"] = tuple(line.split()[0] for line in devices)
        return found


def _lines(node: Node, argv: list[str]) -> list[str]:
    try:
        return sorted(line.partition(" [")[0] for line in node.run(argv).splitlines())
    except CommandError:
        return []


class Pings:
    """Asks on open connections every 50 ms, from a thread of its own, until stopped."""

    def __init__(self, connections: Mapping[str, Connection]) -> None:
        self._connections = connections
        self.rounds = 0
        self.failures: list[tuple[str, Answer]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(PING_S):
            for name, each in self._connections.items():
                answer = each.ping()
                if not answer.ok:
                    self.failures.append((name, answer))
            self.rounds += 1

    def more(self, count: int = 5) -> None:
        """Wait for so many further rounds."""
        before = self.rounds
        eventually(lambda: self.rounds, until=lambda now: now >= before + count, within_s=20)

    def stop(self) -> list[tuple[str, Answer]]:
        self._stop.set()
        self._thread.join()
        return self.failures


class Switch:
    """A switch under way, followed by a thread of its own."""

    def __init__(self, run_dir: Path, mode: str) -> None:
        self.told: list[Progress] = []
        self._request = SwitchRequest(mode=Mode(mode), drain_s=DRAIN_S)
        self._run_dir = run_dir
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        for progress in ask(self._run_dir, self._request):
            self.told.append(progress)

    def reaches(self, *steps: Step) -> Progress:
        """Wait until one of these, or the failure, is told."""
        return eventually(
            lambda: next((each for each in self.told if each.step in (*steps, Step.FAILED)), None),
            within_s=DEADLINE_S,
        )  # type: ignore[return-value]


def wrong_in(
    pings: Sequence[tuple[str, Answer]], loads: Mapping[str, Load], *, losing: Collection[str] = ()
) -> list[str]:
    """What went wrong on open connections and with new ones, the first of each.

    Args:
        pings: failures on open ones.
        loads: who asks on new ones, by name.
        losing: who may lose some: `client IPv4 UDP` on open sockets, `client UDP` on new ones.
    """
    lost: dict[str, list[str]] = {}
    for name, answer in pings:
        lost.setdefault(name, []).append(f"{name}: {answer.outcome} {answer.detail}")
    for name, one in loads.items():
        account = one.stop()
        for each in account.failures:
            key = f"{name} {each['protocol']}"
            words = f"{key}: {each['outcome']} {each['address']} at {each['at_s']} s"
            lost.setdefault(key, []).append(words)
        if account.ok < SETTLED:
            lost.setdefault("", []).append(f"{name}: only {account.ok} answers")
    return [
        sentence
        for key, sentences in lost.items()
        if not (key in losing and len(sentences) <= LOST)
        for sentence in sentences[:TOLD]
    ]


def is_lossy(before: str, after: str) -> bool:
    """Whether anybody may lose a packet in this step."""
    return not LOSSY.keys().isdisjoint((before, after))


def step(site: Site, before: str, after: str) -> list[str]:
    """Switch once; what went wrong, in sentences."""
    with ExitStack() as stack:
        loads = site.load(stack, is_lossy=is_lossy(before, after))
        datagrams = Pings(site.open(stack, Protocol.UDP))
        stack.callback(datagrams.stop)
        with ExitStack() as open_connections:
            connections = Pings(site.open(open_connections, Protocol.TCP))
            open_connections.callback(connections.stop)
            connections.more()
            switch = Switch(site.agent.settings.run_dir, after)
            assert switch.reaches(Step.SERVING).step is Step.SERVING, switch.told
            connections.more()
            # Where the old mode waits for them they have to end; else they outlive it.
            switch.reaches(Step.DRAINING, Step.DONE)
            connections.more()
            lost = connections.stop()
        done = switch.reaches(Step.DONE)
        datagrams.more()
        lost += datagrams.stop()
        wrong = wrong_in(lost, loads, losing=site.losing(before, after))
    if done.step is not Step.DONE:
        wrong.append(str(done))
    status = site.agent.status()
    if status["mode"] != after:
        wrong.append(f"status says {status['mode']}")
    return [f"{before} -> {after}: {sentence}" for sentence in wrong]
