"""`ebpf-svc run`: the agent."""

from __future__ import annotations

from typing import Any

import click

from ebpf_svc.cli.settings import PLACE, SERVING, settings_from, settings_options
from ebpf_svc.log import LogFormat, configure


@click.command(name="run")
@settings_options(*SERVING, *PLACE)
@click.option("--mode", default="ebpf", metavar="MODE", show_default=True, help="Dataplane.")
@click.option(
    "--log-format",
    type=click.Choice([style.value for style in LogFormat]),
    default=LogFormat.AUTO.value,
    help="Log lines: auto is console on a terminal, else JSON.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least severe log lines printed.",
)
def command(mode: str, log_format: str, log_level: str, **options: Any) -> None:
    """Serve the services of a folder of manifests on this machine.

    Reads Services, Endpoints, EndpointSlices, Pods and Nodes; a change of a file is served within
    a tenth of a second. SIGTERM stops the agent and leaves traffic flowing; the next agent takes
    over. SIGHUP reads the kernel back at once and repairs what others changed.

    \b
    Example:
      ebpf-svc run --manifests examples/ --cluster-cidr 10.244.0.0/16

    Next, in another terminal: `ebpf-svc show` says what is served.
    """
    configure(style=LogFormat(log_format), level=log_level)
    settings = settings_from(options)
    from ebpf_svc.daemon import run  # noqa: PLC0415  # after the usage errors, which need none of it

    run(settings, mode=mode)
