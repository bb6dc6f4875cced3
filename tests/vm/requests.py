"""`python -m tests.vm.requests RUN COUNTS`: what a request costs in instructions must not grow.

RUN is a data path benchmark of a guest whose clock counts instructions. COUNTS holds those that
are allowed, by kernel; another kernel's are not compared. `--update` records: a growth is then a
line of a commit that somebody wrote on purpose.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from ebpf_svc.bench.figures import Comparison, read

TOLERANCE = 0.03
"""Two runs of one build differ by less: what the guest's timers interrupt is not the same."""
DIRECT = "direct"
Counts = dict[str, int]
"""Instructions by measure and variant."""


def counts(run: Comparison) -> Counts:
    """What a request took in the best round: rates and times are of a clock that counts
    instructions.
    """
    found = {}
    for figure in run.figures:
        for variant, samples in figure.samples.items():
            # What the guest's timers and threads interrupt adds to a round, and takes nothing away.
            least = min(samples) * 1000 if figure.unit == "µs" else 1e9 / max(samples)
            found[f"{figure.title}, {figure.backends} backends: {variant}"] = round(least)
    return found


def table(now: Counts, before: Counts) -> list[str]:
    """A line for each, with what it was."""
    width = max(map(len, now))
    return [
        f"{name:{width}}  {count:>8,}"
        + (f"  {count / before[name]:.3f} of {before[name]:,}" if name in before else "  new")
        for name, count in now.items()
    ]


def grown(now: Counts, before: Counts) -> list[str]:
    """Names of those that cost more than allowed, or are not there any more. A request without a
    Service is shown for comparison: it runs no code of ours.
    """
    limit = 1 + TOLERANCE
    return [
        name
        for name, count in before.items()
        if now.get(name, sys.maxsize) > count * limit and not name.endswith(f": {DIRECT}")
    ]


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.argument("recorded", type=click.Path(path_type=Path))
@click.option("--update", is_flag=True, help="Record what was found.")
def main(run: Path, recorded: Path, update: bool) -> None:
    """Compare a RUN with what is RECORDED; fails when something has grown."""
    comparison = Comparison.of(read(run))
    now = counts(comparison)
    kernel = "Linux " + ".".join(comparison.environment["kernel"].split(".")[:2])
    held: dict[str, Counts] = json.loads(recorded.read_text()) if recorded.exists() else {}
    before = held.get(kernel, {})
    click.echo("\n".join(table(now, before)))
    if update:
        recorded.write_text(json.dumps(held | {kernel: now}, indent=1, sort_keys=True) + "\n")
        return
    if not before:
        click.echo(f"nothing is recorded for {kernel}: --update does")
        sys.exit(1)
    worse = grown(now, before)
    for name in worse:
        click.echo(f"grown: {name}")
    sys.exit(int(bool(worse)))


if __name__ == "__main__":
    main()
