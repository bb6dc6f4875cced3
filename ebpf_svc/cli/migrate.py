"""`ebpf-svc migrate`: kube-proxy's place on this node, taken or given back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import click

from ebpf_svc.cli import FAILURE
from ebpf_svc.cli.output import print_json, print_table
from ebpf_svc.cli.settings import PLACE, settings_from, settings_options
from ebpf_svc.config import Settings
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.host.kubeproxy import Sign, running
from ebpf_svc.log import configure
from ebpf_svc.migrate import agent, takeover, undo
from ebpf_svc.migrate.inventory import Inventory, Part, look
from ebpf_svc.migrate.takeover import Obstacle, Outcome
from ebpf_svc.status import STATUS, read_json


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for."""

    dry_run: bool
    yes: bool
    force: bool
    as_json: bool
    wait_s: float
    drain_s: float

    def say(self, line: str) -> None:
        """Tell of progress, beside the result."""
        click.echo(f"  {line}", err=True)


@click.command(name="migrate")
@click.option("--dry-run", is_flag=True, help="Only say what is there and what would be done.")
@click.option("--undo", "back", is_flag=True, help="Give the node back to kube-proxy.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Go on where a warning would stop.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; implies --yes.")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0), default=0.0, metavar="SECONDS",
    help="How long to wait for the agent to be ready [0].",
)  # fmt: skip
@click.option(
    "--drain", "drain_s", type=click.FloatRange(0), default=60.0, metavar="SECONDS",
    help="How long to wait for connections that would break (IPVS; --undo) [60].",
)  # fmt: skip
@settings_options(*PLACE)
def command(back: bool, **options: Any) -> None:
    """Remove what kube-proxy left on this node, once our agent serves in its place.

    Connections made under kube-proxy's rules live on. kubelet's chains and those of others stay.
    Refuses while kube-proxy runs, while our agent is not ready, or while kube-proxy's rules serve
    what our agent does not. May be repeated.

    \b
    Example:
      ebpf-svc migrate --dry-run         what of kube-proxy is here?
      ebpf-svc migrate --yes --wait 300  in a DaemonSet, beside the agent
      ebpf-svc migrate --undo            stop our agent and bring kube-proxy back first

    Next: `ebpf-svc show`.
    """
    settings = agent.settings_of_agent(settings_from(options))
    # What our dataplane tells while it is opened is not what was asked.
    configure(style=settings.log.format, level="warning")
    wanted = Wanted(**{each.name: options[each.name] for each in fields(Wanted)})
    done = _undo(settings, wanted) if back else _take_over(settings, wanted)
    if not done:
        sys.exit(FAILURE)


def _take_over(settings: Settings, wanted: Wanted) -> bool:
    try:
        ours = agent.await_agent(settings, wanted.wait_s)
    except UnsupportedHost:
        if not wanted.dry_run:
            raise
        ours = None
    served = ours.served if ours else frozenset()
    found = look(settings.families, served)
    signs = running(ours.pid if ours else None)
    against = list(takeover.obstacles(found, signs, ours, keeps_nat=agent.keeps_nat(settings)))
    warnings = list(takeover.warnings(found))
    if wanted.dry_run or found.empty:
        _print_found(wanted, found, signs, against, warnings)
        # Nothing to do is what a repeated call finds, and no failure.
        return wanted.dry_run or not signs
    if _stopped(wanted, against, found, signs, warnings):
        return False
    for line in warnings:
        click.echo(f"warning: {line}", err=True)
    if not (wanted.yes or wanted.as_json):
        _print_parts(found.parts())
        click.confirm("Remove these?", abort=True)
    outcome = takeover.remove(settings.families, served, drain_s=wanted.drain_s, say=wanted.say)
    _print_outcome(wanted, outcome)
    return not outcome.failures and look(settings.families, served).empty


def _undo(settings: Settings, wanted: Wanted) -> bool:
    status = read_json(settings.run_dir / STATUS) or {}
    served = agent.view_of(settings.run_dir, status).served
    found, signs = look(settings.families, served), running()
    against = list(undo.obstacles(settings, found, signs, served))
    if wanted.dry_run:
        _print_found(wanted, found, signs, against, [])
        return True
    if _stopped(wanted, against, found, signs, []):
        return False
    if not (wanted.yes or wanted.as_json):
        click.confirm("Give this node back to kube-proxy?", abort=True)
    left = undo.give_back(settings, drain_s=wanted.drain_s, force=wanted.force, say=wanted.say)
    if wanted.as_json:
        print_json({"done": left == 0, "connections": left})
    elif left:
        click.echo(
            f"{left} connections still pass through our programs, which stay for them; new ones "
            "are kube-proxy's.\nRepeat the command later, or cut them off with --force."
        )
    else:
        click.echo("Nothing of ours is left; kube-proxy serves.")
    return left == 0


def _stopped(
    wanted: Wanted,
    against: Sequence[Obstacle],
    found: Inventory,
    signs: Sequence[Sign],
    warnings: Sequence[str],
) -> bool:
    """Say what stands in the way, if anything does that was not overruled."""
    standing = [each for each in against if not (each.forcible and wanted.force)]
    if not standing:
        return False
    if wanted.as_json:
        print_json(_report(found, signs, standing, warnings))
    for each in standing:
        click.echo(f"ebpf-svc: {each.what}\n  {each.mend}", err=True)
    return True


def _report(
    found: Inventory, signs: Sequence[Sign], against: Sequence[Obstacle], warnings: Sequence[str]
) -> dict[str, Any]:
    return {
        "running": [asdict(sign) for sign in signs],
        "found": [asdict(part) for part in found.parts()],
        "services": len(found.served),
        "connections": found.active_count,
        "obstacles": [asdict(each) for each in against],
        "warnings": list(warnings),
    }


def _print_found(
    wanted: Wanted,
    found: Inventory,
    signs: Sequence[Sign],
    against: Sequence[Obstacle],
    warnings: Sequence[str],
) -> None:
    if wanted.as_json:
        print_json(_report(found, signs, against, warnings))
        return
    for sign in signs:
        click.echo(f"kube-proxy runs: {sign.what}, {sign.detail}")
    if not list(found.parts()):
        click.echo("There are no rules of kube-proxy's here.")
    else:
        _print_parts(found.parts())
    for each in against if wanted.dry_run else ():
        click.echo(f"\nin the way: {each.what}\n  {each.mend}")
    for line in warnings:
        click.echo(f"\nwarning: {line}")


def _print_parts(parts: Iterable[Part]) -> None:
    rows = [[p.kind, p.where, str(p.count), "stays" if p.kept else "goes", p.kept or p.names]
            for p in parts]  # fmt: skip
    print_table(["what", "where", "count", "", "which, or why"], rows)


def _print_outcome(wanted: Wanted, outcome: Outcome) -> None:
    if wanted.as_json:
        print_json(asdict(outcome))
        return
    states = (("removed", outcome.removed), ("kept", outcome.kept))
    rows = [
        [part.kind, part.where, str(part.count), state, part.kept or part.names]
        for state, parts in states
        for part in parts
    ]
    print_table(["what", "where", "count", "", "which, or why"], rows)
    for line in outcome.failures:
        click.echo(f"ebpf-svc: {line}", err=True)
