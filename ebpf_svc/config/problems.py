"""What is wrong with a configuration, all of it at once: place, what stands there, what should."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError

from ebpf_svc.errors import ConfigError


class Problem(NamedTuple):
    """One finding of a validation."""

    path: tuple[str, ...]
    """Names from the top to the field; empty = the whole."""
    got: Any
    expected: str


def problems_of(error: ValidationError) -> Iterator[Problem]:
    """Put what pydantic found into our words."""
    for found in error.errors():
        expected = found["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        expected = expected.removesuffix(", unable to interpret input")
        yield Problem(tuple(map(str, found["loc"])), found["input"], expected)


def unknown(name: str, known: Iterable[str]) -> str:
    """What is expected in place of a name nobody knows: the likely one, or all there are."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    return f"{close[0]}?" if close else f"one of {', '.join(names)}"


def raise_all(errors: Sequence[ConfigError]) -> NoReturn:
    """Raise the first error with the others as its notes."""
    first, *others = errors
    for other in others:
        first.add_note(str(other))
    raise first
