"""Settings that change: what is taken on, what is refused, when files are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ebpf_svc import reload
from ebpf_svc.config import LogSettings, Settings
from ebpf_svc.errors import ConfigError
from ebpf_svc.reload import ConfigWatch, Reloader
from tests.lib.waiting import eventually, wait_out


class Rig:
    """A reloader whose file is `new`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded = Settings()
        self.new: Settings | ConfigError = self.loaded
        self.applied: list[Settings] = []
        self.levels: list[str] = []
        monkeypatch.setattr(reload, "configure", lambda **to: self.levels.append(to["level"]))
        in_force = self.loaded.model_copy(
            update={"node_name": "node1", "cluster_cidrs": ("10.1.0.0/24",)}
        )
        self.reloader = Reloader(self.loaded, in_force, self._load, self.applied.append)

    def _load(self) -> Settings:
        if isinstance(self.new, ConfigError):
            raise self.new
        return self.new

    def reload(self, new: Settings | ConfigError) -> list[tuple[str, object]]:
        """Reload; returns events with what they are about."""
        self.new = new
        with capture_logs() as lines:
            self.reloader()
        return [(line["event"], line.get("field", line.get("error"))) for line in lines]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_live_change_keeps_what_was_found_out_since_the_start(rig: Rig) -> None:
    """The node's name and pod prefixes are in no file."""
    assert rig.reload(Settings(masquerade_all=True, log=LogSettings(level="debug"))) == [
        ("config.changed", ["masqueradeAll", "log.level"])
    ]
    (now,) = rig.applied
    assert (now.masquerade_all, now.node_name, now.cluster_cidrs) == (
        True,
        "node1",
        ("10.1.0.0/24",),
    )
    assert rig.levels == ["debug"]


def test_unchanged_settings_change_nothing(rig: Rig) -> None:
    """SIGHUP without an edit, or a comment that was added."""
    assert rig.reload(Settings()) == []
    assert rig.applied == []


def test_restart_is_asked_for_until_the_change_is_taken_back(rig: Rig) -> None:
    """What runs is compared, not the last file."""
    other = Settings(run_dir=Path("/x"), masquerade_all=True)
    asked = ("config.restart-needed", ["runDir"])
    assert rig.reload(other) == [asked, ("config.changed", ["masqueradeAll"])]
    assert rig.reload(other) == [asked]
    assert rig.reload(Settings(masquerade_all=True)) == []
    assert [now.run_dir for now in rig.applied] == [Settings().run_dir]


def test_wrong_settings_are_refused_and_the_next_good_ones_count(rig: Rig) -> None:
    """An agent does not end for a typing error."""
    error = ConfigError("config.yaml: mode", got="x", expected="auto")
    assert rig.reload(error) == [("config.refused", str(error))]
    assert rig.applied == []
    assert rig.reload(Settings(masquerade_all=True))[0][0] == "config.changed"


@contextmanager
def watching(*paths: Path) -> Iterator[list[None]]:
    calls: list[None] = []
    watch = ConfigWatch(paths, lambda: calls.append(None))
    watch.start()
    try:
        yield calls
    finally:
        watch.stop()


def _called(calls: list[None], times: int) -> None:
    eventually(lambda: len(calls), until=lambda count: count >= times)
    wait_out(2 * reload.QUIET_S)
    assert len(calls) == times


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("a: 1\n")
    return path


def test_written_and_replaced_files_are_noticed_once(file: Path) -> None:
    """Editors write in steps, or put another file in its place; neighbours do not count."""
    with watching(file) as calls:
        file.with_name("other.yaml").write_text("b: 1\n")
        file.write_text("a: 1\n")
        wait_out(3 * reload.QUIET_S)
        assert calls == []
        file.write_text("a: 2\n")
        _called(calls, 1)
        file.with_name("new").write_text("a: 3\n")
        file.with_name("new").replace(file)
        _called(calls, 2)


def test_config_map_mount_is_followed(tmp_path: Path) -> None:
    """The kubelet switches a symbolic link beside the file, which stays as it is."""
    for number in (1, 2):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "config.yaml").write_text(f"a: {number}\n")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
    with watching(tmp_path / "config.yaml") as calls:
        (tmp_path / "..tmp").symlink_to("..2")
        (tmp_path / "..tmp").replace(tmp_path / "..data")
        _called(calls, 1)


def test_folder_that_goes_and_comes_is_watched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package update may replace the whole folder."""
    monkeypatch.setattr(reload, "RETRY_S", 0.05)
    folder = tmp_path / "etc"
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text("a: 1\n")
    with watching(path) as calls:
        folder.rename(tmp_path / "old")
        eventually(lambda: calls)
        folder.mkdir()
        path.write_text("a: 2\n")
        eventually(lambda: len(calls), until=lambda count: count == 2)


def test_no_file_needs_no_watch() -> None:
    """An agent told by flags alone."""
    with watching() as calls:
        assert calls == []
