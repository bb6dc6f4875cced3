"""Turn a manifest file's text into declared objects, each with its own verdict.

A bad object is a Problem and is left out; the others of its file stay. Documents are remembered by
their text, so that an edited file gives the *same* objects for everything that was not edited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ebpf_svc.model.snapshot import Problem
from ebpf_svc.watch import parse, raw
from ebpf_svc.watch.declared import Declared, ObjectRef
from ebpf_svc.watch.endpoints import declare_endpoints, declare_slice
from ebpf_svc.watch.faults import Faults
from ebpf_svc.watch.pods import declare_node, declare_pod
from ebpf_svc.watch.raw import Kind
from ebpf_svc.watch.service import declare_service

_Declare = Callable[[ObjectRef, Any, Faults], Declared | None]


def _declaration(adapter: TypeAdapter[Any], declare: _Declare) -> _Declare:
    """Check the shape, then the rules."""

    def run(ref: ObjectRef, item: Any, faults: Faults) -> Declared | None:
        try:
            checked = adapter.validate_python(item)
        except ValidationError as error:
            faults.shape(error)
            return None
        return declare(ref, checked, faults)

    return run


_KINDS: Mapping[Kind, _Declare] = {
    Kind.SERVICE: _declaration(raw.SERVICE, declare_service),
    Kind.ENDPOINT_SLICE: _declaration(raw.ENDPOINT_SLICE, declare_slice),
    Kind.ENDPOINTS: _declaration(raw.ENDPOINTS, declare_endpoints),
    Kind.POD: _declaration(raw.POD, declare_pod),
    Kind.NODE: _declaration(raw.NODE, declare_node),
}
_NAMES = frozenset(_KINDS)


@dataclass(slots=True)
class Parsed:
    """What one document held."""

    objects: list[Declared] = field(default_factory=list)
    invalid: list[ObjectRef] = field(default_factory=list)
    """Objects that are named but break a rule; what is theirs stays reserved for them."""
    problems: list[Problem] = field(default_factory=list)
    ignored_count: int = 0
    """Objects of kinds nobody here reads."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What one file held, document by document; the keys name the documents' texts."""

    documents: Mapping[bytes, tuple[Parsed, ...]]

    @property
    def parsed(self) -> list[Parsed]:
        return [parsed for group in self.documents.values() for parsed in group]


NOTHING = Contents({})


def read(source: str, data: bytes, previous: Contents = NOTHING) -> Contents:
    """Read a file's text.

    Args:
        source: what problems call the file.
        data: all of it.
        previous: what the file held before; documents that still stand there are taken from it.

    Raises:
        InvalidObject: some document is not YAML or JSON at all; the message names the line.
    """
    documents: dict[bytes, tuple[Parsed, ...]] = {}
    for document in parse.split(data):
        known = previous.documents.get(document.digest, ())
        # The same text twice is two declarations, the second of which the control plane refuses.
        seen = documents.get(document.digest, ())
        if len(known) > len(seen):
            parsed = known[len(seen)]
        else:
            parsed = Parsed()
            for item in parse.load(document):
                _read_object(source, item, parsed)
        documents[document.digest] = (*seen, parsed)
    return Contents(documents)


def _read_object(source: str, item: Any, parsed: Parsed, listed_as: str = "") -> None:
    """Read one object, or each object of a list.

    Args:
        source: what problems call the file.
        item: the object as parsed.
        parsed: takes what was found.
        listed_as: what items are that do not say it, in a list of one kind.
    """
    problem = partial(Problem, source)
    if not isinstance(item, dict):
        shown = "a list" if isinstance(item, list) else f"{item!r:.40}"
        parsed.problems.append(problem("", "", f"an object was expected, found {shown}"))
        return
    kind, version = item.get("kind", listed_as), item.get("apiVersion")
    if not kind or not isinstance(kind, str):
        parsed.problems.append(problem("", "kind", "Object 'Kind' is missing"))
        return
    if kind.endswith("List") and isinstance(item.get("items"), list):
        for entry in item["items"]:
            _read_object(source, entry, parsed, kind.removesuffix("List"))
        return
    if kind not in _NAMES:
        parsed.ignored_count += 1
        return
    expected = Kind(kind).api_version
    if version is None and listed_as:
        version = expected
    if version != expected:
        group = str(version or "").rpartition("/")[0]
        if version and group != Kind(kind).group:
            # A namesake from another group: Knative has Services too.
            parsed.ignored_count += 1
            return
        said = f'no matches for kind "{kind}" in version "{version}"' if version else ""
        said = said or f"Required value: apiVersion not set, expected {expected}"
        ref = str(_ref(Kind(kind), item))
        parsed.problems.append(problem(ref, "apiVersion", said))
        return
    _declare(source, _ref(Kind(kind), item), item, parsed)


def _declare(source: str, ref: ObjectRef, item: dict[str, Any], parsed: Parsed) -> None:
    faults = Faults()
    if ref.namespace:
        faults.label("metadata.namespace", ref.namespace)
    if ref.name:
        declared = _KINDS[ref.kind](ref, item, faults)
        if declared is not None and not faults:
            parsed.objects.append(declared)
            return
        parsed.invalid.append(ref)
    else:
        faults.required("metadata.name", "name or generateName is required")
    parsed.problems += [Problem(source, str(ref), fault.field, fault.message) for fault in faults]


def _ref(kind: Kind, item: dict[str, Any]) -> ObjectRef:
    meta = item.get("metadata")
    name = meta.get("name") if isinstance(meta, dict) else None
    namespace = meta.get("namespace") if isinstance(meta, dict) else None
    if kind is Kind.NODE:
        namespace = ""
    else:
        namespace = namespace if isinstance(namespace, str) and namespace else "default"
    return ObjectRef(kind, namespace, name if isinstance(name, str) else "")
