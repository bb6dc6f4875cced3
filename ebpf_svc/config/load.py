"""Precedence: from files and flags, ours and kube-proxy's, to Settings that know their origins.

From the weakest: what merely follows from kube-proxy's configuration, its file, our file,
kube-proxy's flags, our flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpf_svc.config.detect import prepare
from ebpf_svc.config.document import Document, Source, read_documents
from ebpf_svc.config.given import FieldPath, Given, build, flatten, leaves, value_of
from ebpf_svc.config.settings import Settings
from ebpf_svc.errors import ConfigError

if TYPE_CHECKING:
    from ebpf_svc.config.kubeproxy.flags import FlagValue
    from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration

DEFAULT = "default"
FOLLOW_MODE = ("mode", "fallback", "node_port_addresses")
"""What only follows from kube-proxy's mode: void where we were told a `mode` of our own."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and how they came about."""

    settings: Settings
    origins: Mapping[FieldPath, str]
    """For every field: the flag, the file and field, or `default`."""
    warnings: tuple[str, ...] = ()
    """What was accepted but has no effect."""
    kube_proxy: KubeProxyConfiguration | None = None
    """The KubeProxyConfiguration that was read, or that kube-proxy's flags amount to."""
    said_by_kube_proxy: Mapping[str, str] = field(default_factory=dict)
    """Its fields that were given, and by what."""


@dataclass(frozen=True, slots=True)
class _KubeProxy:
    """What kube-proxy's side gave."""

    file: Mapping[FieldPath, Given] = field(default_factory=dict)
    flags: Mapping[FieldPath, Given] = field(default_factory=dict)
    derived: Mapping[FieldPath, Given] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    config: KubeProxyConfiguration | None = None
    said: Mapping[str, str] = field(default_factory=dict)

    def derived_under(self, ours: Mapping[FieldPath, Given]) -> dict[FieldPath, Given]:
        """What follows of it, where we were told `ours`."""
        void = FOLLOW_MODE if "mode" in ours else ()
        return {path: each for path, each in self.derived.items() if path not in void}


def load(
    paths: Sequence[Path] = (),
    flags: Mapping[FieldPath, Given] | None = None,
    kube_flags: Mapping[str, FlagValue] | None = None,
) -> Loaded:
    """Read the configuration.

    Args:
        paths: files of one or more documents; of ours and of kube-proxy's kind one each.
        flags: flags of ours, by the fields they set.
        kube_flags: flags only kube-proxy has, by name.

    Raises:
        ConfigError: something is wrong or unknown; further findings are its notes.
    """
    flags, kube_flags = dict(flags or {}), dict(kube_flags or {})
    documents = _by_source([document for path in paths for document in read_documents(path)])
    ours, theirs = documents.get(Source.OURS), documents.get(Source.KUBE_PROXY)
    given: dict[FieldPath, Given] = {}
    has_kube = theirs is not None or bool(kube_flags)
    kube = _read_kube_proxy(theirs, flags, kube_flags) if has_kube else _KubeProxy()
    if ours:
        _refuse_repeated(ours)
        given |= flatten(ours.data, ours.place, spell_as_file=ours.has_kind)
    given |= {**kube.flags, **flags}
    given = {**kube.derived_under(given), **kube.file, **given}
    settings = build({path: each for path, each in given.items() if each.value is not None})
    prepared = prepare(settings)
    return Loaded(
        prepared,
        _origins(settings, prepared, given),
        kube.warnings,
        kube.config,
        kube.said,
    )


def _by_source(documents: Sequence[Document]) -> dict[Source, Document]:
    found: dict[Source, Document] = {}
    for document in documents:
        if document.source in found:
            raise ConfigError(
                document.place,
                got=f"a second {document.source.value}",
                expected="one in all files",
            )
        found[document.source] = document
    return found


def _refuse_repeated(document: Document) -> None:
    if document.repeated:
        raise ConfigError(
            document.place,
            got=", ".join(document.repeated),
            expected="every field once",
        )


def _read_kube_proxy(
    document: Document | None, flags: dict[FieldPath, Given], kube_flags: dict[str, FlagValue]
) -> _KubeProxy:
    """Read kube-proxy's file and flags; beside the file most flags do not count (K3)."""
    from ebpf_svc.config.kubeproxy.convert import convert  # noqa: PLC0415  # rarely needed
    from ebpf_svc.config.kubeproxy.flags import add_flag_defaults, read_flags  # noqa: PLC0415
    from ebpf_svc.config.kubeproxy.read import Read, decode  # noqa: PLC0415

    warnings = _drop_uncounted(flags, kube_flags) if document else []
    given = read_flags(kube_flags)

    def where(path: str) -> str:
        flagged = [each for each in given.names if path.startswith(each)]
        if flagged:
            longest = max(flagged, key=len)
            return given.names[longest] + path[len(longest) :]
        return f"{document.place}: {path}" if document else path

    data = _merged(document.data, given.data) if document else given.data
    if document:
        warnings += (f"{document.place}: {key}: given twice" for key in document.repeated)
    else:
        add_flag_defaults(data)
    read = decode(data, where, zero_is_unset=document is not None)
    if document is None:
        read = Read(read.config, read.said & given.names.keys(), read.warnings)
    converted = convert(read, where)
    by_flag = {path for path, each in converted.direct.items() if each.where.startswith("--")}
    return _KubeProxy(
        file={path: each for path, each in converted.direct.items() if path not in by_flag},
        flags={path: converted.direct[path] for path in by_flag},
        derived=converted.derived,
        warnings=(*warnings, *given.warnings, *converted.warnings),
        config=read.config,
        said={path: where(path) for path in read.said},
    )


def _drop_uncounted(flags: dict[FieldPath, Given], kube_flags: dict[str, FlagValue]) -> list[str]:
    """Drop the flags kube-proxy ignores beside its file, ours of the same name too; say which."""
    from ebpf_svc.config.kubeproxy.fields import kube_flags as known_flags  # noqa: PLC0415

    uncounted = {flag.name for flag in known_flags() if not flag.beside_file}
    ignored = [name for name in kube_flags if name in uncounted]
    for name in ignored:
        del kube_flags[name]
    for path, (_, name) in list(flags.items()):
        if name in uncounted:
            ignored.append(name)
            del flags[path]
    return [f"{name}: ignored beside a KubeProxyConfiguration file" for name in ignored]


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(below, value)
        else:
            merged[key] = value
    return merged


def _origins(
    settings: Settings, prepared: Settings, given: Mapping[FieldPath, Given]
) -> dict[FieldPath, str]:
    origins = {path: given[path].where if path in given else DEFAULT for path in leaves()}
    mode = settings.detect_local.mode.value
    for path in ("cluster_cidrs", "ebpf.pod_devices"):
        if value_of(prepared, path) != value_of(settings, path):
            origins[path] = f"detectLocal.mode {mode}"
    return origins
