"""`ebpf-svc check`: what this machine can do, and how to mend what it cannot."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import Any

import click

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
    """Say what this machine can do, and for each missing thing the command that mends it.

    Changes nothing. Exit code 1 when something required is missing.

    \b
    Example:
      ebpf-svc check
      ebpf-svc check --json | jq '.checks[] | select(.ok | not) | .mend'

    Next: `ebpf-svc run --manifests DIR`.
    """
    settings = settings_from(options)
    reports = [Support("host", host_checks(settings))]
    reports.append(Support("kube-proxy", kube_proxy_checks(settings)))
    reports += [make_dataplane(mode, settings).check() for mode in MODES]
    if as_json:
        checks = [
            {"of": each.backend, **asdict(check)} for each in reports for check in each.checks
        ]
        print_json({"ok": all(each.ok for each in reports), "checks": checks})
    else:
        rows = [_row(each.backend, check) for each in reports for check in each.checks]
        print_table(["of", "check", "state", "found", "mend it with"], rows)
    if not all(each.ok for each in reports):
        sys.exit(FAILURE)


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
