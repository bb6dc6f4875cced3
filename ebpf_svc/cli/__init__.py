"""The command line. Each command lives in a module that is loaded when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from ebpf_svc import __version__
from ebpf_svc.errors import ConfigError, EbpfSvcError, UnsupportedHost

COMMANDS = {
    "demo": "ebpf_svc.cli.demo",
    "check": "ebpf_svc.cli.check",
    "run": "ebpf_svc.cli.run",
    "show": "ebpf_svc.cli.show",
    "switch": "ebpf_svc.cli.switch",
    "explain": "ebpf_svc.cli.explain",
    "monitor": "ebpf_svc.cli.monitor",
    "cleanup": "ebpf_svc.cli.cleanup",
    "config": "ebpf_svc.cli.config",
    "migrate": "ebpf_svc.cli.migrate",
    "bench": "ebpf_svc.cli.bench",
}
"""Command -> its module, which holds it as `command`; in the order a newcomer meets them."""

USAGE, FAILURE = 2, 1
"""Exit codes: what was asked is wrong; what was asked did not work."""


class _Commands(click.Group):
    """Loads a command's module when the command is named, so that `run` pays for `run` alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ebpf-svc")
def cli() -> None:
    """Kubernetes Services in eBPF: what kube-proxy does, under any CNI.

    An agent on each node turns Services and their endpoints into BPF maps; programs on sockets and
    network devices send each connection to one of the endpoints.

    \b
    First steps:
      ebpf-svc demo                         see it work in a cluster of namespaces
      ebpf-svc check                        can this machine do it?
      ebpf-svc run --manifests examples/    serve the services of a folder
      ebpf-svc show                         what is served, and by whom
      ebpf-svc explain outside 10.0.0.1:80  what becomes of a packet, and why
      ebpf-svc monitor                      what opens, ends and is dropped, as it happens
      ebpf-svc cleanup                      remove every trace
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 asked wrongly."""
    words = sys.argv[1:] if argv is None else argv
    try:
        cli.main(args=list(words), prog_name="ebpf-svc")
    except EbpfSvcError as exc:
        sys.exit(_explain(exc, words))
    except PermissionError as exc:
        click.echo(f"ebpf-svc: {exc}", err=True)
        click.echo("  run it as root: sudo ebpf-svc …", err=True)
        sys.exit(FAILURE)


def _explain(error: EbpfSvcError, argv: Sequence[str]) -> int:
    """Print an error and what to do about it; return the exit code."""
    lines: list[Any] = [str(error)]
    if isinstance(error, UnsupportedHost):
        lines = list(error.missing)
    for line in (*lines, *getattr(error, "__notes__", ())):
        click.echo(f"ebpf-svc: {line}", err=True)
    if isinstance(error, ConfigError):
        words = [word for word in argv if word in COMMANDS][:1]
        click.echo(f"  see: {' '.join(['ebpf-svc', *words, '--help'])}", err=True)
        return USAGE
    if isinstance(error, UnsupportedHost):
        click.echo("  see all that is asked of this machine: ebpf-svc check", err=True)
    return FAILURE
