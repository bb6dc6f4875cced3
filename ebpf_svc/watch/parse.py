"""Read YAML and JSON text into plain Python values, the way the API's own tools read them.

Owns syntax alone: what the values mean is for others. Scalars resolve as Kubernetes' YAML library
resolves them (YAML 1.1 booleans, no dates, no base 60), a key given twice is an error, and values
are built straight from libyaml's events: three times as fast as `yaml.CSafeLoader`, and without
its node tree in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml

from ebpf_svc.errors import InvalidObject

_MAX_DEPTH = 100
"""Nesting no manifest reaches: a hostile file ends here, not in Python's recursion limit."""

_SEPARATOR = re.compile(rb"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_UNSPLITTABLE = re.compile(rb"^(?:%|\.\.\.)", re.MULTILINE)
_MAYBE_SPECIAL = frozenset("0123456789+-.~nNtTfFyYoO")
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|[1-9][0-9_]*|0)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_WORDS: dict[str, bool | float | None] = {"": None, "~": None}
for _value, _words in {None: "null", True: "y yes true on", False: "n no false off"}.items():
    for _word in _words.split():
        _WORDS |= dict.fromkeys((_word, _word.capitalize(), _word.upper()), _value)
_WORDS |= dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan"))
for _sign, _limit in {"": "inf", "+": "inf", "-": "-inf"}.items():
    _WORDS |= dict.fromkeys((_sign + form for form in (".inf", ".Inf", ".INF")), float(_limit))

_new_parser: Callable[[bytes], Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Document(NamedTuple):
    """One YAML document of a file, or a whole JSON file."""

    text: bytes
    line: int
    """Lines of the file before it."""
    digest: bytes
    """Names the text: the same digest, the same objects."""


def split(data: bytes) -> Iterator[Document]:
    """Cut a file at its `---` lines, so that an edit costs the parsing of one document.

    YAML allows a line that starts with `---` nowhere else, not even in block scalars. Files with
    directives or explicit document ends are rare and stay whole.
    """
    start = line = 0
    ends = []
    # A plain search is much faster, and says for most JSON that there is nothing to cut.
    if b"\n---" in data and not _UNSPLITTABLE.search(data):
        ends = [match.start() for match in _SEPARATOR.finditer(data)]
    for end in (*ends, len(data)):
        text = data[start:end]
        # The first document need not begin with dashes, the last not end with a line.
        body = text.removeprefix(b"---\n").rstrip()
        if body.strip(b"- \t\r\n"):
            yield Document(text, line, hashlib.blake2b(body, digest_size=16).digest())
        line += text.count(b"\n")
        start = end


def load(document: Document) -> list[Any]:
    """Parse a document; empty ones vanish.

    Raises:
        InvalidObject: the text is neither YAML nor JSON; the message names the line.
    """
    # JSON is YAML, but Python's own reader takes a tenth of the time.
    if document.text.lstrip().startswith(b"{"):
        try:
            return [json.loads(document.text)]
        except (ValueError, RecursionError):
            pass
    try:
        return [value for value in _load_yaml(document.text) if value is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {document.line + mark.line + 1}: " if mark else ""
        said = error.problem or error.context or "the text ends too early"
        raise InvalidObject("", "", "", f"yaml: {where}{said}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidObject("", "", "", f"yaml: {error}") from error


def _load_yaml(text: bytes) -> Iterator[Any]:
    parser = _new_parser(text)
    try:
        while (event := parser.get_event()) is not None:
            if event.__class__ is yaml.DocumentStartEvent:
                yield _Builder(parser.get_event).build(parser.get_event(), 0)
    finally:
        parser.dispose()


class _Builder:
    """Builds one document's value from its events."""

    def __init__(self, next_event: Callable[[], Any]) -> None:
        self._next = next_event
        self._anchors: dict[str, Any] = {}

    def build(self, event: Any, depth: int) -> Any:
        kind = event.__class__
        if kind is yaml.ScalarEvent:
            # `implicit[0]` says plain style: only unquoted scalars may be more than text.
            value = _resolve(event) if event.implicit[0] else _tagged(event)
            if event.anchor:
                self._anchors[event.anchor] = value
            return value
        if kind is yaml.AliasEvent:
            # An anchor is known once its value is complete, so nothing can contain itself.
            if event.anchor not in self._anchors:
                raise _error(event, f"unknown anchor '{event.anchor}' referenced")
            return self._anchors[event.anchor]
        if depth >= _MAX_DEPTH:
            raise _error(event, f"nested deeper than {_MAX_DEPTH} levels")
        collection = self._mapping(depth) if kind is yaml.MappingStartEvent else self._list(depth)
        if event.anchor:
            self._anchors[event.anchor] = collection
        return collection

    def _list(self, depth: int) -> list[Any]:
        items = []
        while (event := self._next()).__class__ is not yaml.SequenceEndEvent:
            items.append(self.build(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        while (event := self._next()).__class__ is not yaml.MappingEndEvent:
            key = self._key(event)
            value = self.build(self._next(), depth + 1)
            if key is None:
                others = value if isinstance(value, list) else [value]
                if not all(isinstance(other, dict) for other in others):
                    raise _error(event, "map merge requires map")
                merged += others
            elif key in mapping:
                raise _error(event, f'key "{key}" already set in map')
            else:
                mapping[key] = value
        for other in merged:
            mapping = {**other, **mapping}
        return mapping

    def _key(self, event: Any) -> str | None:
        """A key; keys are text, whatever they look like. None is the one that merges."""
        if event.__class__ is yaml.ScalarEvent:
            key: str = event.value
            if event.anchor:
                self._anchors[event.anchor] = key
            return None if key == "<<" and event.implicit[0] else key
        if event.__class__ is yaml.AliasEvent:
            value = self._anchors.get(event.anchor or "")
            if isinstance(value, str):
                return value
        raise _error(event, "a key must be a string")


def _resolve(event: Any) -> Any:
    text: str = event.value
    if text and text[0] not in _MAYBE_SPECIAL:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text):
        digits = text.replace("_", "").lower()
        bare = digits.lstrip("+-")
        if len(bare) > 1 and bare[0] == "0" and bare[1].isdigit():
            return int(digits, 8)
        return int(digits, 0)
    return float(text) if _FLOAT.match(text) else text


def _tagged(event: Any) -> Any:
    """A quoted scalar, or one whose tag says what it is."""
    if event.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"):
        return _resolve(event)
    if event.tag == "tag:yaml.org,2002:null":
        return None
    return event.value


def _error(event: Any, message: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, message, event.start_mark)
