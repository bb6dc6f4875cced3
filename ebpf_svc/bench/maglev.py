"""Maglev tables: how long one takes to build, how even it is, what a change of backends moves.

Times are of the CPU: nothing here waits, so an idle machine takes as long.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ebpf_svc.bench.record import Record
from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.maglev import Fill, fill_in_python, table
from ebpf_svc.dataplane.ebpf.maglev_native import NativeFill

SIZES = (1_021, 16_381, 65_537)
BACKENDS = (3, 10, 100, 1_000)
LIMITS_MS = {(16_381, 100): 1.0, (65_537, 1_000): 5.0}
REMOVALS = 20
_SEED = "ebpf-svc"
_WARM = 65_537


def run(json_path: Path | None = None, *, rounds: int = 15) -> int:
    """Measure, print and write; returns the exit status."""
    record = Record("maglev", parameters={"rounds": rounds})
    native = NativeFill(EbpfSettings().cache_dir)
    table(["warm"], _WARM, _SEED, fill=native)  # from now on small tables take this way too
    for size in SIZES:
        for count in BACKENDS:
            names = [f"10.244.{i >> 8}.{i & 255}:8080" for i in range(count)]
            title = f"{size:,} slots, {count:,} backends"
            times = [_build_ms(names, size, native) for _ in range(rounds)]
            record.add(f"{title}: build", times, "ms", limit=LIMITS_MS.get((size, count)))
            in_python = [_build_ms(names, size, fill_in_python) for _ in range(max(3, rounds // 5))]
            record.add(f"{title}: build, without a compiler", in_python, "ms")
            built = table(names, size, _SEED, fill=native)
            record.add(f"{title}: most slots to average", [_most(built, count)], "ratio")
            moved = _moved(names, size, built, native)
            record.add(f"{title}: slots moved besides the removed one's", moved, "%")
    record.print()
    if json_path is not None:
        record.write(json_path)
    return 0


def _build_ms(names: list[str], size: int, fill: Fill) -> float:
    started = time.thread_time()
    table(names, size, _SEED, fill=fill)
    return (time.thread_time() - started) * 1000


def _most(built: array[int], count: int) -> float:
    """How many slots the best served backend has, beside the average."""
    return max(Counter(built).values()) * count / len(built)


def _moved(names: list[str], size: int, before: array[int], fill: Fill) -> list[float]:
    """Percent of the slots that change owner without need, for several single removals."""
    chosen = random.Random(1).sample(range(len(names)), min(REMOVALS, len(names)))
    moved = []
    for gone in chosen:
        kept = names[:gone] + names[gone + 1 :]
        after = table(kept, size, _SEED, fill=fill)
        extra = sum(
            1
            for old, new in zip(before, after, strict=True)
            if old != gone and names[old] != kept[new]
        )
        moved.append(extra * 100 / size)
    return moved


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="ebpf-svc bench maglev", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every sample there")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    given = parser.parse_args(argv)
    return run(given.json, rounds=given.rounds)


if __name__ == "__main__":
    sys.exit(main())
