"""Settings in force, in the words of a KubeProxyConfiguration: for /configz (HS7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ebpf_svc.config.document import KUBE_PROXY_API_VERSION, KUBE_PROXY_KIND
from ebpf_svc.config.given import value_of
from ebpf_svc.config.kubeproxy.convert import DEBUG_VERBOSITY, EXTERNAL_IPS_GATE, is_active
from ebpf_svc.config.kubeproxy.fields import FIELDS
from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration
from ebpf_svc.config.settings import LogLevel, Settings
from ebpf_svc.config.values import format_duration
from ebpf_svc.log import LogFormat
from ebpf_svc.model.net import family_of


def _first_of_each_family(prefixes: tuple[str, ...]) -> str:
    """All that kube-proxy takes, and all that counts (D1)."""
    firsts = {family_of(prefix): prefix for prefix in reversed(prefixes)}
    return ",".join(prefix for prefix in prefixes if firsts[family_of(prefix)] == prefix)


_CONVERT: Mapping[str, Callable[[Any], Any]] = {
    "clusterCIDR": _first_of_each_family,
    "logging.format": lambda style: "json" if style is LogFormat.JSON else "text",
    "logging.verbosity": lambda level: DEBUG_VERBOSITY if level is LogLevel.DEBUG else 0,
    "featureGates": lambda allowed: {} if allowed else {EXTERNAL_IPS_GATE: False},
    "clientConnection.kubeconfig": lambda path: str(path or ""),
    "nodePortAddresses": lambda selection: list(selection) or None,
    "detectLocalMode": str,
}


def as_kube_proxy(settings: Settings) -> dict[str, Any]:
    """Print settings as kube-proxy prints its own; what it has no field for is left out."""
    data = {"apiVersion": KUBE_PROXY_API_VERSION, "kind": KUBE_PROXY_KIND}
    data |= KubeProxyConfiguration().as_file()
    for field in FIELDS:
        if not field.setting or not is_active(field, settings.kube_proxy_mode):
            continue
        value = value_of(settings, field.setting)
        if field.path in _CONVERT:
            value = _CONVERT[field.path](value)
        elif field.setting.endswith("_s"):
            value = format_duration(value)
        *sections, name = field.path.split(".")
        place: Any = data
        for section in sections:
            place = place[section]
        place[name] = value
    return data
