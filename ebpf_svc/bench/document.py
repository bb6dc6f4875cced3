"""A report as a list of blocks, and its two forms: Markdown beside SVG files, HTML in one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Heading:
    """Begins a part."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """Sentences, one a line."""

    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """What was run."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; the first column is words."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG with a name that can be a file's."""

    name: str
    svg: str
    title: str


Block = Heading | Text | Command | Table | Plot


def markdown(blocks: Sequence[Block], *, made_by: str, plots: Path, home: Path) -> str:
    """The report as Markdown; writes its plots into a folder.

    Args:
        made_by: the command that made it, told on top.
        plots: where the SVG files go.
        home: the folder the text will be in, to which links are relative.
    """
    plots.mkdir(parents=True, exist_ok=True)
    parts = [f"<!-- Made by `{made_by}`; change the run or ebpf_svc/bench, not this file. -->"]
    for block in blocks:
        if isinstance(block, Plot):
            (plots / f"{block.name}.svg").write_text(block.svg + "\n")
            place = (plots / f"{block.name}.svg").resolve().relative_to(home.resolve())
            parts.append(f"![{block.title}]({place.as_posix()})")
        else:
            parts.append("\n".join(_markdown(block)))
    return "\n\n".join(parts) + "\n"


def _markdown(block: Heading | Text | Command | Table) -> Iterator[str]:
    if isinstance(block, Heading):
        yield f"{'#' * block.level} {block.text}"
    elif isinstance(block, Command):
        yield f"```sh\n{block.text}\n```"
    elif isinstance(block, Table):
        yield f"| {' | '.join(block.head)} |"
        yield f"|---|{'---:|' * (len(block.head) - 1)}"
        for row in block.rows:
            yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
    else:
        yield block.text


_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; color: #1f2430;
  background: #f5f6f8; margin: 0; }
main { max-width: 900px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 28px; margin: 0 0 8px; } h2 { font-size: 21px; margin: 44px 0 10px; }
h3 { font-size: 16px; margin: 26px 0 6px; } p { margin: 8px 0; max-width: 76ch; }
svg { width: 100%; height: auto; margin: 14px 0; box-shadow: 0 1px 3px rgba(16, 24, 40, .1);
  border-radius: 8px; }
pre { background: #1f2430; color: #e8ebf0; padding: 10px 14px; border-radius: 6px;
  overflow-x: auto; font-size: 13px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; background: #fff; font-size: 13px;
  margin: 10px 0; border-radius: 6px; box-shadow: 0 1px 3px rgba(16, 24, 40, .1); }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid #eceef2;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { color: #6b7280; font-weight: 600; }
td.missed { color: #b42318; font-weight: 600; } td.held { color: #067647; }
"""


def html(blocks: Sequence[Block], *, title: str) -> str:
    """The report as one HTML file that needs nothing else."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Command):
        return f"<pre>{escape(block.text)}</pre>"
    if isinstance(block, Plot):
        return block.svg
    if isinstance(block, Table):
        head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
        rows = "\n".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in block.rows)
        return f"<div class='wide'><table><tr>{head}</tr>\n{rows}</table></div>"
    return f"<p>{escape(block.text)}</p>"


def _cell(cell: str) -> str:
    kind = cell.lower() if cell in ("held", "MISSED") else ""
    return f"<td class='{kind}'>{escape(cell)}</td>" if kind else f"<td>{escape(cell)}</td>"
