"""`ebpf-svc bench`: the benchmarks, on this machine."""

from __future__ import annotations

import importlib
import sys

import click

WHAT = ("path", "packet", "apply", "watch", "maglev", "compare", "report")
"""Each is a module of `ebpf_svc.bench` with a `main`."""


@click.command(
    name="bench",
    # What follows the name of a benchmark is the benchmark's own, --help included.
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument(
    "what", type=click.Choice(["path", "packet", "apply", "watch", "maglev", "compare", "report"])
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def command(what: str, options: tuple[str, ...]) -> None:
    """Measure on this machine what the dataplane costs.

    Every figure is taken side by side with a yardstick in the same run: absolute times of another
    machine or another day say little. OPTIONS are the benchmark's own, told by --help behind its
    name; those that measure take --json PATH, which also writes each sample and the environment
    there.

    \b
    What:
      path     connections, requests, throughput, beside the peers and no Service at all
      packet   nanoseconds per packet of the loaded programs (--quick: less of it)
      apply    seconds from a change to the kernel, writes and memory
      watch    from an API server to the maps: lists, events, memory
      maglev   building tables: time, balance, what a change of backends moves
      compare  OLD NEW: what got better or worse between two runs
      report   RUN... --html PATH: runs as tables and plots

    \b
    Example:
      sudo ebpf-svc bench packet --json packet.json
    """
    sys.exit(importlib.import_module(f"ebpf_svc.bench.{what}").main(options))
