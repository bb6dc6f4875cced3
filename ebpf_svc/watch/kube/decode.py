"""From the API server's bytes to values: pages of a list, lines of a watch.

All is validated in one go, in compiled code. Only where that fails are objects looked at one by
one, so that a single wrong one is named and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from ebpf_svc.model.snapshot import Problem
from ebpf_svc.watch.faults import Faults
from ebpf_svc.watch.kube import wire
from ebpf_svc.watch.kube.failures import Broken, Expired, Refused

ItemT = TypeVar("ItemT", bound=wire.Object)
ValueT = TypeVar("ValueT")

Key = tuple[str, str]
"""Namespace and name of an object; the namespace is empty for those that have none."""
Problems = tuple[Problem, ...]

_ANY: TypeAdapter[Any] = TypeAdapter(Any)


@dataclass(frozen=True)
class Resource(Generic[ItemT, ValueT]):
    """A kind of objects: where it is, which are wanted, what they mean."""

    kind: str
    path: str
    page: TypeAdapter[wire.Page[ItemT]]
    event: TypeAdapter[wire.Event[ItemT]]
    item: TypeAdapter[ItemT]
    convert: Callable[[ItemT, Faults], ValueT | None]
    """None = the object means nothing here."""
    selectors: Mapping[str, str] = field(default_factory=dict)
    is_small: bool = False
    """There are a few objects at most: the first list may be the copy the server has at hand."""
    is_optional: bool = False
    """Older servers do not have it, or we may not see it; then there is none."""


class Reading(NamedTuple, Generic[ValueT]):
    """What an object says."""

    key: Key
    value: ValueT | None
    """None = it means nothing here."""
    problems: Problems = ()
    is_broken: bool = False
    """It has the wrong shape: what it means is not known."""


class Line(NamedTuple, Generic[ValueT]):
    """A line of a watch."""

    verb: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    version: str
    """Resource version everything is known up to; may be empty when the object is broken."""
    reading: Reading[ValueT]
    ends_list: bool = False
    """All that was there when the watch began has been sent."""


def read_page(
    resource: Resource[ItemT, ValueT], body: bytes
) -> tuple[wire.ListMeta, Iterator[Reading[ValueT]]]:
    """The objects of a page.

    Raises:
        Broken: this is not a list at all; some proxy's page, perhaps.
    """
    try:
        page = resource.page.validate_json(body)
    except ValidationError:
        return _read_loose_page(resource, body)
    items = page.get("items") or ()
    return page.get("metadata") or {}, (_read(resource, item) for item in items)


def _read_loose_page(
    resource: Resource[ItemT, ValueT], body: bytes
) -> tuple[wire.ListMeta, Iterator[Reading[ValueT]]]:
    try:
        page = wire.ANY_PAGE.validate_json(body)
    except ValidationError as error:
        raise Broken(f"the answer is no list: {body[:80]!r}") from error
    items: Iterable[object] = page.get("items") or ()
    return page.get("metadata") or {}, (_read_loose(resource, item) for item in items)


def read_line(resource: Resource[ItemT, ValueT], text: bytes) -> Line[ValueT]:
    """A line of a watch.

    Raises:
        Expired, Refused: the line says why the watch ends.
        Broken: the line is not an event at all.
    """
    try:
        event = resource.event.validate_json(text)
    except ValidationError:
        return _read_loose_line(resource, text)
    verb = event.get("type") or ""
    if verb == "ERROR":
        raise _reason(text)
    item = event.get("object")
    if item is None:
        raise Broken(f"an event without object: {text[:80]!r}")
    meta = _meta(item)
    version = meta.get("resourceVersion") or ""
    if verb == "BOOKMARK":
        annotations = meta.get("annotations") or {}
        ends_list = annotations.get("k8s.io/initial-events-end") == "true"
        return Line(verb, version, Reading(("", ""), None), ends_list)
    if verb == "DELETED":
        return Line(verb, version, Reading(_key(meta), None))
    return Line(verb, version, _read(resource, item))


def _read_loose_line(resource: Resource[ItemT, ValueT], text: bytes) -> Line[ValueT]:
    try:
        event = _ANY.validate_json(text)
    except ValidationError as error:
        raise Broken(f"the line is no event: {text[:80]!r}") from error
    if not isinstance(event, dict) or not isinstance(event.get("object"), dict):
        raise Broken(f"the line is no event: {text[:80]!r}")
    if event.get("type") == "ERROR":
        raise _reason(text)
    meta = event["object"].get("metadata")
    version = meta.get("resourceVersion") if isinstance(meta, dict) else None
    return Line(
        str(event.get("type")),
        version if isinstance(version, str) else "",
        _read_loose(resource, event["object"]),
    )


def _reason(text: bytes) -> Expired | Refused:
    try:
        status = wire.ERROR_EVENT.validate_json(text).get("object") or {}
    except ValidationError:
        status = {}
    code, message = status.get("code") or 500, status.get("message") or "the watch ended"
    return Expired(message) if code == 410 else Refused(code, message)


def _read(resource: Resource[ItemT, ValueT], item: ItemT) -> Reading[ValueT]:
    key = _key(_meta(item))
    faults = Faults()
    value = resource.convert(item, faults)
    return Reading(key, value, _problems(resource.kind, key, faults) if faults else ())


def _read_loose(resource: Resource[ItemT, ValueT], item: object) -> Reading[ValueT]:
    try:
        return _read(resource, resource.item.validate_python(item))
    except ValidationError as error:
        faults = Faults()
        faults.shape(error)
    meta = item.get("metadata") if isinstance(item, dict) else None
    names = meta if isinstance(meta, dict) else {}
    namespace, name = names.get("namespace"), names.get("name")
    key = (
        namespace if isinstance(namespace, str) else "",
        name if isinstance(name, str) else "",
    )
    return Reading(key, None, _problems(resource.kind, key, faults), is_broken=True)


def _meta(item: wire.Object) -> wire.Meta:
    return item.get("metadata") or {}


def _key(meta: wire.Meta) -> Key:
    return meta.get("namespace") or "", meta.get("name") or ""


def _problems(kind: str, key: Key, faults: Faults) -> Problems:
    namespace, name = key
    ref = f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"
    return tuple(Problem("", ref, fault.field, fault.message) for fault in faults)
