"""Decode a KubeProxyConfiguration: types strictly, unknown fields with a warning (Z9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ebpf_svc.config.kubeproxy.types import POINTER, KubeProxyConfiguration, KubeSection
from ebpf_svc.config.problems import problems_of, raise_all, unknown
from ebpf_svc.errors import ConfigError


class Read(NamedTuple):
    """A decoded configuration."""

    config: KubeProxyConfiguration
    """With every default filled in."""
    said: frozenset[str]
    """Paths of the fields that were given, e.g. `iptables.syncPeriod`; a zero that means unset is
    not given.
    """
    warnings: tuple[str, ...]


def decode(
    data: Mapping[str, Any], where: Callable[[str], str] = str, *, zero_is_unset: bool = True
) -> Read:
    """Decode the fields of a document.

    Args:
        data: the document without `apiVersion` and `kind`.
        where: names the origin of a field for messages.
        zero_is_unset: as Go's defaulting has it, which cannot tell `syncPeriod: 0s` from none; with
            flags it can.

    Raises:
        ConfigError: a field has the wrong type; others are its notes.
    """
    warnings: list[str] = []
    known = _known(data, KubeProxyConfiguration, "", where, warnings)
    try:
        config = KubeProxyConfiguration.model_validate(known)
        if zero_is_unset:
            known = _without_zeros(known, config)
            config = KubeProxyConfiguration.model_validate(known)
    except ValidationError as exc:
        raise_all(
            [
                ConfigError(where(".".join(path)), got=got, expected=expected)
                for path, got, expected in problems_of(exc)
            ]
        )
    said = frozenset(_paths(known, KubeProxyConfiguration))
    return Read(config.with_derived(), said, tuple(warnings))


def section_of(field: FieldInfo) -> type[KubeSection] | None:
    """The section a field holds, or None for a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, KubeSection) else None


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by their names in a file."""
    return {str(field.alias): field for field in model.model_fields.values()}


def _known(
    data: Mapping[str, Any],
    model: type[BaseModel],
    prefix: str,
    where: Callable[[str], str],
    warnings: list[str],
) -> dict[str, Any]:
    """What of it kube-proxy knows; null is as good as nothing."""
    fields, known = fields_of(model), {}
    for key, value in data.items():
        field = fields.get(str(key))
        if field is None:
            expected = unknown(str(key), fields)
            warnings.append(
                f"{where(f'{prefix}{key}')}: kube-proxy has no such field, ignored; {expected}"
            )
        elif value is not None:
            section = section_of(field)
            known[str(key)] = (
                _known(value, section, f"{prefix}{key}.", where, warnings)
                if section and isinstance(value, Mapping)
                else value
            )
    return known


def _without_zeros(data: dict[str, Any], model: BaseModel) -> dict[str, Any]:
    """Leave out zeros that mean unset."""
    kept = {}
    for name, field in type(model).model_fields.items():
        key = str(field.alias)
        if key not in data:
            continue
        value = getattr(model, name)
        if isinstance(value, KubeSection):
            kept[key] = _without_zeros(data[key], value)
        elif value or POINTER in field.metadata:
            kept[key] = data[key]
    return kept


def _paths(data: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, field in fields_of(model).items():
        if key in data:
            section = section_of(field)
            if section:
                yield from _paths(data[key], section, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"
