"""Read kube-proxy's flags into the fields of a KubeProxyConfiguration (K4, K5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ebpf_svc.config.kubeproxy.fields import DEPRECATED_PORTS, kube_flags
from ebpf_svc.config.kubeproxy.read import fields_of, section_of
from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration
from ebpf_svc.config.values import with_port
from ebpf_svc.errors import ConfigError

FlagValue = str | Sequence[str]
"""What stood behind a flag; several for one that may be repeated."""

_BOOLEANS = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
"""Go's."""


class FlagFields(NamedTuple):
    """What flags say, as a document would."""

    data: dict[str, Any]
    names: dict[str, str]
    """Flag by the path of the field it gave."""
    warnings: tuple[str, ...]


def read_flags(flags: Mapping[str, FlagValue]) -> FlagFields:
    """Take apart kube-proxy's flags, those of `kube_flags` that are fields.

    Raises:
        ConfigError: a value fits no field; what has the wrong type is left to decoding.
    """
    data: dict[str, Any] = {}
    names: dict[str, str] = {}
    for flag in kube_flags():
        if flag.name in flags:
            for path in flag.paths:
                names[path] = flag.name
                _put(data, path, _value(path, flags[flag.name]))
    if not str(data.get("hostnameOverride", "x")).strip():
        raise ConfigError("--hostname-override", got=data["hostnameOverride"], expected="a name")
    return FlagFields(data, names, _deprecated_ports(data, names, flags))


def add_flag_defaults(data: dict[str, Any]) -> None:
    """Add the one default that flags have and files do not: they start from the iptables section's
    minSyncPeriod, whatever the mode (K5).
    """
    data.setdefault("ipvs", {}).setdefault("minSyncPeriod", "1s")


def _value(path: str, text: FlagValue) -> Any:
    """Bring a flag's text into the type of its field; what does not fit is left to its check."""
    model, field = KubeProxyConfiguration, None
    for name in path.split("."):
        field = fields_of(model)[name]
        model = section_of(field) or model  # type: ignore[assignment]
    assert field is not None
    kind = str(field.annotation)
    if path == "featureGates":
        pairs = (pair.partition("=") for pair in _words(text))
        return {name: _BOOLEANS.get(value, value) for name, _, value in pairs}
    if path == "logging.vmodule":
        pairs = (pair.partition("=") for pair in _words(text))
        return [{"filePattern": name, "verbosity": _number(value)} for name, _, value in pairs]
    if "list" in kind:
        return _words(text)
    assert isinstance(text, str)
    if "bool" in kind:
        return _BOOLEANS.get(text, text)
    if kind == "<class 'int'>" or path == "clientConnection.qps":
        return _number(text)
    return text


def _words(text: FlagValue) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    return [word for each in texts for word in each.split(",") if word]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _deprecated_ports(
    data: dict[str, Any], names: dict[str, str], flags: Mapping[str, FlagValue]
) -> tuple[str, ...]:
    """Apply --healthz-port and --metrics-port as kube-proxy does.

    A port joins an address without one; the default address has one already.
    """
    warnings = []
    for name, path in DEPRECATED_PORTS.items():
        if name not in flags:
            continue
        text = str(flags[name])
        if not text.isdigit() or int(text) > 65535:
            raise ConfigError(name, got=text, expected="a port, or 0 for no server")
        address = data.get(path, "")
        if text == "0":
            names[path], data[path] = name, ""
        elif address and with_port(address, int(text)) != address:
            data[path] = with_port(address, int(text))
        else:
            warnings.append(f"{name}: no effect beside an address that has a port already")
    return tuple(warnings)


def _put(data: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
    data[name] = value
