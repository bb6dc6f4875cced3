"""`ebpf-svc check`: what this machine can do, and how to mend what it cannot."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from ebpf_svc.choice import candidates
from ebpf_svc.cli import FAILURE
from ebpf_svc.cli.output import print_json, print_table
from ebpf_svc.cli.settings import PLACE, settings_from, settings_options
from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Check, Support
from ebpf_svc.host import kubeproxy, sysctl
from ebpf_svc.host.lock import lock_holder
from ebpf_svc.model.net import Family
from ebpf_svc.modes import MODES, make_dataplane

FORWARDING = {Family.V4: "net/ipv4/ip_forward", Family.V6: "net/ipv6/conf/all/forwarding"}


@click.command(name="check")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@settings_options(*PLACE)
def command(as_json: bool, **options: Any) -> None:
    """Say which modes this machine can run, and for each missing thing the command that mends it.

    Tries what each mode needs, and leaves nothing. Exit code 1 when nothing could serve: no mode
    at all, or not the one the configuration names.

    \b
    Example:
      ebpf-svc check
      ebpf-svc check --json | jq '.modes.ebpf.missing'

    Next: `ebpf-svc run --manifests DIR`.
    """
    settings = settings_from(options)
    host = Support("host", host_checks(settings))
    beside = Support("kube-proxy", kube_proxy_checks(settings))
    modes = {mode: make_dataplane(mode, settings).check() for mode in MODES}
    wanted = [mode for mode in candidates(settings, MODES) if mode in modes]
    serves = next((mode for mode in wanted if modes[mode].ok), None)
    ok = host.ok and serves is not None
    reports = {"host": host, "kube-proxy": beside, **modes}
    if as_json:
        checks = [
            {"of": of, **asdict(check)} for of, each in reports.items() for check in each.checks
        ]
        print_json(
            {
                "ok": ok,
                "mode": settings.mode.value,
                "serves": serves,
                "modes": {
                    mode: {"ok": each.ok, "missing": list(each.missing)}
                    for mode, each in modes.items()
                },
                "checks": checks,
            }
        )
    else:
        rows = [_row(of, check) for of, each in reports.items() for check in each.checks]
        print_table(["of", "check", "state", "found", "mend it with"], rows)
        click.echo()
        click.echo(_verdict(settings, serves, wanted, modes))
    if not ok:
        sys.exit(FAILURE)


def _verdict(
    settings: Settings, serves: str | None, wanted: Sequence[str], modes: Mapping[str, Support]
) -> str:
    """Which mode would serve, and why not those before it."""
    lines = []
    for mode in wanted:
        if mode == serves:
            break
        lines += [f"mode {mode} cannot run: {sentence}" for sentence in modes[mode].missing]
    asked = settings.mode.value
    can_also = [mode for mode, each in modes.items() if each.ok and mode != serves]
    if serves is None:
        lines.append(f"With mode {asked} nothing would serve here.")
    else:
        lines.append(f"With mode {asked}, {serves} would serve.")
    if can_also:
        lines.append(f"Could run, too: {', '.join(can_also)}.")
    return "\n".join(lines)


def host_checks(settings: Settings) -> tuple[Check, ...]:
    """What every dataplane needs of a host."""
    is_root = os.geteuid() == 0
    return (
        Check("root", is_root, f"uid {os.geteuid()}", "" if is_root else "sudo ebpf-svc …"),
        *(_forwarding_check(family) for family in settings.families),
    )


def kube_proxy_checks(settings: Settings) -> tuple[Check, ...]:
    """Whether a kube-proxy runs here or left rules; in nobody's way, but worth knowing."""
    agent = lock_holder(settings.run_dir)
    signs, left = kubeproxy.running(agent), kubeproxy.leftovers(settings.families)
    who = ", ".join(f"{sign.what}: {sign.detail}" for sign in signs)
    return (
        Check("process", not signs, who or "none runs", kubeproxy.STOP_IT if signs else "", False),
        Check(
            "rules", not left, ", ".join(left) or "none", "ebpf-svc migrate" if left else "", False
        ),
    )


def _forwarding_check(family: Family) -> Check:
    setting = FORWARDING[family]
    value, name = sysctl.read(setting), setting.replace("/", ".")
    if value is None:
        return Check(name, False, f"this kernel has no {family.label}", "--family 4", False)
    if value == "0":
        # CNI plugins switch it on, often after the agent's start: a warning, not a refusal.
        return Check(name, False, "off: nothing is forwarded", f"sysctl -w {name}=1", False)
    return Check(name, True, "on")


def _row(backend: str, check: Check) -> list[str]:
    state = "ok" if check.ok else "MISSING" if check.required else "limited"
    return [backend, check.name, state, check.detail, check.mend]
