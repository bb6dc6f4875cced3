"""From a change to the kernel: seconds, map writes, and what the agent weighs.

Planner and maps are the agent's own, the maps real and of their default sizes, pinned on a BPF file
system of the benchmark's. The agent itself runs on a node of the testbed, from manifests.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc.bench.maps import artifacts_in, fresh_maps
from ebpf_svc.bench.population import Population
from ebpf_svc.bench.record import Record
from ebpf_svc.config import Settings
from ebpf_svc.daemon import LOADING_OBJECTS, USUAL_THRESHOLDS
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.model.net import Family
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster

SERVICES = (1_000, 10_000)
ENDPOINTS = 10
COLD_S, CHANGE_MS, RESIDENT_MIB, START_S = 1.0, 5.0, 150.0, 1.0
"""What shall be reached, the first three with 10,000 services of ten endpoints."""
_FULL_SIZE = 10_000
_SMALL = Population(10, 2)
_AGENT_DEADLINE_S = 180.0
_MIB = 1024.0


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure."""

    services: Sequence[int] = SERVICES
    endpoints: int = ENDPOINTS
    cold: int = 7
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
            "services": list(options.services),
            "endpoints": options.endpoints,
            "cold": options.cold,
            "changes": options.changes,
            "starts": options.starts,
        },
    )
    with tempfile.TemporaryDirectory(prefix="ebpf-svc-bench-") as scratch:
        folder = Path(scratch)
        artifacts = artifacts_in(folder / "cache")
        for services in options.services:
            _measure_maps(
                record, Population(services, options.endpoints), options, artifacts, folder
            )
        if options.agent:
            _measure_agent(record, options, folder)
    record.print()
    if json_path is not None:
        record.write(json_path)
    return 0


def _measure_maps(
    record: Record,
    population: Population,
    options: Options,
    artifacts: dict[Family, Artifact],
    folder: Path,
) -> None:
    """Cold applies, then single changes on top of the last one."""
    name = f"{population.services:,} x {population.endpoints}"
    is_full = population.services == _FULL_SIZE
    plan_s, apply_s, both_s = [], [], []
    for _ in range(options.cold):
        with fresh_maps(artifacts, folder) as forwarding:
            planner, snapshot = _planner(), population.snapshot()
            gc.collect()
            gc.set_threshold(LOADING_OBJECTS)  # as the agent does until its first sync
            started = time.perf_counter()
            desired = planner.plan(snapshot)
            planned = time.perf_counter()
            report = forwarding.apply(desired)
            ended = time.perf_counter()
            gc.set_threshold(*USUAL_THRESHOLDS)
            assert not report.failed
            plan_s.append(planned - started)
            apply_s.append(ended - planned)
            both_s.append(ended - started)
    record.add(f"{name} cold, plan and apply", both_s, "s", limit=COLD_S if is_full else None)
    record.add(f"{name} cold, plan", plan_s, "s")
    record.add(f"{name} cold, apply", apply_s, "s")
    record.add(f"{name} cold, map writes", [report.writes], "writes")
    with fresh_maps(artifacts, folder) as forwarding:
        planner, snapshot = _planner(), population.snapshot()
        forwarding.apply(planner.plan(snapshot))
        gc.collect()
        gc.freeze()
        took_ms, writes = [], []
        for number in range(options.changes):
            snapshot = population.changed(snapshot, number)
            started = time.perf_counter()
            report = forwarding.apply(planner.plan(snapshot))
            took_ms.append((time.perf_counter() - started) * 1000)
            writes.append(report.writes)
        gc.unfreeze()
    limit = CHANGE_MS if is_full else None
    record.add(f"{name} one endpoint", took_ms, "ms", limit=limit, judged="p99")
    record.add(f"{name} one endpoint, map writes", writes, "writes")


def _measure_agent(record: Record, options: Options, folder: Path) -> None:
    """How fast the real agent starts, and what it weighs."""
    with Cluster.create(node_count=1, cache_dir=folder / "cache") as cluster:
        starts_s = []
        agent = _agent(cluster, _SMALL, folder / "small")
        with agent:  # the first start compiles
            for _ in range(options.starts):
                agent.stop()
                starts_s.append(agent.start())
        record.add(
            f"start to ready, warm cache, {_SMALL.services} services", starts_s, "s", limit=START_S
        )
        for services in options.services:
            population = Population(services, options.endpoints)
            agent = _agent(cluster, population, folder / f"of-{services}")
            started = time.monotonic()
            agent.start(wait=False)
            try:
                agent.wait_ready(_AGENT_DEADLINE_S)
                ready_s = time.monotonic() - started
                # What start-up needed is given back within the second.
                time.sleep(1)
                resident, peak = _memory_mib(int(agent.status()["pid"]))
            finally:
                agent.stop()
                agent.cleanup()
            name = f"{services:,} x {options.endpoints}"
            limit = RESIDENT_MIB if services == _FULL_SIZE else None
            record.add(f"{name} agent, resident", [resident], "MiB", limit=limit)
            record.add(f"{name} agent, resident at most", [peak], "MiB")
            record.add(f"{name} agent, start to ready", [ready_s], "s")


def _agent(cluster: Cluster, population: Population, folder: Path) -> Agent:
    folder.mkdir()
    population.write_manifests(folder)
    (node,) = cluster.nodes
    return Agent(node, cluster.settings(node, folder))


def _memory_mib(pid: int) -> tuple[float, float]:
    """Resident memory of a process now and at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    now, most = (int(fields[name].split()[0]) / _MIB for name in ("VmRSS", "VmHWM"))
    return now, most


def _planner() -> Planner:
    return Planner(PlanOptions.from_settings(Settings()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run with other sizes than `ebpf-svc bench apply` does."""
    parser = argparse.ArgumentParser(prog="python -m ebpf_svc.bench.apply", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all samples there")
    parser.add_argument("--services", type=int, nargs="+", default=SERVICES, metavar="N")
    parser.add_argument("--endpoints", type=int, default=ENDPOINTS, metavar="N")
    parser.add_argument("--cold", type=int, default=DEFAULTS.cold, metavar="N")
    parser.add_argument("--changes", type=int, default=DEFAULTS.changes, metavar="N")
    parser.add_argument("--starts", type=int, default=DEFAULTS.starts, metavar="N")
    parser.add_argument("--no-agent", action="store_true", help="measure planner and maps alone")
    given = parser.parse_args(argv)
    return run(
        given.json,
        Options(
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
