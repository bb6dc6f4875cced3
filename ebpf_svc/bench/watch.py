"""From the API server to the dataplane: seconds to the first plan, milliseconds an event, memory.

A stand-in API server runs in a process of its own, the watching part of the agent in another:
source, store, sync loop and planner are the agent's own, the dataplane is one in memory. What the
real maps cost beyond that is told by the benchmark `apply`.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ebpf_svc import log
from ebpf_svc.bench import apiobjects
from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.bench.maps import artifacts_in, fresh_maps
from ebpf_svc.bench.record import Record
from ebpf_svc.config import KubernetesSettings, Settings
from ebpf_svc.daemon import settle_memory
from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.sync import SyncLoop
from ebpf_svc.watch.kubernetes import KubernetesSource
from ebpf_svc.watch.store import Store

FIRST_PLAN_S, APPLY_MS, RESIDENT_MIB = 2.5, 10.0, 150.0
"""What shall be reached, with 10,000 Services of ten endpoints."""
_FULL_SIZE = 10_000
_NODE = "node-1"
_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure."""

    services: int = 10_000
    endpoints: int = 10
    cold: int = 5
    """First lists of each kind, each in a new process."""
    rate: float = 100.0
    """Changes of slices a second, at random times."""
    seconds: float = 10.0
    pauses_ms: Sequence[float] = (Settings().min_sync_period_s * 1000, 20.0)
    """Shortest pauses between two applies to measure with; the first is the agent's default."""


DEFAULTS = Options()


def run(json_path: Path | None = None, options: Options = DEFAULTS) -> int:
    """Measure, print the table, write the samples; returns the exit status."""
    record = Record(
        "watch",
        parameters={
            "services": options.services,
            "endpoints": options.endpoints,
            "rate": options.rate,
            "seconds": options.seconds,
        },
    )
    with _process(_serve, options) as server:
        url = server.recv()
        for streamed in (True, False):
            _measure_first_plan(record, options, url, streamed)
        for pause_ms in options.pauses_ms:
            _measure_events(record, options, url, server, pause_ms)
        server.send(None)
    record.print()
    if json_path is not None:
        record.write(json_path)
    return 0


def _measure_first_plan(record: Record, options: Options, url: str, streamed: bool) -> None:
    results = []
    for _ in range(options.cold):
        with _process(_plan_once, url, streamed) as subject:
            results.append(subject.recv())
    name = f"{options.services:,} x {options.endpoints} {'streamed' if streamed else 'paged'}"
    is_full = options.services == _FULL_SIZE
    both = [result["list_s"] + result["plan_s"] for result in results]
    record.add(f"{name}, list, parse and plan", both, "s", limit=FIRST_PLAN_S if is_full else None)
    record.add(f"{name}, list and parse", [result["list_s"] for result in results], "s")
    record.add(f"{name}, bare json.loads of as much", [r["json_s"] for r in results], "s")
    record.add(f"{name}, plan", [result["plan_s"] for result in results], "s")
    limit = RESIDENT_MIB if is_full else None
    record.add(f"{name}, resident", [r["resident_mib"] for r in results], "MiB", limit=limit)
    record.add(f"{name}, resident at most", [r["most_mib"] for r in results], "MiB", limit=limit)


def _measure_events(
    record: Record, options: Options, url: str, server: Connection, pause_ms: float
) -> None:
    with _process(_follow, url, pause_ms / 1000) as subject:
        subject.recv()
        started_s = time.monotonic()
        server.send((options.rate, options.seconds))
        late_ms = _lateness_ms(server)
        sent = server.recv()
        took_s = time.monotonic() - started_s
        subject.send(sent)
        result = subject.recv()
    name = f"{options.rate:g} events/s, {pause_ms:g} ms pause"
    is_full = options.services == _FULL_SIZE
    store = record.add(f"{name}, socket to store", result["store_ms"], "ms")
    assert len(store.samples) == sent, f"{sent} events sent, {len(store.samples)} received"
    record.add(
        f"{name}, socket to maps",
        result["apply_ms"],
        "ms",
        limit=APPLY_MS if is_full else None,
        judged="p99",
    )
    record.add(f"{name}, one sync", result["sync_ms"], "ms")
    record.add(f"{name}, an idle process wakes up late", late_ms, "ms")
    record.add(f"{name}, processor", [result["cpu_s"] / took_s * 100], "%")


def _lateness_ms(pipe: Connection) -> list[float]:
    """How late this process wakes up from short sleeps, until there is something in the pipe.

    The yardstick: what a machine busy with other things adds to each step of an event's way.
    """
    late_ms = []
    while not pipe.poll():
        started_s = time.perf_counter()
        time.sleep(0.01)
        late_ms.append((time.perf_counter() - started_s - 0.01) * 1000)
    return late_ms


# -- the API server's process ----------------------------------------------------------------------


def _serve(pipe: Connection, options: Options) -> None:
    server = MockApiServer().start()
    server.put("Node", apiobjects.node(_NODE))
    numbers = range(options.services)
    server.put("Service", *map(apiobjects.service, numbers))
    server.put(
        "EndpointSlice",
        *(apiobjects.endpoint_slice(number, options.endpoints) for number in numbers),
    )
    gc.collect()
    gc.freeze()
    pipe.send(server.url)
    while told := pipe.recv():
        pipe.send(_churn(server, options, *told))
    server.close()


def _churn(server: MockApiServer, options: Options, rate: float, seconds: float) -> int:
    """Change slices at random times; returns how many changes that were."""
    rng = random.Random(1)
    next_s = time.monotonic()
    end_s = next_s + seconds
    count = 0
    while next_s < end_s:
        next_s += rng.expovariate(rate)
        time.sleep(max(0.0, next_s - time.monotonic()))
        count += 1
        number = rng.randrange(options.services)
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="microseconds")
        changed = apiobjects.endpoint_slice(
            number, options.endpoints, shift=count % 2, trigger_time=now
        )
        server.put("EndpointSlice", changed)
    return count


# -- the agent's process ---------------------------------------------------------------------------


class _TimedStore(Store):
    """Notes when changes of slices arrive, and which a snapshot holds."""

    def __init__(self, node_name: str) -> None:
        super().__init__(node_name)
        self.store_ms: list[float] = []
        self._unplanned: list[float] = []

    def put_slice(self, slice_: EndpointSlice) -> None:
        super().put_slice(slice_)
        self._unplanned.append(slice_.trigger_time_s)
        self.store_ms.append((time.time() - slice_.trigger_time_s) * 1000)

    def take_arrived(self) -> list[float]:
        """When the changes in the last snapshot were made."""
        arrived, self._unplanned = self._unplanned, []
        return arrived


class _TimedPlanner(Planner):
    """Notes which changes it plans."""

    store: _TimedStore
    planned: Sequence[float] = ()
    started_s = 0.0

    def plan(self, snapshot: Snapshot) -> DesiredState:
        # Changes that arrive from here on are for the next plan, or were in this one already.
        self.planned = self.store.take_arrived()
        self.started_s = time.perf_counter()
        return super().plan(snapshot)


class _TimedMaps:
    """Notes when changes are in the kernel's maps."""

    name = "ebpf"

    def __init__(self, planner: _TimedPlanner, maps: Forwarding) -> None:
        self._planner, self._maps = planner, maps
        self.apply_ms: list[float] = []
        self.sync_ms: list[float] = []

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        report = self._maps.apply(desired, resync=resync)
        now_s = time.time()
        self.apply_ms += [(now_s - made_s) * 1000 for made_s in self._planner.planned]
        self.sync_ms.append((time.perf_counter() - self._planner.started_s) * 1000)
        return report


def _plan_once(pipe: Connection, url: str, streamed: bool) -> None:
    """Time the way from nothing to the first plan."""
    store = Store(_NODE)
    store.set_local_addresses(("127.0.0.1", "192.168.0.11"))
    planner = Planner(PlanOptions.from_settings(Settings()))
    started_s = time.perf_counter()
    source = KubernetesSource(KubernetesSettings(master=url, streaming_lists=streamed), store)
    source.start()
    assert store.changed.wait(_DEADLINE_S)
    snapshot = store.snapshot()
    assert snapshot is not None
    listed_s = time.perf_counter()
    desired = planner.plan(snapshot)
    planned_s = time.perf_counter()
    assert len(desired.plans) == len(snapshot.services)
    most_mib = _memory_mib("VmHWM")
    settle_memory()
    resident_mib = _memory_mib("VmRSS")
    pipe.send(
        {
            "json_s": _bare_parsing_s(snapshot),
            "list_s": listed_s - started_s,
            "plan_s": planned_s - listed_s,
            "resident_mib": resident_mib,
            "most_mib": most_mib,
        }
    )
    source.stop()


def _bare_parsing_s(snapshot: Snapshot) -> float:
    """The yardstick: seconds to parse as many Services and slices, with nothing made of them."""
    endpoints = max(len(slices[0].endpoints) for slices in snapshot.slices.values())
    texts = [
        json.dumps([make(number) for number in range(100)]).encode()
        for make in (
            apiobjects.service,
            lambda number: apiobjects.endpoint_slice(number, endpoints),
        )
    ]
    started_s = time.perf_counter()
    for _ in range(len(snapshot.services) // 100):
        for text in texts:
            json.loads(text)
    return time.perf_counter() - started_s


def _follow(pipe: Connection, url: str, min_sync_period_s: float) -> None:
    """Follow the server until told how many changes there were."""
    store = _TimedStore(_NODE)
    store.set_local_addresses(("127.0.0.1", "192.168.0.11"))
    planner = _TimedPlanner(PlanOptions.from_settings(Settings()))
    planner.store = store
    ready = threading.Event()
    source = KubernetesSource(KubernetesSettings(master=url), store)
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="ebpf-svc-bench-")))
        artifacts = artifacts_in(Settings().ebpf.cache_dir)
        maps = _TimedMaps(planner, undo.enter_context(fresh_maps(artifacts, folder)))
        settings = Settings(run_dir=folder, min_sync_period_s=min_sync_period_s)
        loop = SyncLoop(store, planner, maps, settings, on_ready=ready.set)
        source.start()
        thread = threading.Thread(target=loop.run)
        thread.start()
        assert ready.wait(_DEADLINE_S)
        time.sleep(1)
        settle_memory()
        maps.sync_ms.clear()
        used_s = time.process_time()
        pipe.send("ready")
        expected = pipe.recv()
        cpu_s = time.process_time() - used_s
        deadline_s = time.monotonic() + 5
        while len(maps.apply_ms) < expected and time.monotonic() < deadline_s:
            time.sleep(0.01)
        loop.close()
        thread.join()
        source.stop()
    pipe.send(
        {
            "store_ms": store.store_ms,
            "apply_ms": maps.apply_ms,
            "sync_ms": maps.sync_ms,
            "cpu_s": cpu_s,
        }
    )


@contextmanager
def _process(main: Any, *arguments: object) -> Iterator[Connection]:
    """Run a function in a fresh interpreter, with a pipe to it; it must end by itself."""
    # Not forked: memory is to be measured, and this process has threads' worth of other things.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(main, there, *arguments))
    process.start()
    there.close()
    try:
        yield here
    except BaseException:
        process.terminate()
        raise
    finally:
        here.close()
        process.join(10)


def _main(main: Any, pipe: Connection, *arguments: object) -> None:
    log.configure(level="error")
    main(pipe, *arguments)


def _memory_mib(field: str) -> float:
    """A field of this process's memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write every sample there")
    parser.add_argument("--services", type=int, default=DEFAULTS.services)
    parser.add_argument("--endpoints", type=int, default=DEFAULTS.endpoints)
    parser.add_argument("--cold", type=int, default=DEFAULTS.cold)
    parser.add_argument("--rate", type=float, default=DEFAULTS.rate)
    parser.add_argument("--seconds", type=float, default=DEFAULTS.seconds)
    told = parser.parse_args(argv)
    return run(
        told.json,
        Options(
            services=told.services,
            endpoints=told.endpoints,
            cold=told.cold,
            rate=told.rate,
            seconds=told.seconds,
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
