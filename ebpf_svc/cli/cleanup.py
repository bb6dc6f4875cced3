"""`ebpf-svc cleanup`: no trace of us."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ebpf_svc.cli import FAILURE
from ebpf_svc.cli.settings import PLACE, settings_from, settings_options
from ebpf_svc.config import Settings
from ebpf_svc.dataplane.inspect import KernelPart, ShowsParts
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.host.lock import DirectoryLock, lock_holder
from ebpf_svc.modes import MODES, make_dataplane
from ebpf_svc.status import FILES


@click.command(name="cleanup")
@settings_options(*PLACE)
def command(**options: Any) -> None:
    """Remove everything of ours from this machine's kernel, also after a crash.

    Stops no agent: stop it first. Services stop being reachable at once. Allocated cluster IPs and
    node ports in the state directory stay, so that the next run gives the same ones; remove the
    directory to forget them.

    \b
    Example:
      systemctl stop ebpf-svc && ebpf-svc cleanup

    Next: nothing is left; `ebpf-svc run` starts from empty.
    """
    settings = settings_from(options)
    # Only looked at, not locked: an open folder keeps its file system from being unmounted.
    pid = lock_holder(settings.ebpf.bpffs)
    if pid is not None:
        raise UnsupportedHost([f"an agent (pid {pid}) uses {settings.ebpf.bpffs}: stop it first"])
    with DirectoryLock(settings.run_dir):
        removed, failures = _remove(settings)
    _remove_directory(settings.run_dir)
    for line in removed:
        click.echo(f"removed {line}")
    if not removed and not failures:
        click.echo("There was nothing to remove.")
    for line in failures:
        click.echo(f"ebpf-svc: {line}", err=True)
    if failures:
        sys.exit(FAILURE)


def _remove(settings: Settings) -> tuple[list[str], list[str]]:
    """Clean up after every dataplane; one that fails does not hold back the others (Z4)."""
    removed: list[str] = []
    failures: list[str] = []
    for mode in MODES:
        dataplane = make_dataplane(mode, settings)
        before = _parts(dataplane)
        try:
            dataplane.cleanup()
        except (DataplaneError, OSError) as exc:
            failures.append(f"mode {mode}: {exc}")
        after = _parts(dataplane)
        removed += _summary(part for part in before if part not in after)
        failures += [f"mode {mode}: {line} still there" for line in _summary(after)]
    for name in FILES:
        path = settings.run_dir / name
        if path.exists():
            path.unlink()
            removed.append(f"file {path}")
    return removed, failures


def _parts(dataplane: object) -> list[KernelPart]:
    return list(dataplane.parts()) if isinstance(dataplane, ShowsParts) else []


def _summary(parts: Iterable[KernelPart]) -> list[str]:
    """A line per kind of part: how many and which."""
    by_kind: dict[str, dict[str, None]] = {}
    counts: Counter[str] = Counter()
    for part in parts:
        by_kind.setdefault(part.kind, {})[part.name] = None
        counts[part.kind] += 1
    return [f"{counts[kind]} {kind}: {', '.join(names)}" for kind, names in by_kind.items()]


def _remove_directory(directory: Path) -> None:
    """Remove a directory unless somebody else keeps something in it."""
    try:
        directory.rmdir()
    except OSError:
        return
