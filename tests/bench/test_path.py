"""The data path benchmark runs end to end, small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebpf_svc.bench import path


@pytest.mark.root
def test_benchmark_measures_every_variant_in_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each variant has a sample of each round."""
    target = tmp_path / "path.json"
    words = ["--short", "--services", "3", "--rounds", "2", "--ms", "20", "--json", str(target)]
    assert path.main([*words, "--variants", "direct", "ebpf", "ebpf-tc"]) == 0
    document = json.loads(target.read_text())
    by_key = {each["key"]: each for each in document["figures"] if each["backends"] != 1_000}
    assert set(by_key["connect"]["samples"]) == {"direct", "ebpf", "ebpf-tc"}
    assert set(by_key["nodeport-far"]["samples"]) == {"direct", "ebpf"}
    assert all(len(each) == 2 for each in by_key["bulk-mtu"]["samples"].values())
    assert 0 < document["environment"]["generator_share"] < 1
    assert "eBPF, tc only" in capsys.readouterr().out
