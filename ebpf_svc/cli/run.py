"""`ebpf-svc run`: the agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ebpf_svc import __version__
from ebpf_svc.cli.kubeproxy import help_option
from ebpf_svc.cli.settings import AS_GO, PLACE, SERVING, load_options, settings_options
from ebpf_svc.log import configure, get_logger

log = get_logger(__name__)


@click.command(name="run", context_settings=AS_GO)
@settings_options(*SERVING, *PLACE, kube_proxy=True)
@click.option(
    "--write-config-to",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the effective settings to this file and exit.",
)
@click.option(
    "--init-only",
    is_flag=True,
    help="Mount the BPF file system, set connection tracking up, and exit.",
)
@click.option("--cleanup", is_flag=True, hidden=True, help="As `ebpf-svc cleanup`.")
@click.version_option(__version__, prog_name="ebpf-svc")
@help_option
def command(write_config_to: Path | None, init_only: bool, cleanup: bool, **options: Any) -> None:
    """Serve the services of a cluster, or of a folder of manifests, on this machine.

    From an API server it takes Services and EndpointSlices, and its own Node; from a folder also
    Endpoints, Pods and Nodes, and a change of a file is served within a tenth of a second. SIGTERM
    stops the agent and leaves traffic flowing; the next agent takes over. SIGHUP reads the settings
    anew, reads the kernel back at once and repairs what others changed.

    Takes kube-proxy's flags and its configuration file as they are. A change of a file is taken on
    while running; what needs a restart says so.

    \b
    Example:
      ebpf-svc run --manifests examples/ --cluster-cidr 10.244.0.0/16
      ebpf-svc run --kubeconfig /etc/kubernetes/kubelet.conf

    Next, in another terminal: `ebpf-svc show` says what is served.
    """
    loaded = load_options(options)
    settings = loaded.settings
    configure(style=settings.log.format, level=settings.log.level)
    for warning in loaded.warnings:
        log.warning("config.ignored", reason=warning)
    if write_config_to:
        from ebpf_svc.config.write import as_yaml  # noqa: PLC0415

        write_config_to.write_text(as_yaml(settings))
        return
    if cleanup:
        from ebpf_svc.cli.cleanup import command as clean  # noqa: PLC0415

        click.get_current_context().invoke(clean, **options)
        return
    if init_only:
        from ebpf_svc.prepare import prepare  # noqa: PLC0415

        prepare(settings, strict=True)
        return
    from ebpf_svc.daemon import run  # noqa: PLC0415  # after the usage errors, which need none of it

    run(
        settings,
        reload=lambda: load_options(options).settings,
        config_files=options["config"],
    )
