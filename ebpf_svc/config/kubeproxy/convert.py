"""From a KubeProxyConfiguration to settings of ours (K1), by the table in `fields`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from ebpf_svc.config.given import FieldPath, Given
from ebpf_svc.config.kubeproxy import checks
from ebpf_svc.config.kubeproxy.fields import FIELDS, KubeField, Treatment
from ebpf_svc.config.kubeproxy.read import Read
from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration
from ebpf_svc.config.problems import raise_all
from ebpf_svc.config.settings import LogLevel, Mode
from ebpf_svc.errors import ConfigError
from ebpf_svc.log import LogFormat

EXTERNAL_IPS_GATE = "AllowServiceExternalIPs"
DEBUG_VERBOSITY = 4
"""The verbosity from which Kubernetes' components tell what only debugging needs."""

_DEFAULTS = KubeProxyConfiguration()
_CONVERT: Mapping[str, Callable[[Any], Any]] = {
    "clusterCIDR": lambda text: text.split(","),
    "logging.format": lambda text: LogFormat.JSON if text == "json" else LogFormat.AUTO,
    "logging.verbosity": lambda number: (
        LogLevel.DEBUG if number >= DEBUG_VERBOSITY else LogLevel.INFO
    ),
    "ipvs.scheduler": lambda name: name or "rr",
    "ipvs.excludeCIDRs": lambda cidrs: cidrs or (),
    "featureGates": lambda gates: gates.get(EXTERNAL_IPS_GATE, True),
}


class Converted(NamedTuple):
    """What a KubeProxyConfiguration says about our settings."""

    direct: dict[FieldPath, Given]
    derived: dict[FieldPath, Given]
    """What only follows from it: gives way to everything we were told ourselves."""
    warnings: tuple[str, ...]


def convert(read: Read, where: Callable[[str], str]) -> Converted:
    """Check a configuration as kube-proxy does and convert it.

    Args:
        read: the configuration and what of it was given rather than defaulted; where a default
            would apply, ours does.
        where: names a field's origin for messages.

    Raises:
        ConfigError: kube-proxy would refuse it (K2); further errors are its notes.
    """
    config = read.config
    errors = [
        ConfigError(where(".".join(problem.path)), got=problem.got, expected=problem.expected)
        for problem in checks.problems(config)
    ]
    direct, warnings = {}, []
    for field in FIELDS:
        if field.path not in read.said:
            continue
        value = value_at(config, field.path)
        if field.treatment is Treatment.IGNORED:
            if value != value_at(_DEFAULTS, field.path):
                warnings.append(f"{where(field.path)}: ignored: {field.why}")
        elif is_active(field, config.mode):
            value = _CONVERT.get(field.path, _same)(value)
            direct[field.setting] = Given(value, where(field.path))
    for gate in config.feature_gates:
        if gate == EXTERNAL_IPS_GATE:
            continue
        at = f"{where('featureGates')}.{gate}"
        if get_close_matches(gate, [EXTERNAL_IPS_GATE], cutoff=0.85):
            errors.append(ConfigError(at, got=gate, expected=f"{EXTERNAL_IPS_GATE}?"))
        else:
            warnings.append(f"{at}: ignored: this gate switches nothing here")
    if EXTERNAL_IPS_GATE not in config.feature_gates:
        direct.pop("allow_external_ips", None)
    if errors:
        raise_all(errors)
    return Converted(direct, _derived(read, where), (*read.warnings, *warnings))


def is_active(field: KubeField, mode: str) -> bool:
    """Whether its section supplies the value in that mode of kube-proxy (K1)."""
    return field.modes is None or mode in field.modes


def value_at(config: KubeProxyConfiguration, path: str) -> Any:
    """The value of a field by its name in a file."""
    value: Any = config
    for word in path.split("."):
        names = {str(field.alias): name for name, field in type(value).model_fields.items()}
        value = getattr(value, names[word])
    return value


def _same(value: Any) -> Any:
    return value


def _derived(read: Read, where: Callable[[str], str]) -> dict[FieldPath, Given]:
    config, derived = read.config, {}
    if config.mode:
        derived["mode"] = Given(Mode(config.mode), where("mode"))
        # Its file cannot say so, and a node that serves by other means beats one that does not.
        derived["fallback"] = Given(True, where("mode"))
    if config.mode == "nftables" and "nodePortAddresses" not in read.said:
        derived["node_port_addresses"] = Given(["primary"], where("mode"))  # X15
    if "bindAddress" in read.said:
        for path, setting in (
            ("healthzBindAddress", "healthz_bind_address"),
            ("metricsBindAddress", "metrics_bind_address"),
        ):
            if path not in read.said and value_at(config, path) != value_at(_DEFAULTS, path):
                derived[setting] = Given(value_at(config, path), where("bindAddress"))
    return derived
