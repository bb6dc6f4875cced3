"""What a packet's way to a backend costs: every variant side by side, taking turns round by round.

All clusters are up at the same time; each figure is measured variant after variant, again and
again, so that what disturbs a minute disturbs all of them. Root; the machine's own namespaces stay
untouched.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ebpf_svc.bench import figures, generator, measures, report, tables, vm
from ebpf_svc.bench.document import html
from ebpf_svc.bench.figures import Comparison, Figure
from ebpf_svc.bench.generator import Outcome, Server
from ebpf_svc.bench.measures import MEASURES, Measure, Step
from ebpf_svc.bench.population import Population
from ebpf_svc.bench.progress import Progress
from ebpf_svc.bench.record import environment, interprets_programs
from ebpf_svc.bench.site import Site
from ebpf_svc.bench.variants import DEFAULT, KUBE_PROXIES, WAYS, Way, choose
from ebpf_svc.config import EbpfSettings, Settings
from ebpf_svc.errors import EbpfSvcError
from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing
from ebpf_svc.testbed.host import Host

SERVICES = (1, 100, 1_000, 10_000)
FULL_AT = 1_000
ENDPOINTS = 3
BUSY_SHARE = 0.9
"""Of the CPU, that client and server got: below, others had much of it."""
GENERATOR_SHARE = 0.33
"""Of the CPU time, that the generator's own instructions may take."""
INTERPRETED = (
    "This kernel interprets eBPF programs, which others compile to machine code: what uses them is "
    "slower here than elsewhere. Ratios hold for this kernel alone."
)
UNACCOUNTED = (
    "This kernel keeps no exact account of CPU time: rates are what a CPU would do if every "
    "exchange took as long as the median one."
)
_START_MS = 30


@dataclass(frozen=True, slots=True)
class Options:
    """How much to measure."""

    services: Sequence[int] = SERVICES
    endpoints: int = ENDPOINTS
    """Of the services that are there and not asked."""
    rounds: int = 7
    ms: int = 150
    """Of one sample."""
    variants: Sequence[str] = DEFAULT
    measures: Sequence[str] = ()
    """Keys; none = all."""
    full_at: int = FULL_AT
    """Services at which everything is measured."""
    kube_proxy: Path | None = None
    """The real one, for the variants that need it."""
    family: Family = Family.V4
    """Of all addresses."""

    @classmethod
    def short(cls) -> Options:
        """What a run for CI does."""
        return cls(services=(1, 100), rounds=3, ms=60, full_at=100)


def run(options: Options, *, command: str = "") -> Comparison:
    """Measure.

    Raises:
        EbpfSvcError: a variant that should run here did not.
    """
    progress = Progress()
    # A guest is given programs that were compiled outside.
    cache_dir = Path(os.environ.get("EBPF_SVC_ARTIFACTS") or EbpfSettings().cache_dir)
    told = Settings(cluster_cidrs=addressing.CLUSTER_CIDRS, ebpf=EbpfSettings(cache_dir=cache_dir))
    ways, variants = choose(options.variants, told, options.kube_proxy)
    for variant in variants:
        if variant.skipped:
            progress.done(f"{variant.name}: skipped: {variant.skipped}")
    comparison = Comparison(
        "path",
        variants,
        {**environment(), "command": command, "where": os.environ.get(vm.GUEST, "")},
        parameters=_plain(options),
    )
    with ExitStack() as undo:
        binary = generator.program(EbpfSettings().cache_dir)
        sites: dict[str, Site] = {}
        for way in ways:
            if way.place not in sites:
                progress.doing(f"{way.name}: cluster")
                site = Site(
                    way.mode,
                    binary=binary,
                    cache_dir=cache_dir,
                    cpu=_cpu(),
                    family=options.family,
                    update=_sized(way, options),
                    tracked=way.tracked,
                    xdp_wires=way.xdp_wires,
                    kube_proxy=options.kube_proxy if way.is_kube_proxy else None,
                )
                sites[way.place] = undo.enter_context(closing(site))
        _Run(options, comparison, ways, sites, binary, progress).all()
    comparison.took_s = round(time.time() - comparison.started_s, 1)
    comparison.environment["load_after_1m"] = os.getloadavg()[0]
    return comparison


@dataclass(slots=True)
class _Run:
    """One run: what is open, and what was seen."""

    options: Options
    comparison: Comparison
    ways: Sequence[Way]
    sites: dict[str, Site]
    binary: Path
    progress: Progress
    cpu_ns: int = 0
    user_ns: int = 0
    elapsed_ns: int = 0

    def all(self) -> None:
        """Take every figure."""
        options = self.options
        steps = list(
            measures.steps(options.services, full_at=options.full_at, wanted=options.measures)
        )
        reached = 0
        before_ns = sum(server.user_ns() for server in self._servers())
        for number, step in enumerate(steps):
            if step.services != reached:
                self._grow(step.services)
                reached = step.services
            left_s = sum(self._takes_s(later) for later in steps[number:])
            what = f"{step.measure.title}, {step.services:,} services, {step.backends} backends"
            self.progress.doing(what, left_s=left_s)
            figure = self._take(step)
            self.comparison.figures.append(figure)
            self.progress.done(tables.line(figure, self.comparison))
        self.user_ns += sum(server.user_ns() for server in self._servers()) - before_ns
        self._warn()

    def _servers(self) -> list[Server]:
        return [server for site in self.sites.values() for server in site.servers]

    def _ways_of(self, measure: Measure) -> list[Way]:
        """Who takes part: from outside, ways that differ in who asks inside are the same."""
        if not measure.outside:
            return list(self.ways)
        return list({way.place: way for way in reversed(self.ways)}.values())[::-1]

    def _takes_s(self, step: Step) -> float:
        ways = len(self._ways_of(step.measure))
        return ways * ((self.options.rounds * (self.options.ms + 15)) + _START_MS) / 1000

    def _grow(self, services: int) -> None:
        programmed = self.comparison.parameters.setdefault("programmed_s", {})
        for name, site in self.sites.items():
            if site.is_programmed:
                self.progress.doing(f"{name}: {services:,} services")
                took_s = site.grow(
                    Population(services, self.options.endpoints, self.options.family)
                )
                programmed[f"{name} {services}"] = round(took_s, 2)

    def _take(self, step: Step) -> Figure:
        """Every variant in turn, so many rounds; the first run of each warms up."""
        measure, figure = step.measure, measures.figure(step)
        ways = self._ways_of(measure)
        outcomes: dict[str, list[Outcome]] = {way.name: [] for way in ways}
        for way in ways:
            self._run_once(way, step, _START_MS)
        for turn in range(self.options.rounds):
            # A rotation: nobody always follows the same neighbour's caches.
            for way in (*ways[turn % len(ways) :], *ways[: turn % len(ways)]):
                outcomes[way.name].append(self._run_once(way, step, self.options.ms))
        figure.samples = {
            name: [measure.value(outcome) for outcome in seen] for name, seen in outcomes.items()
        }
        measures.summarize(figure, measure, outcomes)
        return figure

    def _run_once(self, way: Way, step: Step, ms: int) -> Outcome:
        site, measure = self.sites[way.place], step.measure
        host = site.asker("outside" if measure.outside else way.asker)
        direct, family = way.mode is None, self.options.family
        order = measure.order(step.backends, direct=direct, family=family)
        cpu_ns = partial(site.cpu_ns, with_agent=way.relays)
        _set_offload(host, measure)
        try:
            seen = generator.run(host, self.binary, order, ms=ms, cpu=_cpu(), others_cpu_ns=cpu_ns)
        except EbpfSvcError as error:
            error.add_note(f"variant {way.name}, {measure.title}, {step.services:,} services")
            raise
        self.cpu_ns += seen.cpu_ns
        self.user_ns += seen.user_ns
        self.elapsed_ns += seen.elapsed_ns
        return seen

    def _warn(self) -> None:
        """Say what makes the figures doubtful."""
        notes, environment = self.comparison.notes, self.comparison.environment
        if interprets_programs(environment):
            notes.append(INTERPRETED)
        environment["cpu_share"] = round(self.cpu_ns / self.elapsed_ns, 3)
        environment["generator_share"] = round(self.user_ns / self.cpu_ns, 3)
        if not generator.accounts_exactly():
            notes.append(UNACCOUNTED)
        elif environment["cpu_share"] < BUSY_SHARE:
            notes.append(
                f"The machine was busy: the generator had {environment['cpu_share']:.0%} of its "
                "CPU. Rates are per second of CPU and stand; latencies beyond the median do not."
            )
        if environment["generator_share"] > GENERATOR_SHARE:
            notes.append(
                f"The generator's own instructions took {environment['generator_share']:.0%} of "
                "the CPU time: differences between the variants are larger than they look."
            )


_segmented: set[str] = set()
"""Namespaces whose eth0 leaves segmentation to the stack at the moment."""


def _set_offload(host: Host, measure: Measure) -> None:
    name = host.namespace.name
    if measure.segmented == (name in _segmented):
        return
    state = "off" if measure.segmented else "on"
    host.run(["ethtool", "-K", "eth0", "tso", state, "gso", state])
    (_segmented.add if measure.segmented else _segmented.discard)(name)


def _cpu() -> int:
    """The last CPU there is: interrupts and daemons are more often on the first."""
    return max(os.sched_getaffinity(0))


def _sized(way: Way, options: Options) -> dict[str, object]:
    """Settings of a way, with tables that hold as many services as there will be."""
    update = dict(way.update)
    count = max(options.services) * 2
    if way.mode == "ebpf" and count * options.endpoints > EbpfSettings().backend_entries:
        update["ebpf"] = {
            **dict(update.get("ebpf", {})),
            "frontend_entries": count,
            "backend_entries": count * options.endpoints,
            "slot_entries": count * options.endpoints * 2,
        }
    return update


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, measure, print and write."""
    words = sys.argv[1:] if argv is None else list(argv)
    given = _parser().parse_args(words)
    is_counted = given.vm is not None and not vm.is_process(given.vm)
    base = Options.short() if given.short or is_counted else Options()
    if is_counted:
        base = replace(base, services=(1, 1_000), full_at=1_000, ms=20)
    services = tuple(given.services or base.services)
    options = Options(
        services=services,
        endpoints=given.endpoints,
        rounds=given.rounds or base.rounds,
        ms=given.ms or base.ms,
        variants=tuple(given.variants or (*DEFAULT, *(KUBE_PROXIES if given.kube_proxy else ()))),
        measures=tuple(given.measures or ()),
        kube_proxy=given.kube_proxy.resolve() if given.kube_proxy else None,
        family=Family(given.family),
        full_at=base.full_at if base.full_at in services else services[-1],
    )
    command = shlex.join(["ebpf-svc", "bench", "path", *words])
    if given.vm is not None:
        comparison = _run_in_vm(given.vm, options, command)
    else:
        comparison = run(options, command=command)
    print("\n".join(tables.comparison(comparison)))
    if given.json is not None:
        comparison.write(given.json)
    if given.html is not None:
        document = list(report.blocks([("path", asdict(comparison))]))
        given.html.write_text(html(document, title="ebpf-svc: data path"))
    return 0


def _run_in_vm(kernel: str, options: Options, command: str) -> Comparison:
    """The same inside a virtual machine, as it was told by its JSON."""
    told = _plain(options)
    words = [str(word) for name in ("services", "variants") for word in (f"--{name}", *told[name])]
    for name in ("endpoints", "rounds", "ms", "family"):
        words += [f"--{name}", str(told[name])]
    if options.measures:
        words += ["--measures", *options.measures]
    if options.kube_proxy is not None:
        words += ["--kube-proxy", str(options.kube_proxy)]
    document = vm.run(kernel, "path", words)
    comparison = Comparison.of(figures.read(document))
    document.unlink()
    comparison.environment["command"] = command
    return comparison


def _plain(options: Options) -> dict[str, Any]:
    """As JSON has it."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ebpf-svc bench path", description=__doc__)
    names = [way.name for way in WAYS]
    keys = [measure.key for measure in MEASURES]
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every sample there")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write a report with plots there")
    inside = "under another kernel: emulated (6.1), its clock counting, or as a process (6.12-um)"
    real = "a kube-proxy binary, to be measured in each of its modes, too"
    parser.add_argument("--kube-proxy", type=Path, metavar="PATH", help=real)
    parser.add_argument("--vm", nargs="?", const=vm.KERNEL, metavar="KERNEL", help=inside)
    parser.add_argument("--short", action="store_true", help="less of all, in under a minute")
    parser.add_argument("--services", type=int, nargs="+", metavar="N")
    parser.add_argument("--endpoints", type=int, default=ENDPOINTS, metavar="N")
    parser.add_argument("--family", type=int, choices=[int(each) for each in Family],
                        default=int(Family.V4), help="IPv4 or IPv6")  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--ms", type=int, metavar="N", help="length of a sample")
    parser.add_argument("--variants", nargs="+", choices=names, metavar="NAME",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--measures", nargs="+", choices=keys, metavar="KEY",
                        help=f"of {', '.join(keys)}")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
