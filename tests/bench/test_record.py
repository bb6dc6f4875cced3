"""Records of benchmarks: what is computed from samples, and what reaches table and file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from ebpf_svc.bench.record import Record, Series


def test_series_tells_median_p99_and_spread() -> None:
    """p99 of a hundred samples is the second largest: one in a hundred exceeds it."""
    series = Series("x", "ms", tuple(float(n) for n in range(1, 101)))
    assert (series.median, series.least, series.p99, series.most) == (50.5, 1, 99, 100)
    assert series.spread == pytest.approx(0.49, abs=0.01)


def test_p99_of_few_samples_is_the_largest() -> None:
    """With fifty samples the worst one must not hide."""
    assert Series("x", "ms", (1.0,) * 49 + (7.0,)).p99 == 7


@pytest.mark.parametrize(
    ("limit", "judged", "holds"),
    [(None, "median", None), (2, "median", True), (1, "median", False), (2, "p99", False)],
)
def test_limit_is_held_against_what_it_names(
    limit: float | None, judged: str, holds: bool | None
) -> None:
    """A median may hold where the tail does not."""
    assert Series("x", "ms", (1.0, 2.0, 3.0), limit, judged).holds is holds


def test_record_writes_every_sample_and_the_environment(tmp_path: Path) -> None:
    """The file alone lets somebody else judge the run."""
    record = Record("apply", parameters={"services": 10})
    record.add("cold", [3.0, 1.0, 2.0], "ms", limit=5)
    record.write(tmp_path / "deep" / "record.json")
    document = json.loads((tmp_path / "deep" / "record.json").read_text())
    assert document["series"][0]["samples"] == [3.0, 1.0, 2.0]
    assert document["series"][0]["holds"] is True
    assert document["parameters"] == {"services": 10}
    assert {"kernel", "cpu", "cpus", "python", "version"} <= document["environment"].keys()


def test_table_aligns_and_names_a_missed_limit() -> None:
    """Whoever reads only the table sees what failed."""
    record = Record("apply")
    record.add("cold", [1500.0, 1400.0], "ms", limit=1000)
    record.add("change", [0.1234], "ms")
    text = io.StringIO()
    record.print(text)
    lines = text.getvalue().splitlines()
    assert lines[1].startswith("cold [ms]") and lines[1].endswith("median ≤ 1000: MISSED")
    assert "0.123" in lines[2]
    assert lines[0].index("median") + len("median") == lines[1].index("1450") + len("1450")
    assert not record.holds
