"""From a change to the kernel: seconds, writes, CPU, and what the agent weighs; of any mode.

Planner and dataplane are the agent's own and the kernel's tables real. The agent itself runs on a
node of the testbed, from manifests. What the real kube-proxy took for the same work stands beside.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc import log
from ebpf_svc.bench import kubeproxy
from ebpf_svc.bench.applied import EBPF, Subject, opener
from ebpf_svc.bench.population import Population
from ebpf_svc.bench.progress import Progress
from ebpf_svc.bench.record import Record
from ebpf_svc.modes import MODES
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster

SERVICES = (1_000, 5_000, 10_000)
ENDPOINTS = 10
COLD_S, CHANGE_MS, CHANGE_CPU_MS, RESIDENT_MIB, START_S, EXEC_S = 1.0, 10.0, 5.0, 120.0, 1.0, 3.0
"""What eBPF shall reach; all but the warm start with 10,000 services of ten endpoints."""
_FULL_SIZE = 10_000
_SMALL = Population(10, 2)
_AGENT_DEADLINE_S = 600.0
_MIB = 1024.0


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure."""

    mode: str = EBPF
    services: Sequence[int] = SERVICES
    endpoints: int = ENDPOINTS
    cold: int = 5
    """Cold applies of each size."""
    changes: int = 200
    """Single changes of each size."""
    starts: int = 7
    """Starts of the agent with a small cluster."""
    agent: bool = True
    """Also run the agent."""


DEFAULTS = Options()


def run(json_path: Path | None = None, options: Options = DEFAULTS) -> int:
    """Measure, print the table, write the samples; returns the exit status."""
    record = Record(
        "apply",
        parameters={
            "mode": options.mode,
            "services": list(options.services),
            "endpoints": options.endpoints,
            "cold": options.cold,
            "changes": options.changes,
            "starts": options.starts,
        },
    )
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="ebpf-svc-bench-") as scratch:
        folder = Path(scratch)
        with Cluster.create(node_count=1, cache_dir=folder / "cache") as cluster:
            (node,) = cluster.nodes
            open_one = opener(options.mode, cluster.settings(node, folder), node, folder)
            for services in options.services:
                population = Population(services, options.endpoints)
                is_judged = options.mode == EBPF and services == _FULL_SIZE
                limits = (COLD_S, CHANGE_MS, CHANGE_CPU_MS) if is_judged else None
                subject = Subject(record, options.mode, population, open_one, limits)
                progress.doing(f"{options.mode}, {subject.name}: cold")
                subject.measure_cold(options.cold)
                progress.doing(f"{options.mode}, {subject.name}: changes")
                subject.measure_changes(options.changes)
            if options.agent:
                _measure_agent(record, options, cluster, folder, progress)
    record.print()
    print(f"\nkube-proxy: {kubeproxy.source()}; change: its median")
    if json_path is not None:
        record.write(json_path)
    return 0


def _measure_agent(
    record: Record, options: Options, cluster: Cluster, folder: Path, progress: Progress
) -> None:
    """How fast the real agent starts, and what it weighs."""
    starts_s = []
    agent = _agent(cluster, options, _SMALL, folder / "small")
    progress.doing(f"{options.mode}: agent, small cluster")
    try:
        for turn in range(options.starts + 1):
            ready_s = _started_s(agent)
            if turn:  # the first start compiles
                starts_s.append(ready_s)
            agent.stop()
    finally:
        agent.stop()
        agent.cleanup()
    record.add(
        f"start to ready, warm cache, {_SMALL.services} services",
        starts_s,
        "s",
        limit=START_S if options.mode == EBPF else None,
    )
    for services in options.services:
        progress.doing(f"{options.mode}: agent, {services:,} services")
        name = f"{services:,} x {options.endpoints}"
        is_full = options.mode == EBPF and services == _FULL_SIZE
        manifests = folder / f"of-{services}"
        manifests.mkdir()
        Population(services, options.endpoints).write_manifests(manifests)
        if is_full:
            shutil.rmtree(folder / "cache")
            ready_s, cpu_s, _, _ = _start(options.mode, manifests, folder / "cache")
            title = f"{name} agent, exec to ready, compiling"
            record.add(
                title, [ready_s], "s", limit=EXEC_S, beside=_beside(options, services, "cold_s")
            )
            record.add(f"{title}, CPU", [cpu_s], "s")
        ready_s, cpu_s, resident, peak = _start(options.mode, manifests, folder / "cache")
        record.add(
            f"{name} agent, resident",
            [resident],
            "MiB",
            limit=RESIDENT_MIB if is_full else None,
            beside=_beside(options, services, "memory_mib"),
        )
        record.add(f"{name} agent, resident at most", [peak], "MiB")
        title = f"{name} agent, exec to ready"
        record.add(title, [ready_s], "s", beside=_beside(options, services, "cold_s"))
        record.add(f"{name} agent, CPU until ready", [cpu_s], "s")


def _beside(options: Options, services: int, what: str) -> str:
    return kubeproxy.beside(options.mode, services, options.endpoints, what)


def _start(mode: str, manifests: Path, cache_dir: Path) -> tuple[float, float, float, float]:
    """Start an agent on a node of its own: seconds to ready, of CPU by then, MiB resident and most.

    The node goes with all its rules, which tidying up would take minutes for in some modes.
    """
    with Cluster.create(node_count=1, cache_dir=cache_dir) as cluster:
        (node,) = cluster.nodes
        agent = Agent(node, cluster.settings(node, manifests), mode=mode)
        ready_s = _started_s(agent)
        pid = int(agent.status()["pid"])
        cpu_s = _cpu_s(pid)
        # What start-up needed is given back within the second.
        time.sleep(1)
        resident_mib, most_mib = _memory_mib(pid)
        agent.kill()
        return ready_s, cpu_s, resident_mib, most_mib


def _started_s(agent: Agent) -> float:
    """Start an agent, however long it takes; seconds until it was ready."""
    started = time.monotonic()
    agent.start(wait=False)
    agent.wait_ready(_AGENT_DEADLINE_S)
    return time.monotonic() - started


def _agent(cluster: Cluster, options: Options, population: Population, folder: Path) -> Agent:
    folder.mkdir()
    population.write_manifests(folder)
    (node,) = cluster.nodes
    return Agent(node, cluster.settings(node, folder), mode=options.mode)


def _cpu_s(pid: int) -> float:
    """CPU time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _memory_mib(pid: int) -> tuple[float, float]:
    """Resident memory of a process now and at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    now, most = (int(fields[name].split()[0]) / _MIB for name in ("VmRSS", "VmHWM"))
    return now, most


def main(argv: Sequence[str] | None = None) -> int:
    """Run with other sizes than `ebpf-svc bench apply` does."""
    parser = argparse.ArgumentParser(prog="ebpf-svc bench apply", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all samples there")
    parser.add_argument("--mode", choices=MODES, default=EBPF)
    parser.add_argument("--services", type=int, nargs="+", default=SERVICES, metavar="N")
    parser.add_argument("--endpoints", type=int, default=ENDPOINTS, metavar="N")
    parser.add_argument("--cold", type=int, default=DEFAULTS.cold, metavar="N")
    parser.add_argument("--changes", type=int, default=DEFAULTS.changes, metavar="N")
    parser.add_argument("--starts", type=int, default=DEFAULTS.starts, metavar="N")
    parser.add_argument("--no-agent", action="store_true", help="measure the dataplane alone")
    given = parser.parse_args(argv)
    log.configure(level="warning")
    return run(
        given.json,
        Options(
            mode=given.mode,
            services=given.services,
            endpoints=given.endpoints,
            cold=given.cold,
            changes=given.changes,
            starts=given.starts,
            agent=not given.no_agent,
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
