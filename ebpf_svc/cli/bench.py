"""`ebpf-svc bench`: the benchmarks, on this machine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click


@click.command(name="bench")
@click.argument("what", type=click.Choice(["packet", "apply"]))
@click.option(
    "--json",
    "json_path",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write every sample and the environment there.",
)
def command(what: str, json_path: Path | None) -> None:
    """Measure on this machine what the dataplane costs.

    Every figure is taken side by side with a yardstick in the same run: absolute times of another
    machine or another day say little.

    \b
    What:
      packet   nanoseconds per packet of the loaded programs
      apply    seconds from a change to the kernel, writes and memory

    \b
    Example:
      sudo ebpf-svc bench packet --json packet.json
    """
    sys.exit(importlib.import_module(f"ebpf_svc.bench.{what}").run(json_path))
