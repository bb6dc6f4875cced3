"""`--help-kube-proxy`: kube-proxy's flags, which the short help leaves out."""

from __future__ import annotations

from typing import Any

import click

from ebpf_svc.cli.output import print_table
from ebpf_svc.config.given import spelt
from ebpf_svc.config.kubeproxy.fields import DEPRECATED_PORTS, FIELDS, kube_flags


def rows() -> list[list[str]]:
    """Flag, field, treatment, our setting, remark: as in docs/configuration.md."""
    fields = {field.path: field for field in FIELDS}
    table = []
    for flag in kube_flags():
        for path in flag.paths:
            field = fields[path]
            setting = spelt(field.setting) if field.setting else ""
            table.append([flag.name, path, field.treatment.value, setting, field.why])
        if flag.name in DEPRECATED_PORTS:
            path = DEPRECATED_PORTS[flag.name]
            setting = spelt(fields[path].setting)
            table.append([flag.name, path, "honoured", setting, "deprecated; 0 = no server"])
        elif not flag.paths:
            table.append([flag.name, "", "honoured", "kubernetes.master", ""])
    return table


def _print(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    print_table(["flag", "KubeProxyConfiguration", "here", "setting", "remark"], rows())
    click.echo(
        "\nBeside a KubeProxyConfiguration file only logging flags, --hostname-override, --master,"
        "\n--cleanup and --write-config-to count, as with kube-proxy."
    )
    ctx.exit()


def help_option(command: Any) -> Any:
    """Give a command `--help-kube-proxy`."""
    return click.option(
        "--help-kube-proxy",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print,
        help="List kube-proxy's flags and what becomes of each.",
    )(command)
