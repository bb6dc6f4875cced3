"""The objects of the stand-in API server, their history, and the selectors over them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Item = dict[str, Any]
Key = tuple[str, str]


class Gone(Exception):
    """What was asked for is too long ago."""


class Entry(NamedTuple):
    """An object as stored."""

    version: int
    item: Item
    body: bytes
    """Its JSON as lists have it, without kind and API version."""


class Change(NamedTuple):
    """A step of the history."""

    version: int
    before: Entry | None
    after: Entry | None
    raw: bytes = b""
    """Sent to watchers as it is."""


class Selector(NamedTuple):
    """Label and field selectors of a request, as (path, operator, value)."""

    terms: tuple[tuple[str, str, str, str], ...] = ()

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Selector:
        found = []
        for kind in ("labelSelector", "fieldSelector"):
            for term in filter(None, query.get(kind, "").split(",")):
                if term.startswith("!"):
                    found.append((kind, term[1:], "absent", ""))
                    continue
                operator = next((o for o in ("!=", "==", "=") if o in term), "present")
                name, _, value = term.partition(operator)
                found.append((kind, name, operator, value))
        return cls(tuple(found))


def matches(entry: Entry | None, selector: Selector) -> bool:
    """Whether a watcher with this selector sees the object."""
    if entry is None:
        return False
    for kind, name, operator, value in selector.terms:
        if kind == "labelSelector":
            got = ((entry.item.get("metadata") or {}).get("labels") or {}).get(name)
        else:
            part: Any = entry.item
            for step in name.split("."):
                part = (part or {}).get(step)
            got = part or ""
        ok = {
            "absent": got is None,
            "present": got is not None,
            "!=": got != value,
            "==": got == value,
            "=": got == value,
        }[operator]
        if not ok:
            return False
    return True


@dataclass
class Collection:
    """All objects of a kind."""

    kind: str
    version: str
    objects: dict[Key, Entry] = field(default_factory=dict)
    history: list[Change] = field(default_factory=list)
    oldest: int = 0
    """Versions before this one are forgotten."""
    watchers: set[asyncio.Event] = field(default_factory=set)
    _lists: dict[str, tuple[int, list[Entry]]] = field(default_factory=dict)
    """What is left of lists that are read page by page, by token."""

    def put(self, item: Item, version: int) -> None:
        meta = {**(item.get("metadata") or {}), "resourceVersion": str(version)}
        item = {**item, "metadata": meta}
        key = (str(meta.get("namespace") or ""), str(meta.get("name") or ""))
        entry = Entry(version, item, json.dumps(item, separators=(",", ":")).encode())
        self.history.append(Change(version, self.objects.get(key), entry))
        self.objects[key] = entry

    def delete(self, key: Key, version: int) -> None:
        self.history.append(Change(version, self.objects.pop(key), None))

    def bookmark(self, version: int) -> None:
        self.history.append(Change(version, None, None, raw=self.bookmark_event(version)))

    def forget(self, version: int) -> None:
        self.oldest = version
        self._lists.clear()

    def wake(self) -> None:
        for watcher in self.watchers:
            watcher.set()

    def position(self, version: int) -> int:
        """Index of the first change after a version."""
        return next(
            (i for i, change in enumerate(self.history) if change.version > version),
            len(self.history),
        )

    def page(
        self, version: int, limit: int, token: str, selector: Selector
    ) -> tuple[int, list[Entry], str]:
        """A page of the list at one version: that version, the objects, the next page's token."""
        if token:
            if token not in self._lists:
                raise Gone("The provided continue parameter is too old")
            version, entries = self._lists.pop(token)
        else:
            entries = [entry for entry in self.objects.values() if matches(entry, selector)]
        rest = entries[limit:] if limit else []
        if not rest:
            return version, entries, ""
        token = f"{version}-{len(rest)}-{id(rest)}"
        self._lists[token] = version, rest
        return version, entries[:limit], token

    def event(self, verb: str, entry: Entry, version: int = 0) -> bytes:
        body = entry.body
        if version:
            meta = {**entry.item["metadata"], "resourceVersion": str(version)}
            body = json.dumps({**entry.item, "metadata": meta}, separators=(",", ":")).encode()
        head = f'{{"type":"{verb}","object":{{"kind":"{self.kind}","apiVersion":"{self.version}",'
        return head.encode() + body[1:] + b"}\n"

    def bookmark_event(self, version: int, annotations: Mapping[str, str] | None = None) -> bytes:
        meta = {"resourceVersion": str(version), "creationTimestamp": None}
        item: Item = {"kind": self.kind, "apiVersion": self.version, "metadata": meta}
        if annotations:
            item["metadata"] = {**meta, "annotations": annotations}
        # The real server sends empty specs along.
        if self.kind == "EndpointSlice":
            item |= {"endpoints": None, "ports": None}
        else:
            item["spec"] = {}
        return json.dumps({"type": "BOOKMARK", "object": item}).encode() + b"\n"

    def render(self, change: Change, selector: Selector) -> bytes:
        """The line a watcher gets; empty = it does not concern it."""
        if change.raw:
            return change.raw
        before, after = matches(change.before, selector), matches(change.after, selector)
        if after and change.after:
            return self.event("MODIFIED" if before else "ADDED", change.after)
        if before and change.before:
            return self.event("DELETED", change.before, change.version)
        return b""
