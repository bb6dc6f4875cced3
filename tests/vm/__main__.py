"""`python -m tests.vm`: which kernels there are, and a command in one of them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from tests.vm import guest, kernels, machines, suite
from tests.vm.guest import GuestFailed
from tests.vm.kernels import NoKernel


@click.group()
def main() -> None:
    """Other kernels than this machine's, emulated or as a process."""


@main.command("kernels")
@click.option("--update", is_flag=True, help="Ask the archive for newer ones.")
def show_kernels(update: bool) -> None:
    """Fetch the kernels of the ring and list them; fails when a required one cannot be had."""
    lacking = False
    for row in kernels.wanted():
        try:
            release = machines.obtain(row, update=update).release
        except NoKernel as error:
            release = f"cannot be had{' (required)' if row.required else ''}: {error}"
            lacking |= row.required
        click.echo(f"{row.name:10} {release}")
    sys.exit(int(lacking))


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("kernel")
@click.option("--cpus", default=1, show_default=True)
@click.option("--memory", default="2G", show_default=True)
@click.option("--deadline", "deadline_s", default=3600, show_default=True, help="In seconds.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep what the guest wrote here.")
@click.option("--count-instructions", is_flag=True, help="The guest's clock counts them.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    *,
    kernel: str,
    command: tuple[str, ...],
    cpus: int,
    memory: str,
    deadline_s: int,
    out: Path | None,
    count_instructions: bool,
) -> None:
    """Run COMMAND in a guest with KERNEL and exit as it does (KERNEL is a name of `kernels`).

    The command runs in a copy of this repository; what it leaves in test-logs/ is found in
    OUT/test-logs/ afterwards. Without --out that is a folder of test-logs/vm/, kept on failure.
    """
    folder = out or suite.LOGS / kernel / f"run-{os.getpid()}"
    try:
        booted = machines.obtain(kernels.find(kernel))
        outcome = guest.run(
            booted,
            command,
            folder,
            cpus=cpus,
            memory=memory,
            deadline_s=deadline_s,
            echo=sys.stdout,
            count_instructions=count_instructions,
        )
    except (NoKernel, GuestFailed) as error:
        click.echo(f"{kernel}: {error}", err=True)
        sys.exit(125)
    said = f"== Linux {booted.release}: exit {outcome.status}, {outcome.seconds:.0f} s"
    click.echo(said, err=True)
    if out is None and outcome.status == 0:
        shutil.rmtree(folder)
    sys.exit(outcome.status)


@main.command()
@click.option("--kernel", "names", multiple=True, help="Only this one; repeatable.")
@click.option("--only", multiple=True, help="Only this part, e.g. packet or smoke; repeatable.")
@click.option("--whole", is_flag=True, help="In the emulator, too: hours.")
@click.option("--abreast", default=suite.abreast_here(), show_default=True, help="At a time.")
def ring(*, names: tuple[str, ...], only: tuple[str, ...], whole: bool, abreast: int) -> None:
    """Run the ring: programs, packets, one behaviour test a promise; print the table."""
    try:
        wanted = [kernels.find(name) for name in names] or list(kernels.wanted())
    except NoKernel as error:
        raise click.UsageError(str(error)) from error
    rows = suite.run(wanted, only=only, whole=whole, abreast=abreast, say=click.echo)
    click.echo(suite.table(rows))
    sys.exit(int(not all(row.ok for row in rows)))


if __name__ == "__main__":
    main(prog_name="python -m tests.vm")
