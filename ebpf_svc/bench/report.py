"""`ebpf-svc bench report RUN...`: runs of any benchmark as HTML in one file, or as Markdown."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebpf_svc.bench import figures, goals, plots, tables
from ebpf_svc.bench.document import Block, Command, Heading, Plot, Table, Text, html, markdown
from ebpf_svc.bench.figures import Comparison, Figure
from ebpf_svc.bench.packet import EMPTY, MINIMAL
from ebpf_svc.bench.record import interprets_programs
from ebpf_svc.bench.variants import DIRECT, TRACKED
from ebpf_svc.model.net import Family

_ABOUT = """\
All figures of a table were taken in one run, the variants in turns; ratios are medians of each \
round's ratio.
Rates are per second of the one CPU that client, kernel and server share, so another process's \
time is not counted as ours.
Absolute times of another machine or another hour say little."""


def blocks(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Block]:
    """A report of some runs.

    Args:
        runs: names, such as those of their files, and their JSON.
    """
    yield Heading("Benchmarks", 1)
    yield Text(_ABOUT)
    for name, run in runs:
        if run["benchmark"] == "path":
            yield from _path(name, Comparison.of(run))
    applies = [run for _, run in runs if run["benchmark"] == "apply"]
    if applies:
        yield from _applies(applies)
    for name, run in runs:
        if run["benchmark"] == "packet":
            yield from _packet(run)
        elif run["benchmark"] not in ("path", "apply"):
            yield Heading(_TITLES.get(run["benchmark"], name))
            yield from _taken_on(run)
            yield _series(run, with_limits=True)


_BASELINES = """\
Goals are held against a direct request on a node that tracks no connections. The last column is \
the same figure against one that tracks them, as a node with any NAT or state rule does."""
_TO = {DIRECT: "to direct", TRACKED: "to direct, tracked"}
_TITLES = {
    "watch": "From the API server to the kernel",
    "maglev": "Maglev tables",
    "counts": "Counts that must not grow",
}


def _path(name: str, comparison: Comparison) -> Iterator[Block]:
    where = comparison.environment.get("where", "")
    most = max(figure.services for figure in comparison.figures)
    family = Family(comparison.parameters.get("family", Family.V4)).label
    yield Heading(f"Data path, {family}, up to {most:,} services{f', {where}' if where else ''}")
    yield from _taken_on({"environment": comparison.environment, "took_s": comparison.took_s})
    for note in comparison.notes:
        yield Text(note)
    for variant in comparison.variants:
        if variant.skipped:
            yield Text(f"Not measured: {variant.title}: {variant.skipped}")
    for title, svg in plots.of_comparison(comparison):
        yield Plot(f"{name}-{title}", svg, title.replace("-", " "))
    found = list(goals.of_comparison(comparison))
    if found and not interprets_programs(comparison.environment):
        rows = [(goal.sentence, goal.measured, _held(goal.holds), goal.tracked) for goal in found]
        yield Heading("Goals", 3)
        yield Text(_BASELINES)
        yield Table(("goal", "measured", "", "beside direct, tracked"), rows)
    for figure in comparison.figures:
        yield Heading(f"{figure.title}, {tables.size(figure)}", 3)
        yield _figure(figure, comparison)


def _figure(figure: Figure, comparison: Comparison) -> Table:
    peer = tables.peer_of(comparison)
    seen = [one for one in tables.DETAILS if any(one in each for each in figure.details.values())]
    bases = [name for name in (DIRECT, TRACKED, peer) if name in figure.samples]
    head = ["", f"{figure.unit}", "spread", *(_TO.get(name, f"to {name}") for name in bases)]
    rows = []
    for variant in comparison.measured:
        if variant.name in figure.samples:
            ratios = [figure.ratio(variant.name, base) for base in bases]
            details = figure.details.get(variant.name, {})
            rows.append(
                (
                    variant.title,
                    tables.number(figure.median(variant.name)),
                    f"±{figure.spread(variant.name):.0%}",
                    *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                    *(tables.number(details[one]) if one in details else "" for one in seen),
                )
            )
    return Table([*head, *(tables.DETAILS[one] for one in seen)], rows)


def _applies(runs: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    yield Heading("Control plane")
    for title, svg in plots.of_applies(runs):
        yield Plot(f"apply-{title}", svg, title)
    for run in runs:
        told = run["parameters"]
        most = f"{max(told['services']):,} x {told['endpoints']}"
        yield Heading(f"Mode {told['mode']}, up to {most}", 3)
        yield from _taken_on(run)
        yield _series(run, with_limits=any(each["limit"] for each in run["series"]))


def _series(run: Mapping[str, Any], *, with_limits: bool) -> Table:
    with_peer = any(each.get("beside") for each in run["series"])
    head = ["", "unit", "median", "p99", "spread", "n"]
    head += ["limit", ""] if with_limits else []
    head += ["kube-proxy"] if with_peer else []
    rows = []
    for each in run["series"]:
        row = [
            each["name"],
            each["unit"],
            *(tables.number(each[what]) for what in ("median", "p99")),
            f"±{each['spread']:.0%}",
            str(len(each["samples"])),
        ]
        if with_limits:
            limit = each["limit"]
            row += (
                ["", ""] if limit is None else [f"{each['judged']} {limit:g}", _held(each["holds"])]
            )
        rows.append([*row, *([each.get("beside", "")] if with_peer else [])])
    return Table(head, rows)


def _packet(run: Mapping[str, Any]) -> Iterator[Block]:
    where = run["environment"].get("where", "")
    unit = "Machine instructions" if where else "Nanoseconds"
    yield Heading(f"Packets through one program{f', {where}' if where else ''}")
    yield from _taken_on(run)
    yield Text(f"{unit} above an empty program; minimal: the least a program for this can do.")
    rows = []
    for row in run["rows"]:
        samples = row["samples_ns"]
        ours = next(name for name in samples if name not in (EMPTY, MINIMAL))

        def cost(name: str, samples: Mapping[str, list[int]] = samples) -> str:
            if name not in samples:
                return ""
            pairs = zip(samples[name], samples[EMPTY], strict=True)
            return tables.number(
                sorted(taken - empty for taken, empty in pairs)[len(samples[name]) // 2]
            )

        flows = "always new" if row["flows"] is None else f"{row['flows']:,}"
        rows.append(
            (
                f"IPv{row['family']} {row['case']}",
                flows,
                f"{row['services']:,}",
                cost(ours),
                cost(MINIMAL),
            )
        )
    yield Table(("", "flows", "services", "ours", "minimal"), rows)
    if run.get("programs"):
        yield Table(
            ("program", "instructions", "walked through by the verifier"),
            [
                (each["name"], f"{each['instructions']:,}", f"{each['verified']:,}")
                for each in run["programs"]
            ],
        )
    if not where:  # the goals are in nanoseconds
        yield Table(("goal", ""), [(each["goal"], _held(each["holds"])) for each in run["goals"]])


def _taken_on(run: Mapping[str, Any]) -> Iterator[Block]:
    """The machine, the load, the command."""
    machine = run["environment"]
    load = f"{machine['load_1m']:.1f}"
    if "load_after_1m" in machine:
        load += f" before and {machine['load_after_1m']:.1f} after"
    took = f" It took {run['took_s']:.0f} s." if run.get("took_s") else ""
    yield Text(
        f"Linux {machine['kernel']}, {machine['cpus']} CPUs ({machine['cpu']}), load average "
        f"{load}.{took}"
    )
    command = machine.get("command") or _command(run)
    if command:
        yield Command(command)


def _command(run: Mapping[str, Any]) -> str:
    """The command by what the run was told; empty when it did not say."""
    told = run.get("parameters", {})
    options = {name: value if isinstance(value, list) else [value] for name, value in told.items()}
    words = [word for name, values in options.items() for word in (f"--{name}", *map(str, values))]
    return shlex.join(["ebpf-svc", "bench", run["benchmark"], *words]) if words else ""


def _held(holds: bool | None) -> str:
    return "" if holds is None else "held" if holds else "MISSED"


def main(argv: Sequence[str] | None = None) -> int:
    """Read runs and write what was asked for."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="ebpf-svc bench report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="JSON of a benchmark")
    parser.add_argument("--html", type=Path, metavar="PATH", help="one file, plots included")
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH", help="plots go beside the first run"
    )
    given = parser.parse_args(words)
    found = [(path.stem, figures.read(path)) for path in given.runs]
    document = list(blocks(found))
    if given.html is None and given.markdown is None:
        parser.error("say --html PATH or --markdown PATH")
    if given.html is not None:
        given.html.write_text(html(document, title="ebpf-svc: benchmarks"))
    if given.markdown is not None:
        text = markdown(
            document,
            made_by=shlex.join(["ebpf-svc", "bench", "report", *words]),
            plots=given.runs[0].parent,
            home=given.markdown.parent,
        )
        given.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
