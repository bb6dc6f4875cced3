"""docs/behaviours.md is made of runs on several kernels: what each proved must not blur."""

from __future__ import annotations

from pathlib import Path

from tests.lib.behaviours import page
from tests.lib.matrix import Record, Results


def record(test: str, variant: str, outcome: str = "passed", reason: str = "") -> Record:
    return Record(f"test_law::{test}", f"Promise of {test} (P2).", variant, outcome, reason)


def test_column_shows_the_kernel_a_dataplane_was_tried_on_most() -> None:
    """A dataplane this machine's kernel lacks shows what another kernel proved."""
    here = Results(
        "6.18.1", [record("a", "ebpf"), record("b", "ebpf"), record("a", "ipvs", "skipped")]
    )
    there = Results("6.1.0", [record("a", "ebpf", "failed"), record("a", "ipvs")])

    lines = page([here, there]).splitlines()

    assert "| ebpf | 6.18.1 |" in lines
    assert "| ipvs | 6.1.0 |" in lines
    assert "| Promise of a. | P2 | ✓ | ✓ |" in lines
    assert "| Promise of b. | P2 | ✓ | not run |" in lines
    after = lines[lines.index("## On Linux 6.1.0") :]
    assert "| Promise of a. | P2 | **fails** | ✓ |" in after


def test_gap_and_what_cannot_run_keep_their_reasons() -> None:
    """A reason stands once, with all it holds for."""
    gaps = [record("a", "ipvs", "xfailed", "no such rule"), record("a", "ebpf")]
    idle = [record(name, "nft", "skipped", "kernel: too old") for name in ("a", "b")]

    text = page([Results("5.10", gaps + idle)])

    assert "| Promise of a. | P2 | ✓ | gap | not run |" in text
    assert "- `ipvs` (5.10): Promise of a. no such rule\n" in text
    assert text.count("kernel: too old") == 1
    assert "- `nft` (5.10): kernel: too old" in text


def test_programs_show_the_largest_of_all_option_sets() -> None:
    """Before Linux 5.16 the kernel does not tell how far its verifier walked."""
    sizes = {
        "packet": {"esvc4_out": {"count": 10, "verified": 0}},
        "mark": {"esvc4_out": {"count": 12, "verified": 0}},
    }
    newer = {"packet": {"esvc4_out": {"count": 11, "verified": 900}}}

    text = page([Results("6.1", programs=newer), Results("5.10", programs=sizes)])

    assert "| program | 5.10 | 6.1 |" in text
    assert "| esvc4_out | 12 | 11 (900) |" in text


def test_results_survive_the_file(tmp_path: Path) -> None:
    """What a guest writes is what the page is made of."""
    made = Results("6.1", [record("a", "ebpf", "xfailed", "why")], {"mark": {}})

    made.write(tmp_path / "deep/results.json")

    assert Results.read(tmp_path / "deep/results.json") == made
