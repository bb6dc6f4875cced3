"""Values as they were given: by which file or flag, for which field of the settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from ebpf_svc.config.problems import problems_of, raise_all, unknown
from ebpf_svc.config.settings import Settings
from ebpf_svc.config.values import Section, file_name
from ebpf_svc.errors import ConfigError

FieldPath = str
"""A field of the settings, e.g. `ebpf.bpffs`."""


class Given(NamedTuple):
    """A value somebody gave."""

    value: Any
    where: str
    """For messages: `config.yaml: ebpf.bpffs`, or a flag."""


def section_of(model: type[BaseModel], name: str) -> type[Section] | None:
    """The section a field holds, or None for a value."""
    kind = model.model_fields[name].annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[FieldPath]:
    """Every field that holds a value, in the order of definition."""
    for name in model.model_fields:
        section = section_of(model, name)
        if section:
            yield from leaves(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def value_of(settings: BaseModel, path: FieldPath) -> Any:
    """The value of a field."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def spelt(path: FieldPath) -> str:
    """The field as a file of kind spells it: `ebpf.socket_lb` is ebpf.socketLB."""
    return ".".join(map(file_name, path.split(".")))


def flatten(data: Mapping[str, Any], source: str, *, spell_as_file: bool) -> dict[FieldPath, Given]:
    """Take the sections of a document apart.

    Args:
        data: the document.
        source: its file, for messages.
        spell_as_file: how fields are named to a user who misspelt one.

    Raises:
        ConfigError: a field is unknown or given twice, or a section is none; others are its notes.
    """
    found: dict[FieldPath, Given] = {}
    errors: list[ConfigError] = []

    def walk(part: Mapping[str, Any], model: type[BaseModel], fields: str, words: str) -> None:
        names = {
            spelling: name for name in model.model_fields for spelling in (name, file_name(name))
        }
        for key, value in part.items():
            where, name = f"{source}: {words}{key}", names.get(str(key))
            if name is None:
                known = [file_name(each) if spell_as_file else each for each in model.model_fields]
                errors.append(
                    ConfigError(
                        where, got=f"unknown field {key}", expected=unknown(str(key), known)
                    )
                )
                continue
            section, path = section_of(model, name), f"{fields}{name}"
            if section is None:
                if path in found:
                    errors.append(ConfigError(where, got="a second spelling", expected="one"))
                found[path] = Given(value, where)
            elif isinstance(value, Mapping):
                walk(value, section, f"{path}.", f"{words}{key}.")
            elif value is not None:
                errors.append(ConfigError(where, got=value, expected="a section of fields"))

    walk(data, Settings, "", "")
    if errors:
        raise_all(errors)
    return found


def build(given: Mapping[FieldPath, Given]) -> Settings:
    """Validate what was given, defaults beneath.

    Raises:
        ConfigError: in the words of whoever gave the value; further wrong ones are its notes.
    """
    data: dict[str, Any] = {}
    for path, (value, _) in given.items():
        *sections, name = path.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    try:
        return Settings.model_validate(data)
    except ValidationError as exc:
        raise_all([_error(given, path, got, expected) for path, got, expected in problems_of(exc)])


def _error(
    given: Mapping[FieldPath, Given], path: tuple[str, ...], got: Any, expected: str
) -> ConfigError:
    """Name the flag or the file's field that gave a wrong value."""
    text = ".".join(path)
    for field, (value, where) in given.items():
        if text == field:
            return ConfigError(where, got=value, expected=expected)
        if text.startswith(f"{field}.") or field.startswith(f"{text}."):
            return ConfigError(where, got=got, expected=expected)
    return ConfigError(text, got=got, expected=expected)
