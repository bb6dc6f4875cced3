"""From what click parsed to Settings: our flags, and kube-proxy's where a command takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from ebpf_svc.config import Settings
from ebpf_svc.config.given import FieldPath, Given
from ebpf_svc.config.kubeproxy.fields import KubeFlag, kube_flags
from ebpf_svc.config.load import Loaded, load

Command = TypeVar("Command", bound=Callable[..., Any])


class Flag(NamedTuple):
    """An option that overrides one field of the settings."""

    name: str
    field: FieldPath
    metavar: str
    help: str
    many: bool = False
    """May be given several times, with commas too; several values replace the file's list."""
    switch: bool = False
    """May stand without a value, for true."""

    @property
    def parameter(self) -> str:
        return self.field.replace(".", "__")


PLACE = (
    Flag("--bpffs", "ebpf.bpffs", "DIR", "BPF file system that keeps maps and programs."),
    Flag("--cgroup-root", "ebpf.cgroup_root", "DIR", "Socket hooks act below this cgroup."),
    Flag("--run-dir", "run_dir", "DIR", "Lock and status of the agent."),
    Flag("--state-dir", "state_dir", "DIR", "Allocated cluster IPs and node ports."),
    Flag("--cache-dir", "ebpf.cache_dir", "DIR", "Compiled programs."),
)
"""Where an agent lives: what `show`, `check` and `cleanup` need to find it."""

SERVING = (
    Flag("--mode", "mode", "MODE", "Dataplane: auto takes the best this machine can run [auto]."),
    Flag(
        "--manifests", "manifests", "DIR", "Folder of manifests to serve; followed as it changes."
    ),
    Flag("--kubeconfig", "kubernetes.kubeconfig", "FILE", "API server and credentials."),
    Flag("--master", "kubernetes.master", "URL", "API server; overrides the kubeconfig's."),
    Flag("--node-name", "node_name", "NAME", "This node, as endpoints spell it [the host name]."),
    Flag("--family", "families", "4|6", "IP family to serve; repeat for both [both].", many=True),
    Flag("--cluster-cidr", "cluster_cidrs", "CIDR", "Pod addresses; repeatable.", many=True),
    Flag(
        "--service-cidr", "service_cidrs", "CIDR", "Range of cluster IPs; one a family.", many=True
    ),
    Flag(
        "--node-port-address",
        "node_port_addresses",
        "CIDR|WORD",
        "Addresses that serve node ports: CIDRs, primary, localhost, all; repeatable [all].",
        many=True,
    ),
    Flag(
        "--masquerade-all",
        "masquerade_all",
        "BOOL",
        "Masquerade all traffic to cluster IPs.",
        switch=True,
    ),
    Flag(
        "--socket-lb",
        "ebpf.socket_lb",
        "MODE",
        "full, hostOnly or off: what is translated at connect() rather than per packet.",
    ),
    Flag("--pod-device", "ebpf.pod_devices", "PATTERN", "Host side of pod interfaces.", many=True),
    Flag("--node-device", "ebpf.node_devices", "PATTERN", "NICs and the CNI's tunnels.", many=True),
    Flag(
        "--maglev", "ebpf.maglev", "BOOL", "Same backend for a client on every node.", switch=True
    ),
    Flag("--min-sync-period", "min_sync_period_s", "SECONDS", "Pause between two applies."),
    Flag("--resync-period", "resync_period_s", "SECONDS", "How often drift is looked for."),
    Flag("--log-format", "log.format", "FORMAT", "auto, json or console [console on a terminal]."),
    Flag("--log-level", "log.level", "LEVEL", "debug, info, warning or error [info]."),
)
"""What an agent serves and how."""

_OURS = {flag.name for flag in (*PLACE, *SERVING)}
KUBE_PROXY = tuple(flag for flag in kube_flags() if flag.name not in _OURS)
"""Flags that are kube-proxy's alone; taken as they are, and kept out of the way of `--help`."""

AS_GO = {"token_normalize_func": lambda name: name.replace("_", "-")}
"""Context of a command that takes --cluster_cidr for --cluster-cidr, as kube-proxy does."""


def settings_options(*flags: Flag, kube_proxy: bool = False) -> Callable[[Command], Command]:
    """Give a command `--config` and one option for each flag; see `load_options`."""

    def decorate(command: Command) -> Command:
        for kube_flag in KUBE_PROXY if kube_proxy else ():
            command = _kube_option(kube_flag)(command)
        for flag in reversed(flags):
            command = click.option(
                flag.name,
                flag.parameter,
                metavar=flag.metavar,
                multiple=flag.many,
                default=None,
                help=flag.help,
                **_optional_value(flag.switch),
            )(command)
        return click.option(
            "--config",
            "config",
            multiple=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="YAML file of settings, ours or kube-proxy's; repeatable; options override ours.",
        )(command)

    return decorate


def _kube_option(flag: KubeFlag) -> Callable[[Command], Command]:
    names = ("-v", "--v") if flag.name == "--v" else (flag.name,)
    return click.option(
        *names,
        _kube_parameter(flag),
        multiple=flag.is_list,
        default=None,
        hidden=True,
        **_optional_value(flag.is_switch),
    )


def _kube_parameter(flag: KubeFlag) -> str:
    return f"kube__{flag.name.strip('-').replace('-', '_')}"


def _optional_value(switch: bool) -> dict[str, Any]:
    return {"is_flag": False, "flag_value": "true"} if switch else {}


def settings_from(options: Mapping[str, Any]) -> Settings:
    """Build the settings from what click parsed; see `load_options`."""
    return load_options(options).settings


def load_options(options: Mapping[str, Any]) -> Loaded:
    """Build the settings from what click parsed: the files' fields under the options given.

    Raises:
        ConfigError: a field is unknown or wrong; further wrong ones are its notes.
    """
    config = options.get("config") or ()
    paths = (config,) if isinstance(config, Path) else config
    given: dict[FieldPath, Given] = {}
    for flag in (*PLACE, *SERVING):
        value = options.get(flag.parameter)
        if value is None or value == ():
            continue
        if flag.many:
            value = tuple(word for text in value for word in text.split(",") if word)
        given[flag.field] = Given(value, flag.name)
    kube_given = {}
    for kube_flag in KUBE_PROXY:
        value = options.get(_kube_parameter(kube_flag))
        if value is not None and value != ():
            kube_given[kube_flag.name] = value
    if "--v" in kube_given:
        # Go takes -v=5; here the letter's value begins after it.
        kube_given["--v"] = kube_given["--v"].removeprefix("=")
    return load(paths, given, kube_given)
