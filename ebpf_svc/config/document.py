"""Read configuration files: the YAML documents of a file, told apart by their kind.

Scalars resolve as Kubernetes' YAML library resolves them: no dates and no base 60, so that an
address stays text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ebpf_svc.errors import ConfigError

API_VERSION = "ebpf-svc.io/v1alpha1"
KIND = "EbpfSvcConfiguration"
KUBE_PROXY_API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KUBE_PROXY_KIND = "KubeProxyConfiguration"

_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_READ_OTHERWISE = frozenset({_INT, _FLOAT, "tag:yaml.org,2002:timestamp"})
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|[1-9][0-9_]*|0)\Z")
_NUMBER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z")


class Source(Enum):
    """Whose settings a document holds."""

    OURS = KIND
    KUBE_PROXY = KUBE_PROXY_KIND


class Document(NamedTuple):
    """One document of a file."""

    place: str
    """The file, for messages."""
    source: Source
    has_kind: bool
    """False: a plain mapping of settings."""
    data: dict[str, Any]
    """What it says, `apiVersion` and `kind` taken out."""
    repeated: tuple[str, ...]
    """Keys given twice, with their lines; the last one won."""


class _Loader(yaml.SafeLoader):
    """Notes keys given twice instead of hiding them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                self.repeated.append(f"{key.value} (line {key.start_mark.line + 1})")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _READ_OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, _INTEGER, [*"-+0123456789"])
_Loader.add_implicit_resolver(_FLOAT, _NUMBER, [*"-+0123456789."])
_SOURCES = {
    (API_VERSION, KIND): Source.OURS,
    (KUBE_PROXY_API_VERSION, KUBE_PROXY_KIND): Source.KUBE_PROXY,
}


def read_documents(path: Path) -> list[Document]:
    """Read the documents of a file; empty ones vanish, a ConfigMap stands for what it holds.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or holds something else than settings.
    """
    try:
        text = path.read_text()
    except UnicodeDecodeError as exc:
        raise ConfigError(str(path), got=str(exc), expected="YAML") from exc
    except OSError as exc:
        raise ConfigError(str(path), got=exc.strerror, expected="a readable file") from exc
    return list(_documents(str(path), text))


def _documents(place: str, text: str) -> Iterator[Document]:
    try:
        loaded = _load(text)
    except yaml.YAMLError as exc:
        raise ConfigError(place, got=str(exc), expected="YAML") from exc
    for data, repeated in loaded:
        if isinstance(data, dict) and data.get("kind") == "ConfigMap":
            yield from _of_config_map(place, data)
        elif data is not None:
            yield _document(place, data, repeated)


def _of_config_map(place: str, config_map: dict[str, Any]) -> Iterator[Document]:
    """The settings among its entries; kube-proxy's holds its kubeconfig too."""
    kinds = re.compile(f"^kind: *['\"]?({KIND}|{KUBE_PROXY_KIND})\\b", re.MULTILINE)
    for name, text in (config_map.get("data") or {}).items():
        if isinstance(text, str) and kinds.search(text):
            yield from _documents(f"{place}: data.{name}", text)


def _load(text: str) -> list[tuple[Any, tuple[str, ...]]]:
    loader: Any = _Loader(text)
    found = []
    try:
        while loader.check_data():
            found.append((loader.get_data(), tuple(loader.repeated)))
            loader.repeated.clear()
    finally:
        loader.dispose()
    return found


def _document(place: str, data: Any, repeated: tuple[str, ...]) -> Document:
    if not isinstance(data, dict):
        raise ConfigError(place, got=type(data).__name__, expected="a mapping of settings")
    data = {str(key): value for key, value in data.items()}
    has_kind = "kind" in data or "apiVersion" in data
    version, kind = data.pop("apiVersion", None), data.pop("kind", None)
    source = _SOURCES.get((version, kind)) if has_kind else Source.OURS
    if source is None:
        raise ConfigError(
            f"{place}: apiVersion, kind",
            got=f"{version} {kind}",
            expected=" or ".join(" ".join(names) for names in _SOURCES),
        )
    return Document(place, source, has_kind, data, repeated)
