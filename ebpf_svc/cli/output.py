"""Print tables: coloured on a terminal, plain aligned columns into a pipe, JSON when asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

Row = Sequence[str]


def print_table(columns: Row, rows: Sequence[Row], *, styles: Sequence[str] = ()) -> None:
    """Print rows under their columns; every cell is whole, however long.

    Args:
        columns: headings, printed in capitals.
        rows: cells as text; as many as there are columns.
        styles: rich's style of each column, for terminals; missing ones are plain.
    """
    headings = [column.upper() for column in columns]
    if sys.stdout.isatty():
        _print_rich(headings, rows, styles)
        return
    widths = [max(map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _print_rich(headings: Row, rows: Sequence[Row], styles: Sequence[str]) -> None:
    from rich.console import Console  # noqa: PLC0415  # only a terminal pays for it
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        style = styles[number] if number < len(styles) else None
        table.add_column(heading, style=style, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def age(seconds: float) -> str:
    """A duration in words short enough for a table: `0.3 s`, `12 s`, `5 min`, `3 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, unit_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit_s:.0f} {unit}"
    return f"{seconds // 86400:.0f} d"
