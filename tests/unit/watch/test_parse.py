"""YAML and JSON as the API's own tools read them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.errors import InvalidObject
from ebpf_svc.watch.parse import load, split


def values(text: str | bytes) -> list[Any]:
    data = text.encode() if isinstance(text, str) else text
    return [value for document in split(data) for value in load(document)]


@pytest.mark.parametrize(
    ("scalar", "expected"),
    [
        *[("80", 80), ("-1", -1), ("0x1F", 31), ("010", 8), ("0o10", 8), ("0b11", 3)],
        *[("1_000", 1000), ("1.5", 1.5), ("1e3", 1000.0), ("089", 89.0)],
        *[
            ("yes", True),
            ("y", True),
            ("Off", False),
            ("true", True),
            ("~", None),
            ("null", None),
            ("", None),
        ],
        *[("12:30:45", "12:30:45"), ("2024-01-01", "2024-01-01"), ("10.96.0.1", "10.96.0.1")],
        *[("'80'", "80"), ('"yes"', "yes"), ("!!str 80", "80"), ("!!int '80'", 80)],
    ],
)
def test_a_scalar_is_read_as_kubernetes_reads_it(scalar: str, expected: object) -> None:
    """Dates and base 60 stay text, YAML 1.1 words are booleans, quotes make text."""
    (read,) = values(f"a: {scalar}\n")
    assert read == {"a": expected}
    assert type(read["a"]) is type(expected)


def test_several_documents_are_read_in_order() -> None:
    """`---` separates; empty documents and comments are nothing."""
    assert values("# one\n---\na: 1\n---\n\n--- # two\nb: 2\n---\n") == [{"a": 1}, {"b": 2}]


def test_dashes_inside_a_document_do_not_split_it() -> None:
    """Only a line that begins with three dashes separates."""
    text = 'a: |\n  ---\n  x\nb: "x ---"\n----: c\n'
    assert values(text) == [{"a": "---\nx\n", "b": "x ---", "----": "c"}]


def test_directives_and_document_ends_are_read() -> None:
    assert values("%YAML 1.1\n---\na: 1\n...\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]


def test_anchors_and_merges_are_resolved() -> None:
    """What a mapping says itself wins over what it merges, earlier merges over later ones."""
    text = """
    one: &one {a: 1, b: 1}
    two: &two {b: 2, c: 2}
    both: {<<: [*one, *two], a: 0}
    same: *one
    """
    (read,) = values(text)
    assert read["both"] == {"a": 0, "b": 1, "c": 2}
    assert read["same"] == {"a": 1, "b": 1}


def test_keys_are_text_whatever_they_look_like() -> None:
    """Also quoted `<<`, numbers, and what an anchor names."""
    assert values("{'<<': 1, 2: &k a, *k : 3, yes: 4}") == [{"<<": 1, "2": "a", "a": 3, "yes": 4}]


def test_json_is_read_from_any_file() -> None:
    assert values(json.dumps({"a": [1, None, "é"]})) == [{"a": [1, None, "é"]}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n---\nb: [1\n", "yaml: line 4: did not find expected ',' or ']'"),
        ("a: 1\n---\nb: 1\nb: 2\n", 'yaml: line 4: key "b" already set in map'),
        ("a: *b\n", "yaml: line 1: unknown anchor 'b' referenced"),
        ("a: &a [*a]\n", "yaml: line 1: unknown anchor 'a' referenced"),
        ("? [a]\n: 1\n", "yaml: line 1: a key must be a string"),
        ("[" * 200, "yaml: line 1: nested deeper than 100 levels"),
        ('{"a": ' * 100_000, "yaml: line 1: nested deeper than 100 levels"),
        ("<<: 1\n", "yaml: line 1: map merge requires map"),
    ],
)
def test_text_that_is_no_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    """The line is that of the file, not of the document."""
    with pytest.raises(InvalidObject) as raised:
        values(text)
    assert raised.value.message == message


@pytest.mark.parametrize("data", [b"a: \xff\xfe\n", b"a: \x00\n", b"a: 0x_\n"])
def test_bytes_that_are_no_text_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidObject):
        values(data)


def test_an_expanding_anchor_bomb_costs_nothing() -> None:
    """Aliases share one value: a billion laughs are nine lists."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    (read,) = values("\n".join(lines))
    assert read["a29"][0] is read["a29"][9]


_KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | _KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(_KEYS, _PLAIN, min_size=1, max_size=4), max_size=4))
@settings(max_examples=30, deadline=None)
def test_what_is_dumped_is_read_back(documents: list[dict[str, Any]]) -> None:
    """Whatever a YAML library writes for plain values, these values are read."""
    text = yaml.safe_dump_all(documents, allow_unicode=True, default_style='"')
    assert values(text) == documents


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Nothing but the one error comes out of a file, whatever is in it."""
    try:
        values(data)
    except InvalidObject as error:
        assert error.message
