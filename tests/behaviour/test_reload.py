"""Settings that change while the agent runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.traffic import Probe, Target, ask_all, load, serve
from tests.lib.manifests import Web, node_manifests
from tests.lib.waiting import eventually
from tests.lib.world import write_manifests

WEB = Web(1)
TAKEN_S = 2.0


class Site:
    """An agent alone on a node, with one service."""

    def __init__(self, cluster: Cluster, mode: str) -> None:
        (self.node,) = cluster.nodes
        self.cluster, self.mode = cluster, mode
        pod = self.node.add_pod("web1")
        serve(pod, tcp=[WEB.target_port])
        manifests = cluster.folder / "manifests"
        manifests.mkdir()
        objects = [*node_manifests([self.node]), *WEB.manifests([pod])]
        write_manifests(manifests / "all.yaml", objects)
        self.agent = Agent(self.node, cluster.settings(self.node, manifests), mode=mode)

    def change(self, **settings: Any) -> None:
        """Write the agent's file anew, in one step as editors do."""
        changed = {**json.loads(self.agent.config.read_text()), **settings}
        self.write(json.dumps(changed))

    def write(self, text: str) -> None:
        scratch = self.agent.config.with_suffix(".scratch")
        scratch.write_text(text)
        scratch.replace(self.agent.config)

    def lines(self, event: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self.agent.log_path.read_text().splitlines())
        return [line for line in lines if line["event"] == event]

    def node_port_answers(self, family: Family = Family.V4) -> bool:
        return _answers(self.cluster.client, WEB.at_node(self.node, family, Protocol.TCP))


def _answers(host: Host, target: Target) -> bool:
    return ask_all([Probe(host, target)])[0][0].ok


@pytest.fixture
def site(dataplane: str, artifact_cache: Path, no_leftovers: None) -> Iterator[Site]:
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        site = Site(cluster, dataplane)
        with site.agent:
            yield site


def test_node_port_addresses_change_without_a_restart(site: Site) -> None:
    """Node ports leave the addresses no longer selected, and come back; cluster IPs never blink."""
    pid = site.agent.status()["pid"]
    assert site.node_port_answers()
    cluster_ip = WEB.at_cluster_ip(Family.V4, Protocol.TCP)
    with load(site.node, [cluster_ip], workers=2) as running:
        site.change(node_port_addresses=["127.0.0.0/8", "::1/128"])
        eventually(site.node_port_answers, until=lambda ok: not ok, within_s=TAKEN_S)
        if site.mode != "ipvs":  # it leaves alone what comes from 127.0.0.1 (V7)
            assert _answers(site.node, WEB.at_localhost(Family.V4, Protocol.TCP))
        site.change(node_port_addresses=[])
        eventually(site.node_port_answers, within_s=TAKEN_S)
        served = running.stop()
    assert (served.failed, served.ok > 0) == (0, True)
    assert site.agent.status()["pid"] == pid
    assert [line["field"] for line in site.lines("config.changed")] == [["nodePortAddresses"]] * 2


def test_wrong_file_is_refused_and_the_old_settings_stay(site: Site) -> None:
    """The log names file, field and what was expected; the next good file counts again."""
    site.change(node_port_addresses=["127.0.0.0/8"], oom_score_adj="soon")
    (line,) = eventually(partial(site.lines, "config.refused"))
    assert all(word in line["error"] for word in ("agent.json", "oom_score_adj", "soon"))
    site.write("{")
    eventually(partial(site.lines, "config.refused"), until=lambda lines: len(lines) == 2)
    assert site.node_port_answers()
    assert site.lines("config.changed") == []
    site.write(site.agent.settings.model_dump_json())
    site.change(node_port_addresses=["127.0.0.0/8"])
    eventually(site.node_port_answers, until=lambda ok: not ok, within_s=TAKEN_S)


def test_what_needs_a_restart_says_so(site: Site) -> None:
    """What can change live does at once; the rest is named and waits."""
    ebpf = json.loads(site.agent.settings.ebpf.model_dump_json())
    site.change(node_port_addresses=["127.0.0.0/8"], ebpf={**ebpf, "socket_lb": "off"})
    eventually(site.node_port_answers, until=lambda ok: not ok, within_s=TAKEN_S)
    (line,) = site.lines("config.restart-needed")
    assert line["field"] == ["ebpf.socketLB"]


def test_log_level_changes_while_running(site: Site) -> None:
    """An operator who looks for a fault need not restart what shows it."""
    site.change(log={"level": "debug", "format": "json"})
    eventually(lambda: '"level": "debug"' in site.agent.log_path.read_text())
