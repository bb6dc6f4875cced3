"""Kernel settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_svc.host import sysctl


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc/sys with one setting that is off."""
    monkeypatch.setattr(sysctl, "ROOT", tmp_path)
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "forward").write_text("0\n")
    return tmp_path


def test_setting_is_read_without_its_newline(root: Path) -> None:
    """The value as one would write it."""
    assert sysctl.read("net/forward") == "0"


def test_setting_the_kernel_lacks_is_none(root: Path) -> None:
    """A kernel without IPv6 has none of its settings."""
    assert sysctl.read("net/missing") is None
    with pytest.raises(OSError, match="missing"):
        sysctl.write("net/missing", "1")


def test_only_another_value_is_written(root: Path) -> None:
    """Writing says whether it changed something; an equal value is not written."""
    assert sysctl.write("net/forward", "1") is True
    (root / "net" / "forward").chmod(0o444)
    before = (root / "net" / "forward").stat().st_mtime_ns
    assert sysctl.write("net/forward", "1") is False
    assert (root / "net" / "forward").stat().st_mtime_ns == before
