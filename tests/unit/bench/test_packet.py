"""What the packet benchmark makes of its samples."""

from __future__ import annotations

from ebpf_svc.bench.packet import EMPTY, MINIMAL, Row, judge, table


def _rows(*, established: int = 60, new: int = 500, miss: int = 15, many: int = 0) -> list[Row]:
    """Samples of a machine where the empty program takes 10 ns and the minimal one 410."""

    def row(case: str, flows: int | None, cost: int, services: int) -> Row:
        ours = cost + (many if services > 10 else 0)
        samples = {EMPTY: [10, 11, 12], "ours": [10 + ours, 11 + ours, 12 + ours]}
        return Row(case, 4, flows, services, {**samples, MINIMAL: [410, 411, 412]})

    return [
        row(case, flows, cost, services)
        for services in (10, 100_000)
        for case, flows, cost in (
            ("not a service", 1, miss),
            ("established", 1, established),
            ("established", 1_024, established),
            ("new flow", None, new),
            ("reply", 1, established),
            ("node port", 1, established),
        )
    ]


def _missed(rows: list[Row]) -> list[str]:
    return [sentence.split(":")[0] for sentence, holds in judge(rows) if not holds]


def test_figures_within_the_goals_hold() -> None:
    """A machine that reaches every goal is told so."""
    assert _missed(_rows()) == []


def test_each_goal_missed_is_named() -> None:
    """One figure too high, one sentence that says so."""
    assert _missed(_rows(established=101)) == ["IPv4 established"]
    assert _missed(_rows(new=561)) == ["IPv4 new flow"]
    assert _missed(_rows(miss=26)) == ["IPv4 not a service"]
    assert _missed(_rows(miss=5, many=11)) == ["IPv4 10 to 100,000 services"]


def test_table_shows_the_difference_to_the_empty_program() -> None:
    """Median above the empty program, and the ratio to the minimal one."""
    line = next(line for line in table(_rows()) if "new flow" in line)
    assert line.split() == ["IPv4", "new", "flow", "10", "500", "500-500", "400", "1.25"]
