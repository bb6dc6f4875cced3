"""What a comparison makes of its samples, and what it keeps in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_svc.bench import figures, tables
from ebpf_svc.bench.figures import Comparison, Figure, NoSuchRun, Variant


def _figure(**samples: list[float]) -> Figure:
    return Figure("connect", "TCP", "1/s", "more", 10, 1, samples=samples)


def _comparison(figure: Figure) -> Comparison:
    variants = [Variant(name, name.title()) for name in figure.samples]
    return Comparison("path", [*variants, Variant("ipvs", "ipvs", "no module")], {}, [figure])


def test_ratio_is_taken_within_each_round() -> None:
    """A slow minute that met both sides in turn leaves the ratio as it is."""
    figure = _figure(direct=[100.0, 10.0, 50.0], ebpf=[90.0, 9.0, 45.0])
    assert figure.ratio("ebpf", "direct") == pytest.approx(0.9)
    assert figure.ratio("ebpf", "ipvs") is None


def test_spread_is_half_the_quartiles_distance() -> None:
    """One sample far off does not widen it."""
    assert _figure(a=[100.0, 100.0, 100.0, 100.0, 900.0]).spread("a") == 0
    assert _figure(a=[80.0, 90.0, 100.0, 110.0, 120.0]).spread("a") == pytest.approx(0.1)


def test_comparison_survives_the_file(tmp_path: Path) -> None:
    """What is rendered later is what was measured."""
    figure = _figure(direct=[1.0, 2.0], ebpf=[3.0])
    figure.details["ebpf"] = {"p50_us": 1.5}
    figure.histograms["ebpf"] = [[10, 3]]
    comparison = _comparison(figure)
    comparison.write(tmp_path / "a" / "run.json")
    assert Comparison.of(figures.read(tmp_path / "a" / "run.json")) == comparison


def test_file_that_is_no_run_is_named(tmp_path: Path) -> None:
    """The sentence says which file."""
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(NoSuchRun, match=r"x\.json"):
        figures.read(path)


def test_table_tells_ratios_and_why_a_variant_is_missing() -> None:
    """The reader sees who was measured, beside whom, and who was not."""
    text = "\n".join(tables.comparison(_comparison(_figure(direct=[10.0] * 3, nftables=[5.0] * 3))))
    assert "/ nftables" in text
    line = next(line for line in text.splitlines() if line.startswith("  Nftables"))
    assert line.split() == ["Nftables", "5", "±0%", "0.50", "1.00"]
    assert "ipvs: not measured: no module" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567.0, "1,235,000"),
        (12345.0, "12,340"),
        (999.6, "1000"),
        (12.345, "12.3"),
        (0.5, "0.5"),
    ],
)
def test_numbers_have_the_digits_that_count(value: float, text: str) -> None:
    """Four digits of large figures, three of small ones."""
    assert tables.number(value) == text
