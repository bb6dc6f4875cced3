"""From files and flags to Settings: the one place where the user's words become values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import yaml
from pydantic import ValidationError

from ebpf_svc.config import EbpfSettings, Settings
from ebpf_svc.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


class Flag(NamedTuple):
    """An option that overrides one field of the settings."""

    name: str
    field: str
    """Path of the field, e.g. `ebpf.bpffs`."""
    metavar: str
    help: str
    many: bool = False
    """May be given several times; several values replace the file's list."""

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
    Flag(
        "--manifests", "manifests", "DIR", "Folder of manifests to serve; followed as it changes."
    ),
    Flag("--node-name", "node_name", "NAME", "This node, as endpoints spell it [the host name]."),
    Flag("--family", "families", "4|6", "IP family to serve; repeat for both [both].", True),
    Flag("--cluster-cidr", "cluster_cidrs", "CIDR", "Pod addresses; repeatable.", True),
    Flag("--service-cidr", "service_cidrs", "CIDR", "Range of cluster IPs; one a family.", True),
    Flag(
        "--node-port-address",
        "node_port_addresses",
        "CIDR|WORD",
        "Addresses that serve node ports: CIDRs, primary, localhost, all; repeatable [all].",
        True,
    ),
    Flag("--masquerade-all", "masquerade_all", "BOOL", "Masquerade all traffic to cluster IPs."),
    Flag(
        "--socket-lb",
        "ebpf.socket_lb",
        "MODE",
        "full, hostOnly or off: what is translated at connect() rather than per packet.",
    ),
    Flag("--pod-device", "ebpf.pod_devices", "PATTERN", "Host side of pod interfaces.", True),
    Flag("--node-device", "ebpf.node_devices", "PATTERN", "NICs and the CNI's tunnels.", True),
    Flag("--maglev", "ebpf.maglev", "BOOL", "Same backend for a client on every node."),
    Flag("--min-sync-period", "min_sync_period_s", "SECONDS", "Pause between two applies."),
    Flag("--resync-period", "resync_period_s", "SECONDS", "How often drift is looked for."),
)
"""What an agent serves and how."""


def settings_options(*flags: Flag) -> Callable[[Command], Command]:
    """Give a command `--config` and one option for each flag; see `settings_from`."""

    def decorate(command: Command) -> Command:
        for flag in reversed(flags):
            command = click.option(
                flag.name,
                flag.parameter,
                metavar=flag.metavar,
                multiple=flag.many,
                default=None,
                help=flag.help,
            )(command)
        return click.option(
            "--config",
            "config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="YAML file of settings; options override its fields.",
        )(command)

    return decorate


def settings_from(options: Mapping[str, Any]) -> Settings:
    """Build the settings from what click parsed: the file's fields under the options given.

    Raises:
        ConfigError: a field is unknown or wrong; further wrong ones are its notes.
    """
    config: Path | None = options.get("config")
    data = _read_config(config) if config else {}
    given: dict[str, Flag] = {}
    for flag in (*PLACE, *SERVING):
        value = options.get(flag.parameter)
        if value is None or value == ():
            continue
        given[flag.field] = flag
        place, *path = reversed(flag.field.split("."))
        section = data
        for step in path:
            section = section.setdefault(step, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{config}: {step}", got=section, expected="a section of fields")
        section[place] = value
    try:
        return Settings.model_validate(data)
    except ValidationError as exc:
        first, *others = (_config_error(error, given, config) for error in exc.errors())
        for other in others:
            first.add_note(str(other))
        raise first from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(str(path), got=str(exc), expected="YAML") from exc
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(str(path), got=type(data).__name__, expected="a mapping of settings")
    return data


def _config_error(error: Any, given: Mapping[str, Flag], config: Path | None) -> ConfigError:
    """Put pydantic's finding into the user's words: the flag or the file's field."""
    words = [str(word) for word in error["loc"]]
    path = ".".join(words)
    flag = next((flag for field, flag in given.items() if path.startswith(field)), None)
    where = flag.name if flag else f"{config}: {path}"
    if error["type"] == "extra_forbidden":
        model = EbpfSettings if words[0] == "ebpf" else Settings
        fields = ", ".join(sorted(model.model_fields))
        return ConfigError(where, got=f"unknown field {words[-1]}", expected=f"one of {fields}")
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return ConfigError(where, got=error["input"], expected=expected)
