"""Nanoseconds per packet of the loaded programs, beside an empty and a minimal program.

Every figure is a difference or ratio of runs that took turns in the same minute, on one CPU: times
of another machine or another hour say little. `python -m ebpf_svc.bench.packet` or
`ebpf-svc bench packet`; root. Nothing is attached or pinned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from ebpf_svc.bench import vm
from ebpf_svc.bench.record import environment
from ebpf_svc.bench.testrun import (
    ACK,
    ALWAYS_NEW,
    BACKEND_PORT,
    NODE_PORT,
    SERVICE_PORT,
    SETTINGS,
    SYN,
    Addresses,
    Rig,
    prepare,
)
from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.net import Family

SERVICES = (10, 10_000, 100_000)
FLOWS = (1, 1_024, 65_536)
ROUNDS, QUICK_ROUNDS = 21, 9
REPEAT = 50_000
"""Packets of a run, at least; long against the clock, short against a time slice."""

BUSY_LOAD = 0.5
"""Of others, on average; CPUs of a virtual machine often share a core."""

TC_ACT_OK, TC_ACT_UNSPEC = 0, 0xFFFFFFFF
"""The minimal program's verdict, and ours: on to the next filter."""
EMPTY, MINIMAL = "nothing", "minimal"
ESTABLISHED_ABOVE_EMPTY_NS = 100
NEW_FLOW_TIMES_MINIMAL = 1.4
NOT_A_SERVICE_ABOVE_EMPTY_NS = 25
FLAT_WITHIN_NS = 10
"""Between few and many services, for one flow: more than noise would be."""


@dataclass(frozen=True, slots=True)
class Case:
    """A way of a packet through one program."""

    name: str
    program: str
    flows: int = 1
    has_yardstick: bool = False
    """The minimal program goes this way too."""


def cases() -> Iterator[Case]:
    """Every way that is measured."""
    yield Case("not a service", "pod_ingress", has_yardstick=True)
    yield Case("not a service, opening", "pod_ingress", has_yardstick=True)
    for flows in FLOWS:
        yield Case("established", "pod_ingress", flows, has_yardstick=True)
    yield Case("new flow", "pod_ingress", ALWAYS_NEW, has_yardstick=True)
    for flows in FLOWS:
        yield Case("reply", "egress", flows)
    for flows in FLOWS:
        yield Case("node port", "node_ingress", flows)
    yield Case("node port, new flow", "node_ingress", ALWAYS_NEW)


@dataclass(frozen=True, slots=True)
class Row:
    """What one case took."""

    case: str
    family: int
    flows: int | None
    """Clients that took turns; None: every packet a new one."""
    services: int
    samples_ns: dict[str, list[int]]
    """Per packet, by program, round by round; the driver's own cost is in each."""

    def above_empty(self, program: str) -> list[int]:
        """Each round's difference to the empty program."""
        pairs = zip(self.samples_ns[program], self.samples_ns[EMPTY], strict=True)
        return [taken - empty for taken, empty in pairs]

    @property
    def ours(self) -> str:
        """The program that is not a yardstick."""
        return next(name for name in self.samples_ns if name not in (EMPTY, MINIMAL))

    @property
    def cost_ns(self) -> float:
        """Median above the empty program."""
        return statistics.median(self.above_empty(self.ours))

    @property
    def times_minimal(self) -> float | None:
        """Median of each round's ratio to the minimal program, both above the empty one."""
        if MINIMAL not in self.samples_ns:
            return None
        pairs = zip(self.above_empty(self.ours), self.above_empty(MINIMAL), strict=True)
        return statistics.median(ours / max(least, 1) for ours, least in pairs)


def measure(rigs: Mapping[int, Rig], case: Case, rounds: int) -> list[Row]:
    """Run the programs of a case in turns, through every rig in each round.

    Args:
        rigs: by the number of their services; all of one family.

    Raises:
        DataplaneError: the packets did not go the way the case is about.
    """
    programs = [EMPTY, case.program, *([MINIMAL] if case.has_yardstick else [])]
    for rig in rigs.values():
        _prepare(rig, case, programs[1:])
    repeat = REPEAT if case.flows == ALWAYS_NEW else max(REPEAT, 3 * case.flows)
    flows = None if case.flows == ALWAYS_NEW else case.flows
    rows = {
        services: Row(case.name, int(rig.family), flows, services, {name: [] for name in programs})
        for services, rig in rigs.items()
    }
    turns = [(services, program) for services in rigs for program in programs]
    for turn in range(rounds + 1):
        for services, program in turns if turn % 2 else reversed(turns):
            sent = rigs[services].run(program, repeat)
            if turn:  # the first round warms caches up
                rows[services].samples_ns[program].append(sent.duration_ns)
            if program != EMPTY:
                _check_way(case, program, sent.verdict, (sent.sport, sent.dport))
    return list(rows.values())


def _prepare(rig: Rig, case: Case, programs: Sequence[str]) -> None:
    """Open the flows of a case and aim at its way."""
    client = (Addresses.of(rig.family).client, 0)
    called = rig.called
    to = {
        "not a service": (called.stranger, SERVICE_PORT),
        "not a service, opening": (called.stranger, SERVICE_PORT),
        "reply": (called.single, SERVICE_PORT),
        "node port": (called.node, NODE_PORT),
        "node port, new flow": (called.node, NODE_PORT),
    }.get(case.name, (called.cluster_ip, SERVICE_PORT))
    rig.forget_flows()
    rig.aim(src=client, dst=to, flags=SYN, flows=case.flows)
    # A full table is the usual state under many new flows: every insert then evicts.
    fill = SETTINGS.flow_entries * 5 // 4 if case.flows == ALWAYS_NEW else case.flows
    for program in programs:
        rig.run("pod_ingress" if program == "egress" else program, fill)
    if case.name == "reply":
        backend = (called.single_backend, BACKEND_PORT)
        rig.aim(src=backend, dst=client, flags=ACK, flows=case.flows, is_reply=True)
    elif case.flows != ALWAYS_NEW and not case.name.endswith("opening"):
        rig.aim(src=client, dst=to, flags=ACK, flows=case.flows)


def _check_way(case: Case, program: str, verdict: int, ports: tuple[int, int]) -> None:
    source, destination = ports
    right = {
        "not a service": destination == SERVICE_PORT,
        "not a service, opening": destination == SERVICE_PORT,
        "reply": source == SERVICE_PORT,
    }.get(case.name, destination == BACKEND_PORT)
    if verdict not in (TC_ACT_OK, TC_ACT_UNSPEC) or not right:
        raise DataplaneError(
            f"{case.name}: {program} gave verdict {verdict} and ports {source} -> {destination}: "
            "that is not the way this case is about"
        )


def judge(rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
    """Compare with what is to be reached: a sentence each, and whether it holds."""
    for family in sorted({row.family for row in rows}):
        mine = [row for row in rows if row.family == family]
        label = f"IPv{family}"

        def of(case: str, flows: int | None, among: Sequence[Row] = mine) -> list[Row]:
            return [row for row in among if (row.case, row.flows) == (case, flows)]

        few_flows = [*of("established", 1), *of("established", 1_024)]
        cost = max(row.cost_ns for row in few_flows)
        yield (
            f"{label} established: {cost:.0f} ns above the empty program "
            f"(at most {ESTABLISHED_ABOVE_EMPTY_NS})",
            cost <= ESTABLISHED_ABOVE_EMPTY_NS,
        )
        times = max(row.times_minimal or 0 for row in of("new flow", None))
        yield (
            f"{label} new flow: {times:.2f} times the minimal program "
            f"(at most {NEW_FLOW_TIMES_MINIMAL})",
            times <= NEW_FLOW_TIMES_MINIMAL,
        )
        cost = max(row.cost_ns for row in of("not a service", 1))
        yield (
            f"{label} not a service: {cost:.0f} ns above the empty program "
            f"(at most {NOT_A_SERVICE_ABOVE_EMPTY_NS})",
            cost <= NOT_A_SERVICE_ABOVE_EMPTY_NS,
        )
        counts = sorted({row.services for row in mine})
        growth = max(
            _growth([row for row in of(case, 1) if row.services in (counts[0], counts[-1])])
            for case in ("not a service", "established", "reply", "node port")
        )
        yield (
            f"{label} {counts[0]:,} to {counts[-1]:,} services: {growth:.0f} ns more "
            f"(at most {FLAT_WITHIN_NS})",
            growth <= FLAT_WITHIN_NS,
        )


def _growth(rows: Sequence[Row]) -> float:
    """What the last of these rows costs more than the first, by the median of the rounds."""
    few, many = (row.above_empty(row.ours) for row in (rows[0], rows[-1]))
    return statistics.median(more - less for less, more in zip(few, many, strict=True))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Print rows aligned: median and quartiles above the empty program."""
    yield f"{'ns above an empty program':36}{'services':>9}{'ours':>7}{'quartiles':>11}" + (
        f"{'minimal':>9}{'ratio':>7}"
    )
    for row in rows:
        flows = "" if row.flows is None or row.case.startswith("not") else _flows(row.flows)
        low, _, high = statistics.quantiles(row.above_empty(row.ours), n=4)
        line = f"{f'IPv{row.family} {row.case}{flows}':36}{row.services:>9,}{row.cost_ns:>7.0f}"
        line += f"{f'{low:.0f}-{high:.0f}':>11}"
        if row.times_minimal is not None:
            least = statistics.median(row.above_empty(MINIMAL))
            line += f"{least:>9.0f}{row.times_minimal:>7.2f}"
        yield line


def _flows(count: int) -> str:
    return ", 1 flow" if count == 1 else f", {count:,} flows"


def run(json_path: Path | None = None, *, quick: bool = False) -> int:
    """Measure, print, and write every sample to `json_path`; returns the exit code.

    Whether the goals are met is printed, not returned: a loaded machine is no failure.
    """
    if os.geteuid() != 0:
        print("bench packet needs root: it loads programs into the kernel", file=sys.stderr)
        return 1
    before = environment()
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        programs: list[dict[str, object]] = []
        rows = list(_all_rows(quick, programs))
    finally:
        os.sched_setaffinity(0, allowed)
    verdicts = list(judge(rows))
    if os.environ.get(vm.GUEST):
        print("A nanosecond is an instruction here.")
    print("\n".join(table(rows)))
    print()
    for sentence, holds in verdicts:
        print(f"{'holds ' if holds else 'MISSED'} {sentence}")
    if os.getloadavg()[0] - 1 > BUSY_LOAD:
        print("This machine was busy: times are too high, ratios stand.")
    if json_path is not None:
        document = {
            "benchmark": "packet",
            "environment": {
                **before,
                "load_after_1m": os.getloadavg()[0],
                "where": os.environ.get(vm.GUEST, ""),
            },
            "goals": [{"goal": sentence, "holds": holds} for sentence, holds in verdicts],
            "programs": programs,
            "rows": [asdict(row) for row in rows],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document) + "\n")
    return 0


def _all_rows(quick: bool, programs: list[dict[str, object]]) -> Iterator[Row]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for family in (Family.V4,) if quick else tuple(Family):
        with ExitStack() as undo:
            rigs: dict[int, Rig] = {}
            for services in SERVICES[:2] if quick else SERVICES:
                rigs[services] = Rig(family, services, SETTINGS.cache_dir)
                undo.callback(rigs[services].close)
                rigs[services].wear_in()
            programs += [
                {
                    "name": f"IPv{int(family)} {name}",
                    "instructions": facts.instruction_count,
                    "verified": facts.verified_count,
                }
                for name, facts in rigs[SERVICES[0]].facts().items()
            ]
            for case in cases():
                print(f"IPv{int(family)} {case.name} ...", file=sys.stderr)
                yield from measure(rigs, case, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Nanoseconds per packet of the loaded programs.")
    parser.add_argument("--json", type=Path, help="also write every sample there")
    parser.add_argument("--quick", action="store_true", help="IPv4, fewer services and rounds")
    parser.add_argument(
        "--vm",
        nargs="?",
        const=vm.KERNEL,
        metavar="KERNEL",
        help="instructions per packet instead, in a virtual machine whose clock counts them",
    )
    arguments = parser.parse_args(argv)
    if arguments.vm is not None:
        return _run_in_vm(arguments.vm, arguments.json)
    return run(arguments.json, quick=arguments.quick)


def _run_in_vm(kernel: str, json_path: Path | None) -> int:
    major, minor = kernel.split(".")
    prepare((Family.V4,), SETTINGS.cache_dir, (int(major), int(minor)))
    found = vm.run(kernel, "packet", ["--quick"])
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(found.read_text())
    found.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
