"""`ebpf-svc config`: what an agent would be told, before it is."""

from __future__ import annotations

from typing import Any

import click
import yaml

from ebpf_svc.cli.output import print_json, print_table
from ebpf_svc.cli.settings import AS_GO, PLACE, SERVING, load_options, settings_options
from ebpf_svc.config import Settings
from ebpf_svc.config.document import KUBE_PROXY_API_VERSION, KUBE_PROXY_KIND
from ebpf_svc.config.given import leaves, spelt, value_of
from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration
from ebpf_svc.config.load import DEFAULT, Loaded
from ebpf_svc.config.reference import (
    EFFECTIVE_COLUMNS,
    KUBE_EFFECTIVE_COLUMNS,
    effective_rows,
    kube_effective_rows,
)
from ebpf_svc.config.write import as_yaml, plain

_as_run = settings_options(*SERVING, *PLACE, kube_proxy=True)


@click.group(name="config")
def command() -> None:
    """Look at the configuration an agent would have: which value, and who gave it.

    Each takes what `run` takes: --config, repeatable, of our kind or kube-proxy's, and all flags.

    \b
    Example:
      ebpf-svc config defaults > ebpf-svc.yaml
      ebpf-svc config validate --config ebpf-svc.yaml
      ebpf-svc config show --config /var/lib/kube-proxy/config.conf

    Next: `ebpf-svc run --config ebpf-svc.yaml`.
    """


@command.command(context_settings=AS_GO)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
@click.option("--given", "only_given", is_flag=True, help="Leave out what is as by default.")
@_as_run
def show(as_json: bool, only_given: bool, **options: Any) -> None:
    """Print every setting in force and which flag or file it came from.

    With kube-proxy's configuration also what became of each of its fields.

    \b
    Example:
      ebpf-svc config show --config config.conf --given
      ebpf-svc config show --json | jq '.settings["ebpf.socketLB"]'
    """
    loaded = load_options(options)
    if as_json:
        print_json(_as_json(loaded, only_given=only_given))
        return
    rows = [row for row in effective_rows(loaded) if not only_given or row[2] != DEFAULT]
    print_table(EFFECTIVE_COLUMNS, rows)
    kube_rows = kube_effective_rows(loaded)
    if kube_rows:
        click.echo("\nFrom kube-proxy's configuration:")
        print_table(KUBE_EFFECTIVE_COLUMNS, kube_rows)
    _print_warnings(loaded)


@command.command(context_settings=AS_GO)
@_as_run
def validate(**options: Any) -> None:
    """Say whether an agent would start with these files and flags.

    Exit code 0: it would; what has no effect is listed. Exit code 2: it would not; everything wrong
    is listed with its place, what stands there and what should.

    \b
    Example:
      ebpf-svc config validate --config config.conf
    """
    loaded = load_options(options)
    _print_warnings(loaded)
    given = sum(origin != DEFAULT for origin in loaded.origins.values())
    click.echo(f"valid: {given} of {len(loaded.origins)} settings given, the rest as by default")


@command.command()
@click.option("--kube-proxy", is_flag=True, help="Kube-proxy's defaults instead.")
def defaults(kube_proxy: bool) -> None:
    """Print a file of all settings, their defaults and meanings, to be edited.

    \b
    Example:
      ebpf-svc config defaults > ebpf-svc.yaml
    """
    if kube_proxy:
        head = {"apiVersion": KUBE_PROXY_API_VERSION, "kind": KUBE_PROXY_KIND}
        click.echo(yaml.safe_dump(head | KubeProxyConfiguration().as_file()), nl=False)
    else:
        click.echo(as_yaml(Settings(), comments=True), nl=False)


def _print_warnings(loaded: Loaded) -> None:
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)


def _as_json(loaded: Loaded, *, only_given: bool) -> dict[str, Any]:
    return {
        "settings": {
            spelt(path): {
                "value": plain(path, value_of(loaded.settings, path)),
                "from": loaded.origins[path],
            }
            for path in leaves()
            if not only_given or loaded.origins[path] != DEFAULT
        },
        "kubeProxy": [
            dict(zip(KUBE_EFFECTIVE_COLUMNS, row, strict=True))
            for row in kube_effective_rows(loaded)
        ],
        "warnings": list(loaded.warnings),
    }
