"""Every mode after every other, under traffic: `ebpf-svc switch`, and a start in another mode."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings, Mode, Settings
from ebpf_svc.config.settings import METRICS_PORT
from ebpf_svc.control import Progress, Step, SwitchRequest, ask
from ebpf_svc.errors import CommandError
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.modes import MODES, make_dataplane
from ebpf_svc.testbed.agent import Agent, AgentError
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.traces import traces
from ebpf_svc.testbed.traffic import Answer, Connection, Load, Target, connection, load, serve
from tests.lib.manifests import Web, node_manifests
from tests.lib.variants import VARIANTS
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


def tour(modes: Sequence[str], about: str = "") -> list[str]:
    """A way from the first mode back to it that takes every step from one to another once.

    About a mode: the steps from it and to it alone.
    """
    steps = {
        mode: [other for other in modes if other != mode and about in ("", mode, other)]
        for mode in modes
    }
    way, found = [modes[0]], []
    while way:
        if steps[way[-1]]:
            way.append(steps[way[-1]].pop())
        else:
            found.append(way.pop())
    return found[::-1]


def test_tour_takes_every_step_once() -> None:
    """Else a pair of modes would go untested."""
    way = tour(["a", "b", "c", "d"])
    steps = sorted(itertools.permutations("abcd", 2))
    assert sorted(itertools.pairwise(way)) == steps
    about = tour(["a", "b", "c", "d"], about="c")
    assert sorted(itertools.pairwise(about)) == [step for step in steps if "c" in step]


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
        """Who may lose a packet or two when this mode follows on that one, as `_wrong` names it."""
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


def _wrong(
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


def can_run(mode: str) -> bool:
    return make_dataplane(mode, Settings()).check().ok


@pytest.fixture
def cluster(artifact_cache: Path, no_leftovers: None) -> Iterator[Cluster]:
    with Cluster.create(cache_dir=artifact_cache) as cluster:
        yield cluster


def _step(site: Site, before: str, after: str) -> list[str]:
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
        wrong = _wrong(lost, loads, losing=site.losing(before, after))
    if done.step is not Step.DONE:
        wrong.append(str(done))
    status = site.agent.status()
    if status["mode"] != after:
        wrong.append(f"status says {status['mode']}")
    return [f"{before} -> {after}: {sentence}" for sentence in wrong]


@pytest.fixture
def about(request: pytest.FixtureRequest) -> str:
    """The mode this run is about: that of the one `--variant` asked for; "" = every mode."""
    chosen = {VARIANTS[name].mode for name in request.config.getoption("dataplane") or ()}
    return chosen.pop() if len(chosen) == 1 else ""


def test_switch_loses_no_connection_and_leaves_no_trace(cluster: Cluster, about: str) -> None:
    """Open connections go on, new ones never fail, UDP goes on, and the old mode is gone (Z3, B15).

    Each mode after each other that can run here: what a node holds then is the same whichever mode
    was before, and nothing of any in the end.
    """
    modes = [mode for mode in MODES if can_run(mode)]
    way, site = tour(modes, about), Site(cluster, modes[0])
    clean = site.held()
    wrong: list[str] = []
    held: dict[str, Mapping[str, tuple[str, ...]]] = {}
    with site.agent:
        held[way[0]] = site.held()
        for before, after in itertools.pairwise(way):
            begun = time.monotonic()
            wrong += _step(site, before, after)
            now = _settled(site, held.get(after))
            wrong += _differences(f"{before} -> {after}", held.setdefault(after, now), now)
            print(f"{before} -> {after}: {time.monotonic() - begun:.1f} s")
    wrong += _differences("in the end", clean, site.held())
    assert wrong == []


def _ours(held: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Pins of ours; the file system has some of its own."""
    return [pin for pin in held["pin"] if not pin.endswith(".debug")]


def _settled(
    site: Site, expected: Mapping[str, tuple[str, ...]] | None
) -> Mapping[str, tuple[str, ...]]:
    """What the node holds, once what was removed with the old mode's is back."""
    deadline = time.monotonic() + 3.0
    while True:
        now = site.held()
        if now == expected or (expected is None) or time.monotonic() > deadline:
            return now
        time.sleep(0.1)


def _differences(
    what: str, one: Mapping[str, tuple[str, ...]], other: Mapping[str, tuple[str, ...]]
) -> list[str]:
    return [
        f"{what}: {kind}: {sorted(set(one[kind]) ^ set(other[kind]))}"
        for kind in one
        if sorted(one[kind]) != sorted(other[kind])
    ]


OTHER = "iptables"
"""A mode that every machine of developers has."""


@pytest.fixture
def not_about_a_third(about: str) -> None:
    """For tests of these two modes alone: a run about another does without them."""
    if about not in ("", "ebpf", OTHER):
        pytest.skip(f"is about ebpf and {OTHER}, not about {about}")


@pytest.mark.usefixtures("not_about_a_third")
@pytest.mark.parametrize(("before", "after"), [("ebpf", OTHER), (OTHER, "ebpf")])
def test_start_in_another_mode_is_a_switch_too(cluster: Cluster, before: str, after: str) -> None:
    """What a gone agent left goes on until the new one serves, and until its connections end."""
    if not can_run(before) or not can_run(after):
        pytest.skip(f"{before} or {after} cannot run here: see `ebpf-svc check`")
    site = Site(cluster, before)
    settings = site.agent.settings
    with Agent(site.node, settings, mode=after):
        alone = site.held()
    site.agent.start()
    with ExitStack() as stack:
        loads = site.load(stack, is_lossy=True)
        with ExitStack() as open_connections:
            connections = Pings(site.open(open_connections, Protocol.TCP))
            open_connections.callback(connections.stop)
            connections.more()
            site.agent.stop()
            connections.more()
            agent = stack.enter_context(Agent(site.node, settings, mode=after))
            connections.more(40)
            lost = connections.stop()
        eventually(
            lambda: _differences("", alone, site.held()), until=lambda two: not two, within_s=20
        )
        assert agent.status()["mode"] == after
        assert _wrong(lost, loads, losing=site.losing(before, after)) == []


@pytest.mark.usefixtures("not_about_a_third")
def test_mode_that_cannot_run_is_told_everywhere(cluster: Cluster) -> None:
    """Log, status, metric and an Event on the Node; the next mode serves, nothing is left of it."""
    site = Site(cluster, "auto")
    with site.api_server() as server, site.without_cgroup(server) as agent:
        mode = agent.status()["mode"]
        assert mode in MODES[1:]
        assert "nowhere" in agent.status()["refused"]["ebpf"]
        (line,) = [line for line in agent.log_tail(1000).splitlines() if "mode.refused" in line]
        assert '"mode": "ebpf"' in line
        metrics = site.page("/metrics")
        assert f'ebpf_svc_mode{{mode="{mode}"}} 1.0' in metrics
        assert 'ebpf_svc_mode_refused{mode="ebpf"' in metrics
        assert site.page("/proxyMode") == mode
        events = {each["reason"]: each for each in server.created}
        event = eventually(lambda: events.get("ProxyModeFallback"))
        assert event["regarding"]["name"] == "node1"
        assert "ebpf: " in event["note"]
        assert "nowhere" in agent.command("show")
        eventually(
            site.held, until=lambda held: not held["clsact"] and not _ours(held), within_s=30
        )


@pytest.mark.usefixtures("not_about_a_third")
def test_named_mode_that_cannot_run_ends_the_start(cluster: Cluster) -> None:
    """With what is missing; whoever names a mode may have a reason, so nothing else serves."""
    agent = Site(cluster, "ebpf").without_cgroup()
    with pytest.raises(AgentError, match="nowhere"):
        agent.start()
    agent.cleanup()


@pytest.mark.usefixtures("not_about_a_third")
def test_mode_that_cannot_run_is_refused_by_the_switch(cluster: Cluster) -> None:
    """The command says why and ends with 1; what serves goes on and nothing was touched."""
    site = Site(cluster, OTHER)
    with site.without_cgroup() as agent:
        held = site.held()
        with pytest.raises(CommandError, match="nowhere") as caught:
            agent.command("switch", "ebpf")
        assert caught.value.code == 1
        assert agent.status()["mode"] == OTHER
        assert _differences("", held, site.held()) == []


@pytest.mark.usefixtures("not_about_a_third")
def test_mode_in_the_settings_changes_while_the_agent_runs(cluster: Cluster) -> None:
    """An edit of the file is a switch; one of something else leaves a mode chosen by hand."""
    site = Site(cluster, OTHER)
    agent = Agent(
        site.node, site.agent.settings.model_copy(update={"mode": Mode(OTHER)}), mode=None
    )

    def write(**fields: object) -> None:
        agent.config.write_text(json.dumps({**json.loads(agent.config.read_text()), **fields}))

    with agent, ExitStack() as stack:
        pid, loads = agent.status()["pid"], site.load(stack, is_lossy=True)
        write(mode="ebpf")
        eventually(lambda: agent.status()["mode"], until="ebpf".__eq__, within_s=20)
        agent.command("switch", OTHER, "--drain-s", "0")
        write(resync_period_s=20)
        eventually(lambda: agent.log_tail().count("config.changed"), until=(2).__eq__)
        assert (agent.status()["mode"], agent.status()["pid"]) == (OTHER, pid)
        assert _wrong([], loads, losing=site.losing(OTHER, "ebpf")) == []
