"""The order of the tour, and that nothing stays behind however it ends."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from ebpf_svc.config import Settings
from ebpf_svc.demo import steps
from ebpf_svc.demo.frontends import ask_frontends
from ebpf_svc.demo.report import Asker, Probe, Report, Step
from ebpf_svc.demo.screen import Screen, make_screen
from ebpf_svc.demo.stage import Stage
from ebpf_svc.errors import EbpfSvcError, UnsupportedHost
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.modes import make_dataplane
from ebpf_svc.testbed import leftovers
from ebpf_svc.testbed.cluster import Cluster


def tour(*, as_json: bool, keep: bool) -> int:
    """Give the tour; see `ebpf_svc.demo.run`."""
    if os.geteuid() != 0:
        raise UnsupportedHost(["root is needed for network namespaces and BPF (sudo make demo)"])
    support = make_dataplane("ebpf", Settings()).check()
    if not support.ok:
        raise UnsupportedHost(support.missing)
    Cluster.cleanup_leftovers()
    report = Report()
    with make_screen(report, silent=as_json) as screen:
        Tour(report, screen).give(keep=keep)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    return 0 if report.held else 1


class Tour:
    """Walks through the parts, each into the report first and onto the screen then."""

    def __init__(self, report: Report, screen: Screen) -> None:
        self._report, self._screen = report, screen
        self._begun = time.monotonic()

    def give(self, *, keep: bool) -> None:
        """Build the cluster, walk, and remove it all unless it is to be kept."""
        self._screen.note("building a cluster of network namespaces")
        cluster = Cluster.create()
        farewell = ""
        try:
            farewell = self._walk(cluster, keep=keep)
        except (EbpfSvcError, LookupError, TimeoutError, OSError) as error:
            self._step(Step("the tour came to its end", False, f"{type(error).__name__}: {error}"))
        finally:
            if not farewell:
                cluster.close()
        if not farewell:
            left = leftovers.traces(cluster.id)
            detail = ", ".join(left) or "no namespace, mount, cgroup or file"
            self._step(Step("the cluster is gone without a trace", not left, detail))
        self._screen.finish(time.monotonic() - self._begun, farewell)

    def _walk(self, cluster: Cluster, *, keep: bool) -> str:
        """Show everything; returns how to enter a cluster that is kept, else an empty text."""
        stage = Stage(cluster)
        self._report.topology = cluster.describe(brief=True)
        hosts = 2 + len(cluster.nodes) + len(list(cluster.pods))
        self._step(Step("the cluster is up", True, f"{hosts} hosts after {self._elapsed()}"))
        self._screen.note("starting an agent on each node")
        stage.start_agents()
        self._step(Step("an agent on each node is ready", True, f"after {self._elapsed()}"))
        for probes in ask_frontends(stage):
            self._probes(probes)
        note = self._screen.note
        for try_it in (steps.refuse, steps.hold_affinity, steps.expire_affinity):
            self._step(try_it(stage, note))
        for change in steps.add_and_remove(stage, note):
            self._step(change)
        self._step(steps.restart_agent(stage, note))
        if keep:
            cluster.keep()
        else:
            self._step(steps.clean_up(stage, note))
        self._report.finished = True
        return _how_to_enter(stage) if keep else ""

    def _probes(self, probes: Sequence[Probe]) -> None:
        self._report.probes += probes
        self._screen.show_probes(probes)

    def _step(self, step: Step) -> None:
        self._report.steps.append(step)
        self._screen.show_step(step)

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begun:.1f} s"


def _how_to_enter(stage: Stage) -> str:
    pod, node = stage.askers[Asker.POD].namespace, stage.askers[Asker.HOST].namespace
    web = next(stage.targets("web", FrontendKind.CLUSTER_IP))
    return f"""
The cluster stays up: its services answer, its agents follow {stage.manifests}

  ip netns exec {pod.name} curl http://{web.address}:{web.port}/     ask from a pod
  ip netns exec {node.name} bash         enter a node
  {sys.executable} -m ebpf_svc.cli show --config {stage.agents[0].config}

Remove it:  {sys.executable} -m ebpf_svc.testbed.leftovers
"""
