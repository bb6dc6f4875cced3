"""What is made ready before an agent serves, and what stops it."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ebpf_svc import prepare as module
from ebpf_svc.config import EbpfSettings, Settings
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.host import conntrack, mounts
from ebpf_svc.host.conntrack import Failure
from ebpf_svc.prepare import prepare, set_oom_score

FATAL = Failure("nf_conntrack_max = 7", "Read-only file system", "leave it alone", fatal=True)
LIGHT = Failure("hashsize = 7", "Read-only file system", "echo", fatal=False)
SETTINGS = Settings(ebpf=EbpfSettings(bpffs=Path("/bpf")))


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    found: list[Path] = []
    monkeypatch.setattr(mounts, "ensure_bpffs", found.append)
    return found


def fail(monkeypatch: pytest.MonkeyPatch, *failures: Failure) -> None:
    monkeypatch.setattr(conntrack, "set_up", lambda settings: failures)


def test_all_in_order_is_silent(mounted: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The BPF file system is mounted where the settings say."""
    fail(monkeypatch)
    with capture_logs() as lines:
        prepare(SETTINGS, strict=True)
    assert (mounted, lines) == ([Path("/bpf")], [])


def test_fatal_failure_stops_the_start_with_what_would_mend_it(
    mounted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S10."""
    fail(monkeypatch, LIGHT, FATAL)
    with pytest.raises(UnsupportedHost, match=r"^nf_conntrack_max = 7: .* \(leave it alone\)$"):
        prepare(SETTINGS, strict=False)


def test_lesser_failure_is_logged_unless_it_is_all_that_was_asked_for(
    mounted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A testbed's namespace lacks some; --init-only exists for nothing else."""
    fail(monkeypatch, LIGHT)
    with capture_logs() as lines:
        prepare(SETTINGS, strict=False)
    assert [line["field"] for line in lines] == ["hashsize = 7"]
    with pytest.raises(UnsupportedHost, match="hashsize"):
        prepare(SETTINGS, strict=True)


def test_score_is_written_and_its_failure_only_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S9: an agent without that right serves all the same."""
    monkeypatch.setattr(module, "OOM_SCORE", tmp_path / "score")
    set_oom_score(-999)
    assert (tmp_path / "score").read_text() == "-999"
    monkeypatch.setattr(module, "OOM_SCORE", tmp_path / "none" / "score")
    with capture_logs() as lines:
        set_oom_score(-999)
    assert [line["event"] for line in lines] == ["agent.oom-score"]
