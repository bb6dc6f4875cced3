"""The agent dies, returns, meets what others left, and lives long: traffic does not notice, and
nothing stays behind.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.dataplane.ebpf import constants, tables
from ebpf_svc.errors import CommandError
from ebpf_svc.host import bpf
from ebpf_svc.model.desired import FrontendKey, FrontendView
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.modes import make_dataplane
from ebpf_svc.testbed import drivers, kernel
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.namespace import Namespace, python_argv
from ebpf_svc.testbed.traces import filters
from ebpf_svc.testbed.traffic import Load, ask, connection, load, serve
from tests.lib import netfilter
from tests.lib.crasher import crasher
from tests.lib.manifests import PROTOCOLS, Web, node_manifests
from tests.lib.variants import Variant
from tests.lib.waiting import eventually
from tests.lib.world import write_manifests

SEED = int(os.environ.get("EBPF_SVC_SEED") or secrets.randbits(32))
KILLS = 50
WORKERS = 1
LIVE_EVERY, LIVE_S = 5, 0.1
"""One kill in so many hits an agent that serves, within so long; the others one that starts."""
START_MAX_S = 1.0
"""A busy machine starts an agent in seconds: let the kills fall into its beginning."""
CHANGE_EVERY_S = 0.03


class Site:
    """An agent on a node of its own, one service that is asked all the time, and others."""

    def __init__(self, cluster: Cluster, variant: Variant) -> None:
        (self.node,) = cluster.nodes
        self.cluster, self.mode = cluster, variant.mode
        self.web1, self.web2 = self.node.add_pod("web1"), self.node.add_pod("web2")
        self.sandbox = self.node.add_sandbox_pod("sandbox1")
        netfilter.suit(self.node, variant.mode)
        if variant.ebpf.get("xdp"):
            hosts = (self.node, cluster.client, self.sandbox, self.web1, self.web2)
            drivers.prepare(cluster.router, hosts)
        self.manifests = cluster.folder / "manifests"
        self.manifests.mkdir()
        self.write("nodes", node_manifests([self.node]))
        self.web = Web(1)
        self.publish(self.web)
        settings = cluster.settings(self.node, self.manifests)
        ebpf = settings.ebpf.model_copy(update=dict(variant.ebpf))
        self.agent = Agent(self.node, settings.model_copy(update={"ebpf": ebpf}), mode=variant.mode)

    @property
    def pins(self) -> Path:
        return tables.pin_dir(self.agent.settings.ebpf)

    def write(self, name: str, objects: Sequence[Mapping[str, Any]]) -> None:
        write_manifests(self.manifests / f"{name}.yaml", objects)

    def publish(self, web: Web, pods: str = "12") -> None:
        """Give a service the pods of these numbers, which answer on its port."""
        chosen = [{"1": self.web1, "2": self.web2}[number] for number in pods]
        for pod in chosen:
            serve(pod, tcp=[web.target_port], udp=[web.target_port])
        self.write(web.name, web.manifests(chosen))

    def withdraw(self, web: Web) -> None:
        (self.manifests / f"{web.name}.yaml").unlink(missing_ok=True)

    def held(self) -> dict[FrontendKey, FrontendView]:
        """What the node's kernel serves."""
        with self.node.namespace.entered():
            return make_dataplane(self.mode, self.agent.settings).read()

    def server(self, web: Web, asker: Host | None = None) -> str:
        """Who answers a service; empty = nobody."""
        target = web.at_cluster_ip(Family.V4, Protocol.TCP)
        return ask(asker or self.node, target.address, target.port, timeout_s=0.5)[0].server

    def said(self, word: str) -> bool:
        return word in self.agent.log_path.read_text()

    @contextmanager
    def loads(self) -> Iterator[dict[str, Load]]:
        """Every kind of client asks the service during the block."""
        # A connected UDP socket is told when its endpoint goes: true, and no answer.
        options = {"timeout_s": 3.0, "connected": False}
        kinds = [(family, protocol) for family in Family for protocol in PROTOCOLS]
        cluster_ips = [self.web.at_cluster_ip(*kind, **options) for kind in kinds]
        inside: tuple[Host, ...] = (self.node, self.web2, self.sandbox)
        askers = dict.fromkeys(inside, cluster_ips)
        askers[self.cluster.client] = [
            self.web.at_node(self.node, *kind, **options) for kind in kinds
        ]
        with ExitStack() as stack:
            yield {
                asker.name: stack.enter_context(load(asker, asked, workers=WORKERS, pause_ms=25.0))
                for asker, asked in askers.items()
            }


@pytest.fixture
def site(variant: Variant, artifact_cache: Path, no_leftovers: None) -> Iterator[Site]:
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        site = Site(cluster, variant)
        with site.agent:
            yield site


def _failures(running: Mapping[str, Load]) -> list[str]:
    """End loads; their first failed requests. Each must have had answers."""
    ended = {name: one.stop() for name, one in running.items()}
    assert all(account.ok for account in ended.values()), ended
    return [f"{name}: {one}" for name, account in ended.items() for one in account.failures]


@pytest.mark.timeout(300)
def test_agent_killed_at_any_point_of_its_applies_under_load(site: Site) -> None:
    """Wherever a crash falls, requests go on, and the next agent makes the kernel right (Z2)."""
    print(f"EBPF_SVC_SEED={SEED}")
    chance = random.Random(SEED)
    churning = [Web(number) for number in range(2, 14)]
    for web in churning:
        site.publish(web)
    with site.loads() as running:
        site.agent.kill()
        with crasher(site.agent, site.mode) as crashing, _changes(site, churning, chance):
            start_s = min(crashing.crash(0.0, since="ready"), START_MAX_S)
            for number in range(KILLS):
                if number % LIVE_EVERY:
                    crashing.crash(chance.uniform(0, start_s))
                else:
                    crashing.crash(chance.uniform(0, LIVE_S), since="ready")
        site.agent.start()
        assert _failures(running) == []
    survived = site.held()
    site.agent.stop()
    site.agent.cleanup()
    site.agent.start()
    assert survived == site.held()


@contextmanager
def _changes(site: Site, churning: Sequence[Web], chance: random.Random) -> Iterator[None]:
    """Services come, go and change all the time during the block; the asked one keeps a pod."""
    done = threading.Event()

    def change() -> None:
        while not done.wait(CHANGE_EVERY_S):
            web, pods = chance.choice(churning), chance.choice(("", "1", "2", "12", "gone"))
            if pods == "gone":
                site.withdraw(web)
            else:
                site.publish(web, pods)
            site.publish(site.web, chance.choice(("1", "12")))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_folder_changed_while_no_agent_ran(site: Site) -> None:
    """Services that went, came and changed meanwhile are as the folder says after the start."""
    gone, changed, new, same = webs = [Web(number) for number in range(2, 6)]
    for web in (gone, changed, same):
        site.publish(web, "1")
    eventually(
        lambda: [site.server(web) for web in webs], until=["web1", "web1", "", "web1"].__eq__
    )
    site.agent.stop()
    site.withdraw(gone)
    site.publish(changed, "2")
    site.publish(new, "2")
    site.agent.start()
    assert [site.server(web) for web in webs] == ["", "web2", "web2", "web1"]
    assert [site.server(web, site.sandbox) for web in webs] == ["", "web2", "web2", "web1"]


@pytest.mark.usefixtures("programs")
def test_maps_of_another_layout_give_way_under_load(site: Site) -> None:
    """A version with other maps takes over: only requests under way at that moment may be lost."""
    with site.loads() as running:
        eventually(lambda: all(one.read().ok for one in running.values()), within_s=20)
        site.agent.kill()
        before = site.held()
        site.pins.rename(site.pins.with_name(f"v{constants.LAYOUT_VERSION - 1}"))
        _open_and_close(site)
        # Its maps are empty still: those of the old version serve.
        assert site.server(site.web, site.sandbox)
        site.agent.start()
        for one in running.values():
            assert one.read(reset=True).failed <= WORKERS
        eventually(lambda: all(one.read().ok > 5 for one in running.values()), within_s=20)
        assert _failures(running) == []
    assert [path.name for path in site.pins.parent.iterdir()] == [site.pins.name]
    assert site.held() == before


def _open_and_close(site: Site) -> None:
    """Get as far as a start that dies before anything is applied."""
    with site.node.namespace.entered():
        made = make_dataplane(site.mode, site.agent.settings)
        made.open()
        made.close()


@pytest.mark.usefixtures("programs")
def test_bpf_file_system_unmounted_under_the_agent(site: Site) -> None:
    """Whoever takes the pins away costs nothing: they are back, said, and the next agent adopts."""
    bpffs = site.node.folders.bpffs
    target = site.web.at_cluster_ip(Family.V4, Protocol.TCP)
    with connection(site.sandbox, target) as conn, site.loads() as running:
        server = conn.ping().server
        kernel.unmount(bpffs)
        kernel.mount("bpf", bpffs, "bpf")
        site.agent.send_signal(signal.SIGHUP)
        eventually(lambda: site.said("pinned again"))
        pins = sorted(path.name for path in site.pins.iterdir())
        site.agent.restart()
        assert sorted(path.name for path in site.pins.iterdir()) == pins
        assert conn.ping().server == server
        assert _failures(running) == []


def test_second_agent_refuses_and_harms_nothing(site: Site) -> None:
    """Started by mistake: it names the one that runs and ends, and nobody notices."""
    pid = site.agent.status()["pid"]
    with site.loads() as running:
        with pytest.raises(CommandError, match=f"pid {pid}"):
            site.agent.command("run", "--mode", site.mode)
        before = site.held()
        site.publish(Web(2), "1")
        eventually(lambda: site.server(Web(2)), until="web1".__eq__)
        assert _failures(running) == []
    assert site.held().keys() > before.keys()
    assert (site.agent.running, site.agent.status()["pid"]) == (True, pid)


@pytest.mark.usefixtures("programs")
def test_second_agent_with_another_run_directory_refuses_too(site: Site) -> None:
    """The BPF file system has one user, whatever the settings say."""
    pid = site.agent.status()["pid"]
    settings = site.agent.settings.model_copy(update={"run_dir": site.cluster.folder / "run2"})
    config = site.cluster.folder / "second.json"
    config.write_text(settings.model_dump_json())
    argv = [*python_argv("ebpf_svc.cli"), "run", "--config", str(config), "--mode", "ebpf"]
    with pytest.raises(CommandError, match=f"pid {pid}"):
        site.node.run(argv)
    assert site.server(site.web, site.sandbox)


PODS = 1_000
BATCH = 100
GROUP = 77
MEMORY_SLACK_BYTES = 8 << 20


def test_a_thousand_pods_leave_nothing_behind(site: Site) -> None:
    """Pods that come and go, devices and endpoints, leave no entry, filter, file or memory."""
    web = Web(2)
    devices = _devices(site)
    _batch(site, web, range(BATCH))  # whatever is made once is made now
    before = _resources(site)
    for start in range(BATCH, BATCH + PODS, BATCH):
        _batch(site, web, range(start, start + BATCH))
    assert _devices(site) == devices
    eventually(lambda: _leaked(before, _resources(site)), until={}.__eq__, within_s=40)
    assert site.server(site.web, site.sandbox)


def _batch(site: Site, web: Web, numbers: range) -> None:
    """Pods appear, are given a service, and go with all that is theirs."""
    revision = site.agent.status()["revision"]
    names = [f"veth{number:08x}" for number in numbers]
    far = Namespace(f"{site.node.namespace.name}-far")
    try:
        lines = [
            f"link add {name} group {GROUP} up type veth peer name {name} netns {far.name}"
            for name in names
        ]
        site.node.run(["ip", "-batch", "-"], stdin="\n".join(lines))
        endpoints = [f"10.244.{9 + number // 250}.{number % 250 + 1}" for number in numbers]
        site.write(web.name, _with_endpoints(web, site, endpoints))
        eventually(lambda: site.agent.status()["revision"] > revision, within_s=20)
        if site.mode == "ebpf":
            eventually(lambda: filters(site.node, names[-1]), within_s=20)
        revision = site.agent.status()["revision"]
        site.withdraw(web)
        eventually(lambda: site.agent.status()["revision"] > revision, within_s=20)
        site.node.run(["ip", "link", "delete", "group", str(GROUP)])
    finally:
        far.close()


def _with_endpoints(web: Web, site: Site, addresses: Sequence[str]) -> list[dict[str, Any]]:
    """The service's manifests, with endpoints at these addresses of its IPv4 slice."""
    objects = web.manifests([site.web1])
    (endpoint,) = objects[1]["endpoints"]
    objects[1]["endpoints"] = [{**endpoint, "addresses": [one]} for one in addresses]
    return objects


def _devices(site: Site) -> list[str]:
    return sorted(link["ifname"] for link in json.loads(site.node.run(["ip", "-j", "link"])))


def _resources(site: Site) -> dict[str, int]:
    """What the agent and the kernel hold for it, counted."""
    process = Path("/proc", str(site.agent.status()["pid"]))
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    found = {
        "file descriptors": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
        "memory": resident,
        "frontends": len(site.held()),
        "rules": len(site.node.run(["nft", "list", "ruleset"]).splitlines()),
    }
    if site.mode == "ebpf":
        found |= {name: _entries(site.pins / name) for name in ENTRIES_OF_THE_AGENT}
        found["filters"] = sum(len(filters(site.node, one)) for one in _devices(site))
    return found


ENTRIES_OF_THE_AGENT = tuple(
    f"{name}{family}"
    for name in ("frontends", "backend_index", "source_ranges", "links")
    for family in (4, 6)
)


def _entries(pin: Path) -> int:
    fd = bpf.get_pinned(pin)
    try:
        size, count, key = bpf.map_facts(fd).key_size, 0, None
        while key := bpf.next_key(fd, key, size):
            count += 1
        return count
    finally:
        os.close(fd)


def _leaked(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    slack = {"memory": MEMORY_SLACK_BYTES}
    return {
        name: (before[name], count)
        for name, count in now.items()
        if count > before[name] + slack.get(name, 0)
    }
