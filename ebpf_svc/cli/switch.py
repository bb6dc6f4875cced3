"""`ebpf-svc switch`: another mode, under traffic."""

from __future__ import annotations

import sys
from typing import Any

import click

from ebpf_svc.cli import FAILURE
from ebpf_svc.cli.settings import PLACE, settings_from, settings_options
from ebpf_svc.config import Mode
from ebpf_svc.control import Progress, Step, SwitchRequest, ask
from ebpf_svc.modes import MODES

WORDS = {
    Step.OPENING: "{mode}: is opened beside the mode that serves",
    Step.FILLING: "{mode}: is told every service",
    Step.SERVING: "{mode}: serves; connections that are open go on as they are",
    Step.DRAINING: "{mode}: waiting for its connections, {detail}",
    Step.DONE: "{mode}: {detail}",
    Step.FAILED: "{detail}",
}


@click.command(name="switch")
@click.argument("mode", type=click.Choice([Mode.AUTO.value, *MODES]))
@click.option(
    "--drain-s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long open connections may keep the old mode [the agent's drain setting].",
)
@click.option("--no-wait", is_flag=True, help="Return once the new mode serves.")
@settings_options(*PLACE)
def command(mode: str, drain_s: float | None, no_wait: bool, **options: Any) -> None:
    """Let the running agent serve in another mode, without losing a connection.

    The new mode is filled and takes every new connection before the old one lets go. Open
    connections go on, where they need the old one for as long as --drain-s says; then nothing of it
    is left. When the new mode cannot run here, everything stays as it is, and the reason is told.

    \b
    Example:
      ebpf-svc switch nftables
      ebpf-svc switch auto --no-wait

    Next: `ebpf-svc show` says which mode serves. The next start takes the mode of the
    configuration again: set `mode` there to keep this one.
    """
    settings = settings_from(options)
    request = SwitchRequest(mode=Mode(mode), drain_s=drain_s, wait=not no_wait)
    on_terminal = sys.stdout.isatty()
    last = Progress(Step.FAILED)
    for progress in ask(settings.run_dir, request):
        repeated = on_terminal and last.step is progress.step is Step.DRAINING
        if progress.step is not Step.FAILED and (on_terminal or _is_news(last, progress)):
            # A terminal has the seconds counted on one line.
            click.echo(("\x1b[A\x1b[K" if repeated else "") + _words(progress))
        last = progress
    if last.step is Step.FAILED:
        click.echo(f"ebpf-svc: {_words(last)}", err=True)
        sys.exit(FAILURE)
    click.echo(f"A restart takes the mode of the configuration: set `mode: {mode}` to keep it.")


def _is_news(last: Progress, progress: Progress) -> bool:
    return (last.step, last.mode) != (progress.step, progress.mode)


def _words(progress: Progress) -> str:
    return WORDS[progress.step].format(mode=progress.mode, detail=progress.detail)
