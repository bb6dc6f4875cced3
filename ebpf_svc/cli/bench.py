"""`ebpf-svc bench`: the benchmarks, on this machine."""

from __future__ import annotations

import importlib
import sys

import click


@click.command(
    name="bench",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("what", type=click.Choice(["path", "packet", "apply", "watch"]))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def command(what: str, options: tuple[str, ...]) -> None:
    """Measure on this machine what the dataplane costs.

    Every figure is taken side by side with a yardstick in the same run: absolute times of another
    machine or another day say little. OPTIONS are the benchmark's own: every one takes
    --json PATH, which also writes each sample and the environment there.

    \b
    What:
      path     connections, requests, throughput, beside the peers and no Service at all
      packet   nanoseconds per packet of the loaded programs (--quick: less of it)
      apply    seconds from a change to the kernel, writes and memory
      watch    from an API server to the maps: lists, events, memory

    \b
    Example:
      sudo ebpf-svc bench packet --json packet.json
    """
    sys.exit(importlib.import_module(f"ebpf_svc.bench.{what}").main(options))
