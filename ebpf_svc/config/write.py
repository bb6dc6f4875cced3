"""Print settings as a file `--config` reads: one document of our kind."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cache
from typing import Any

import yaml
from pydantic import BaseModel

from ebpf_svc.config.document import API_VERSION, KIND
from ebpf_svc.config.given import section_of, spelt
from ebpf_svc.config.settings import Settings
from ebpf_svc.config.values import file_name, format_duration

WIDTH = 100
_FIELD = re.compile(r"(?<=`)[a-z_.]+(?=`)")


def as_yaml(settings: Settings, *, comments: bool = False) -> str:
    """Print every setting; reading it gives equal settings.

    Args:
        settings: what to print.
        comments: put what the fields mean above them.
    """
    lines = [f"apiVersion: {API_VERSION}", f"kind: {KIND}"]
    lines += _section(settings, "", comments)
    return "\n".join(lines) + "\n"


def plain(name: str, value: Any) -> Any:
    """A value as a file holds it: durations with their unit, paths and enums as text."""
    if name.endswith("_s"):
        return format_duration(value)
    if isinstance(value, tuple):
        return [plain("", each) for each in value]
    if value is None or isinstance(value, bool | int | float):
        return int(value) if type(value) is not bool and isinstance(value, int) else value
    return str(value)


@cache
def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """What each field of a section says about itself, other fields spelt as in a file."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, follower in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(follower, ast.Expr)
            and isinstance(follower.value, ast.Constant)
        ):
            text = " ".join(str(follower.value.value).split())
            found[statement.target.id] = _FIELD.sub(lambda match: spelt(match[0]), text)
    return found


def _section(section: BaseModel, indent: str, comments: bool) -> list[str]:
    model, lines = type(section), []
    for name, value in section:
        nested = section_of(model, name)
        about = docstrings(model).get(name) or str(nested.__doc__ if nested else "")
        if comments and about:
            mark = f"{indent}# "
            lines += textwrap.wrap(
                " ".join(about.split()), WIDTH, initial_indent=mark, subsequent_indent=mark
            )
        if nested:
            lines.append(f"{indent}{file_name(name)}:")
            lines += _section(value, f"{indent}  ", comments)
        else:
            text = yaml.safe_dump(
                plain(name, value), default_flow_style=True, width=10_000
            ).removesuffix("...\n")
            lines.append(f"{indent}{file_name(name)}: {text.strip()}")
    return lines
