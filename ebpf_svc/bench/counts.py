"""Counts that must not grow: writes, system calls, instructions. They are the same on every run.

What depends on the compiler or the kernel is kept under its version; other versions are not
compared. `python -m ebpf_svc.bench.counts` measures and compares, `--update` records: a growth is
then a line of a commit that somebody wrote on purpose.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ebpf_svc import log
from ebpf_svc.bench.applied import EBPF, opener
from ebpf_svc.bench.maps import artifacts_in
from ebpf_svc.bench.population import Population
from ebpf_svc.config import EbpfSettings, Settings
from ebpf_svc.dataplane.ebpf.programs import Programs
from ebpf_svc.dataplane.ebpf.tables import Tables, remove_pins
from ebpf_svc.host import bpf, bpf_prog, toolchain
from ebpf_svc.modes import MODES, make_dataplane
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.cluster import Cluster

POPULATION = Population(100, 10)
ANYWHERE = "anywhere"
_VERIFIED = "instructions verified"
_VERIFIER_MOOD = 0.01
"""How much longer a walk may get by constants alone, which decide which states are alike."""
Counts = dict[str, dict[str, int]]
"""By what they depend on (a compiler, a kernel, nothing): name -> count."""


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Count this thread's bpf(2) calls, by command, while the block runs.

    Others of the process, such as the one that sweeps flows, call when their time has come.
    """
    made: Counter[str] = Counter()
    call, counted = bpf.Attr.call, threading.get_ident()

    def counting(self: bpf.Attr, command: bpf.Command) -> int:
        if threading.get_ident() == counted:
            made[command.name] += 1
        return call(self, command)

    bpf.Attr.call = counting  # type: ignore[method-assign]
    try:
        yield made
    finally:
        bpf.Attr.call = call  # type: ignore[method-assign]


def measure() -> Counts:
    """Every count of this machine, compiler and kernel; needs root."""
    counts: Counts = {ANYWHERE: {}}
    with tempfile.TemporaryDirectory(prefix="ebpf-svc-bench-") as scratch:
        folder = Path(scratch)
        _count_programs(counts, folder)
        with Cluster.create(node_count=1, cache_dir=folder / "cache") as cluster:
            (node,) = cluster.nodes
            for mode in MODES:
                if mode == "userspace" or not make_dataplane(mode, Settings()).check().ok:
                    continue
                settings = cluster.settings(node, folder)
                with opener(mode, settings, node, folder)() as dataplane:
                    counts[ANYWHERE] |= _of_applies(mode, dataplane.apply)
    return counts


def _count_programs(counts: Counts, folder: Path) -> None:
    """Instructions compiled, and walked through by the verifier, by program."""
    artifacts = artifacts_in(folder / "cache")
    settings = EbpfSettings(bpffs=folder / "bpf")
    compiled = counts.setdefault(f"bcc {toolchain.bcc_version()}", {})
    verified = counts.setdefault(kernel(), {})
    for family, artifact in artifacts.items():
        for name, program in artifact.programs.items():
            compiled[f"IPv{int(family)} {name}: instructions"] = len(program.instructions) // 8
    opened = Tables.open(settings, artifacts)
    try:
        programs = Programs.load(artifacts, {family: opened.fds(family) for family in artifacts})
        for each in programs:
            facts = bpf_prog.facts(each.fd)
            if facts.verified_count:
                title = f"IPv{int(each.family)} {each.name}: {_VERIFIED}"
                verified[title] = facts.verified_count
        programs.close()
    finally:
        opened.close()
        remove_pins(settings)


def kernel() -> str:
    """This kernel, as far as its verifier matters."""
    return "Linux " + ".".join(os.uname().release.split(".")[:2])


def _of_applies(mode: str, apply: object) -> dict[str, int]:
    """Writes and calls of the first apply, of changes, and of none."""
    assert callable(apply)
    planner, snapshot = Planner(PlanOptions.from_settings(Settings())), POPULATION.snapshot()
    size = f"{POPULATION.services} x {POPULATION.endpoints}"
    steps = {
        "cold": snapshot,
        "nothing changed": snapshot,
        "one endpoint": (one := POPULATION.changed(snapshot, 1)),
        "rollout of 10 services": POPULATION.rolled_out(one, 1, services=10),
    }
    found = {}
    for step, state in steps.items():
        with counted_calls() as calls:
            report = apply(planner.plan(state))
        found[f"{mode}: {size}, {step}: writes"] = report.writes
        if mode == EBPF:
            found[f"{mode}: {size}, {step}: bpf calls"] = calls.total()
    return found


def grown(recorded: Mapping[str, Mapping[str, int]], measured: Counts) -> Iterator[str]:
    """A sentence for each count that is larger than recorded, or not recorded where others are."""
    for scope, counts in measured.items():
        if scope not in recorded:
            continue
        for name, count in counts.items():
            known = recorded[scope].get(name)
            if known is None:
                yield f"{name} ({scope}): {count}, not recorded yet"
            elif count > known * (1 + _VERIFIER_MOOD * name.endswith(_VERIFIED)):
                yield f"{name} ({scope}): {count}, was {known}"


def main(argv: list[str] | None = None) -> int:
    """Compare with a file, or record in it; the exit status is 1 when something grew."""
    parser = argparse.ArgumentParser(prog="python -m ebpf_svc.bench.counts", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--update", action="store_true", help="record what is measured")
    given = parser.parse_args(argv)
    log.configure(level="warning")
    recorded = json.loads(given.file.read_text()) if given.file.exists() else {}
    measured = measure()
    if given.update:
        given.file.write_text(json.dumps(recorded | measured, indent=1, sort_keys=True) + "\n")
        return 0
    found = list(grown(recorded, measured))
    for scope in measured.keys() - recorded.keys():
        print(f"not compared: nothing is recorded for {scope}")
    for sentence in found:
        print(f"grown: {sentence}")
    count = sum(len(each) for scope, each in measured.items() if scope in recorded)
    print(f"{count} counts compared, {len(found)} grown")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
