"""Runs as plots, tables and goals, and two runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ebpf_svc.bench import compare, goals, plots, report
from ebpf_svc.bench.document import Heading, Table, markdown
from ebpf_svc.bench.figures import Comparison, Figure, Variant
from ebpf_svc.bench.record import Record
from ebpf_svc.bench.svg import nice_step

_MACHINE = {"kernel": "6.18", "cpus": 2, "cpu": "<some> CPU", "load_1m": 0.5, "command": "a & b"}


def _comparison(speed: float = 1.0, *, udp: float = 7.0) -> Comparison:
    rounds = [100.0, 90.0, 110.0]
    figures = [
        Figure(
            "connect", "TCP connect", "1/s", "more", services, 10,
            samples={"direct": rounds, "ebpf": [each * speed for each in rounds]},
        )
        for services in (1, 1_000)
    ]  # fmt: skip
    figures.append(
        Figure(
            "udp", "UDP round trip", "µs", "less", 1_000, 10,
            samples={"direct": [7.0] * 3, "ebpf": [udp] * 3},
        )
    )  # fmt: skip
    figures.append(
        Figure(
            "request", "TCP requests", "1/s", "more", 1_000, 10,
            samples={"direct": [50.0] * 3, "ebpf": [50.0] * 3},
            histograms={"direct": [[4_000, 99], [90_000, 1]], "ebpf": [[5_000, 100]]},
        )
    )  # fmt: skip
    variants = [
        Variant("direct", "direct"),
        Variant("ebpf", "eBPF <tc>"),
        Variant("ipvs", "ipvs", "no"),
    ]
    return Comparison("path", variants, dict(_MACHINE), figures, {"full_at": 1_000})


def _written(comparison: Comparison, path: Path) -> dict[str, Any]:
    comparison.write(path)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_plots_are_well_formed_and_need_nothing_else() -> None:
    """A browser without a network shows them; names from a run are escaped."""
    made = dict(plots.of_comparison(_comparison()))
    assert set(made) == {"speed", "connect-by-services", "request-latency"}
    for svg in made.values():
        ElementTree.fromstring(svg)
        assert "href" not in svg and "<script" not in svg
    assert "eBPF &lt;tc&gt;" in made["speed"]


def test_speed_is_above_one_when_better_whatever_the_unit() -> None:
    """Half the round trip is twice the speed."""
    figure = _comparison(udp=3.5).figures[2]
    assert plots.relative_rounds(figure, "ebpf") == [2.0, 2.0, 2.0]


def test_goals_are_judged_by_what_was_measured() -> None:
    """What is missed is said; what was not measured is not judged."""
    found = {goal.sentence.split(":")[0] + goal.measured: goal.holds for goal in
             goals.of_comparison(_comparison(0.9, udp=7.0))}  # fmt: skip
    assert found == {"socket hooks0.90": False, "socket hooks1.00": True, "ebpf+0.0%": True}


def test_goals_are_told_beside_a_tracked_direct_request_too(tmp_path: Path) -> None:
    """On a node whose connections are tracked the same figure is another speed; what is judged is
    the speed beside an untracked one.
    """
    comparison = _comparison(0.9)
    comparison.variants.insert(1, Variant("conntrack", "tracked"))
    for figure in comparison.figures[:2]:
        figure.samples["conntrack"] = [each * 0.8 for each in figure.samples["direct"]]
    connect, udp, *_ = goals.of_comparison(comparison)
    assert (connect.measured, connect.holds, connect.tracked) == ("0.90", False, "1.12")
    assert udp.tracked == ""
    run = _written(comparison, tmp_path / "path.json")
    heads = [each.head for each in report.blocks([("path", run)]) if isinstance(each, Table)]
    assert heads[1][3:5] == ["to direct", "to direct, tracked"]


def test_goals_are_not_judged_where_programs_are_interpreted(tmp_path: Path) -> None:
    """A kernel without a compiler of programs says nothing about how fast they are elsewhere."""
    comparison = _comparison(0.9)
    for jit, judged in (("1", True), ("", False), ("0", False)):
        comparison.environment["jit"] = jit
        run = _written(comparison, tmp_path / "path.json")
        titles = [each.text for each in report.blocks([("path", run)]) if isinstance(each, Heading)]
        assert ("Goals" in titles) == judged


def test_growth_with_services_is_a_goal_missed() -> None:
    """Three percent fewer connections with many services."""
    comparison = _comparison()
    comparison.figures[1].samples["ebpf"] = [97.0, 87.3, 106.7]
    (flat,) = [g for g in goals.of_comparison(comparison) if g.sentence.startswith("ebpf:")]
    assert (flat.measured, flat.holds) == ("-3.0%", False)


def test_report_is_one_file_and_markdown_has_its_plots_beside(tmp_path: Path) -> None:
    """Both tell the command, the machine, the tables and what was left out."""
    folder = tmp_path / "benchmarks"
    _written(_comparison(), folder / "path.json")
    page, text = tmp_path / "x.html", tmp_path / "x.md"
    words = [str(folder / "path.json"), "--html", str(page), "--markdown", str(text)]
    assert report.main(words) == 0
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")
    assert page.read_text().count("<svg") == 3
    assert "a &amp; b" in page.read_text()
    assert "![speed](benchmarks/path-speed.svg)" in text.read_text()
    assert (folder / "path-speed.svg").exists()
    assert "Not measured: ipvs: no" in text.read_text()


def test_compare_flags_what_got_worse_beyond_the_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth slower is named and fails; a hundredth is not."""
    for name, speed in (("old", 1.0), ("near", 0.99), ("slow", 0.88)):
        _written(_comparison(speed), tmp_path / f"{name}.json")
    old = str(tmp_path / "old.json")
    assert compare.main([old, str(tmp_path / "near.json")]) == 0
    assert compare.main([old, str(tmp_path / "slow.json")]) == 1
    out = capsys.readouterr().out
    assert out.count("WORSE") == 2 and "2 of 4 figures got worse" in out
    assert compare.main([str(tmp_path / "slow.json"), old]) == 0


def test_compare_reads_records_and_refuses_other_benchmarks(tmp_path: Path) -> None:
    """Less is better in a record."""
    for name, took in (("old", 10.0), ("new", 20.0)):
        record = Record("apply")
        record.add("change", [took] * 3, "ms")
        record.write(tmp_path / f"{name}.json")
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1
    _written(_comparison(), tmp_path / "path.json")
    with pytest.raises(compare.OtherRuns):
        compare.main([str(tmp_path / "old.json"), str(tmp_path / "path.json")])


@pytest.mark.parametrize(("most", "step"), [(1.0, 0.2), (1.3, 0.5), (7.0, 2), (100.0, 20)])
def test_grid_lines_stand_at_round_values(most: float, step: float) -> None:
    """About five of them."""
    assert nice_step(most) == pytest.approx(step)


def test_what_we_add_is_held_against_what_ipvs_adds() -> None:
    """Direct 10 µs, ipvs 20, tc 14: four tenths; the fast path may add nothing."""
    figure = _comparison().figures[1]
    figure.samples = {
        "direct": [100_000.0], "ipvs": [50_000.0], "ebpf-tc": [1e6 / 14], "ebpf-fast": [90_000.0]
    }  # fmt: skip
    comparison = _comparison()
    comparison.figures = [figure]
    found = {goal.sentence.partition(":")[0]: goal for goal in goals.of_comparison(comparison)
             if "ipvs" in goal.sentence}  # fmt: skip
    assert found["ebpf-tc"].measured.startswith("0.40 (+4.0 µs of +10.0 µs)")
    assert not found["ebpf-fast"].holds


def test_the_committed_page_is_what_the_committed_runs_give(tmp_path: Path) -> None:
    """docs/benchmarks.md is never edited by hand; `make benchmarks` makes it anew."""
    page = Path(__file__).parents[3] / "docs/benchmarks.md"
    made_by = page.read_text().splitlines()[0].split("`")[1]
    runs = [page.parents[1] / word for word in made_by.split() if word.endswith(".json")]
    found = [(path.stem, json.loads(path.read_text())) for path in runs]
    made = markdown(
        list(report.blocks(found)), made_by=made_by, plots=tmp_path / "benchmarks", home=tmp_path
    )
    assert made == page.read_text()
