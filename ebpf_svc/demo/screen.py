"""Show the tour as it happens: one screen on a terminal, lines into a pipe, nothing for --json."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ebpf_svc.demo.frontends import REQUESTS
from ebpf_svc.demo.report import Asker, Probe, Report, Step

PLAIN_WIDTH = 120
LEGEND = f"two marks: IPv4 and IPv6, {REQUESTS} requests each; right: who answered\n"
REFRESHES_PER_S = 10
TALL = 42
"""Lines a terminal needs to show the drawing of the cluster too."""
HELD, BROKEN = "✓", "✗"


class Screen(Protocol):
    """Where the tour is shown; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def note(self, text: str) -> None:
        """Say what is being done now."""

    def show_probes(self, probes: Sequence[Probe]) -> None:
        """Show a kind of frontend that has been asked; the report has it already."""

    def show_step(self, step: Step) -> None:
        """Show a promise that was tried; the report has it already."""

    def finish(self, seconds: float, farewell: str = "") -> None:
        """Show the summary and what the user may do next."""


def make_screen(report: Report, *, silent: bool) -> Screen:
    """The screen that fits standard output."""
    if silent:
        return SilentScreen()
    return LiveScreen(report) if sys.stdout.isatty() else PlainScreen(report)


class SilentScreen:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def show_probes(self, probes: Sequence[Probe]) -> None:
        pass

    def show_step(self, step: Step) -> None:
        pass

    def finish(self, seconds: float, farewell: str = "") -> None:
        pass


class PlainScreen(SilentScreen):
    """A line as each thing happens, the tables in the end."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._console = Console(width=PLAIN_WIDTH, highlight=False, emoji=False)

    def show_probes(self, probes: Sequence[Probe]) -> None:
        for probe in probes:
            self._line(probe.held, _probe_line(probe))

    def show_step(self, step: Step) -> None:
        self._line(step.held, f"{step.name}: {step.detail}")

    def finish(self, seconds: float, farewell: str = "") -> None:
        self._console.print()
        self._console.print(self._report.topology, markup=False)
        self._console.print(_summary(self._report))
        self._console.print(_verdict(self._report, seconds))
        if farewell:
            self._console.print(farewell, markup=False)

    def _line(self, held: bool, text: str) -> None:
        mark = "ok  " if held else "FAIL"
        self._console.print(f"{mark} {text}", markup=False, soft_wrap=True)


class LiveScreen:
    """One screen: the cluster, the table of frontends filling up, the promises one by one."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._console = Console(highlight=False, emoji=False)
        self._spinner = Spinner("dots", "")
        self._live = Live(console=self._console, refresh_per_second=REFRESHES_PER_S)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._spinner.update(text=Text(f" {text}"))
        self._draw()

    def show_probes(self, probes: Sequence[Probe]) -> None:
        self._draw()

    def show_step(self, step: Step) -> None:
        self._draw()

    def finish(self, seconds: float, farewell: str = "") -> None:
        self._live.update(Group(self._body(), _verdict(self._report, seconds)), refresh=True)
        self._live.stop()
        if farewell:
            self._console.print(farewell, markup=False)

    def _draw(self) -> None:
        self._live.update(Group(self._body(), self._spinner))

    def _body(self) -> RenderableType:
        if not self._report.topology:
            return Text("")
        summary = _summary(self._report)
        if self._console.height < TALL:
            return summary
        return Group(Text(self._report.topology + "\n", no_wrap=True, style="dim"), summary)


def _summary(report: Report) -> RenderableType:
    parts: list[RenderableType] = []
    if report.probes:
        parts += [_frontend_table(report.probes), Text(LEGEND, style="dim")]
    if report.steps:
        parts.append(_step_table(report.steps))
    return Group(*parts)


def _frontend_table(probes: Sequence[Probe]) -> Table:
    """A line a frontend: asked from where, by TCP and UDP, in IPv4 and IPv6; who answered."""
    servers = sorted({server for probe in probes for server in probe.servers})
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("frontend", "address"):
        table.add_column(f"\n{heading}", no_wrap=True)
    for asker in Asker:
        table.add_column(f"{asker.value}\nTCP UDP", no_wrap=True)
    for server in servers:
        table.add_column(f"\n{server}", justify="right", no_wrap=True)
    for name in dict.fromkeys(probe.frontend for probe in probes):
        group = [probe for probe in probes if probe.frontend == name]
        counts = [sum(probe.servers[server] for probe in group) for server in servers]
        shares = (f"{100 * count / max(1, sum(counts)):.0f} %" for count in counts)
        cells = (_asker_cell(group, asker) for asker in Asker)
        table.add_row(name, group[0].address, *cells, *shares)
    return table


def _asker_cell(group: Sequence[Probe], asker: Asker) -> Text:
    """`✓✓  ✓✓`: TCP and UDP, for each a mark of IPv4 and one of IPv6."""
    asked = [probe for probe in group if probe.asker is asker]
    by_protocol = [
        Text.assemble(
            *(
                _mark(probe.held)
                for probe in sorted(asked, key=lambda probe: probe.family)
                if probe.protocol is protocol
            )
        )
        for protocol in sorted({probe.protocol for probe in asked})
    ]
    return Text("  ").join(by_protocol) if asked else Text("-", style="dim")


def _step_table(steps: Sequence[Step]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", style="dim")
    for step in steps:
        table.add_row(_mark(step.held), step.name, Text(step.detail))
    return table


def _mark(held: bool) -> Text:
    return Text(HELD, style="green") if held else Text(BROKEN, style="bold red")


def _verdict(report: Report, seconds: float) -> Text:
    asked = sum(probe.requests for probe in report.probes)
    rows = len({probe.frontend for probe in report.probes}) + len(report.steps)
    if report.held:
        text = f"all {rows} rows held, {asked:,} requests besides the loads, in {seconds:.0f} s"
        return Text(text, style="bold green")
    broken = [probe for probe in report.probes if not probe.held]
    lines = [_probe_line(probe) for probe in broken]
    lines += [step.name for step in report.steps if not step.held]
    return Text("NOT held:\n  " + "\n  ".join(lines), style="bold red")


def _probe_line(probe: Probe) -> str:
    host = f"[{probe.address}]" if ":" in probe.address else probe.address
    answered = sum(probe.servers.values())
    spread = " ".join(f"{name} {count}" for name, count in sorted(probe.servers.items()))
    failures = f"  {'; '.join(probe.failures)}" if probe.failures else ""
    return (
        f"{probe.frontend} {host}:{probe.port}/{probe.protocol.value} from {probe.asker.value}: "
        f"{answered} of {probe.requests} answered, {spread}{failures}"
    )
