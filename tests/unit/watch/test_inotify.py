"""What the kernel says about a folder, and what of it means that a file may be read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc.errors import WatchError
from ebpf_svc.watch.inotify import Changes, FolderWatch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "m"
    made.mkdir()
    return made


@pytest.fixture
def watch(folder: Path) -> Iterator[FolderWatch]:
    made = FolderWatch(folder)
    yield made
    made.close()


def changes(watch: FolderWatch) -> Changes:
    found = Changes()
    watch.read(found)
    return found


def busy(watch: FolderWatch, *, later_s: float = 0.0) -> set[str]:
    return watch.busy(time.monotonic() + later_s, 1.0)


def test_a_file_is_touched_when_its_writer_closes_it(folder: Path, watch: FolderWatch) -> None:
    """Until then it is busy, unless its writer has long been silent."""
    with (folder / "a.yaml").open("w") as file:
        assert changes(watch) == Changes(any=True)
        file.write("a: 1")
        file.flush()
        assert changes(watch) == Changes()
        assert busy(watch) == {"a.yaml"}
        assert busy(watch, later_s=1.1) == set()
    assert changes(watch) == Changes(touched={"a.yaml"}, any=True)
    assert busy(watch) == set()


def test_a_truncated_file_is_busy(folder: Path, watch: FolderWatch) -> None:
    (folder / "a.yaml").write_text("a: 1")
    changes(watch)
    with (folder / "a.yaml").open("w"):
        assert changes(watch) == Changes()
        assert busy(watch) == {"a.yaml"}


def test_a_file_moved_in_is_touched_and_one_moved_out_is_seen(
    folder: Path, watch: FolderWatch
) -> None:
    (folder.parent / "new").write_text("a: 1")
    (folder.parent / "new").rename(folder / "a.yaml")
    assert changes(watch) == Changes(touched={"a.yaml"}, any=True)
    (folder / "a.yaml").rename(folder.parent / "old")
    assert changes(watch) == Changes(any=True)


def test_a_link_and_a_removal_are_seen(folder: Path, watch: FolderWatch) -> None:
    (folder / "a.yaml").symlink_to("nowhere")
    assert changes(watch).any
    (folder / "a.yaml").unlink()
    assert changes(watch).any
    assert changes(watch) == Changes()


def test_a_removed_folder_is_lost(folder: Path, watch: FolderWatch) -> None:
    folder.rmdir()
    assert changes(watch).lost


def test_a_moved_folder_is_lost(folder: Path, watch: FolderWatch) -> None:
    folder.rename(folder.with_name("elsewhere"))
    assert changes(watch).lost


def test_reading_a_file_is_no_change(folder: Path, watch: FolderWatch) -> None:
    """Or the agent would wake itself."""
    (folder / "a.yaml").write_text("a: 1")
    changes(watch)
    (folder / "a.yaml").read_text()
    list(folder.iterdir())
    assert changes(watch) == Changes()


def test_a_folder_that_is_not_there_cannot_be_watched(folder: Path) -> None:
    with pytest.raises(WatchError, match="No such file"):
        FolderWatch(folder / "nothing")


def test_events_that_were_lost_count_as_a_change(folder: Path, watch: FolderWatch) -> None:
    """The kernel keeps 16,384 events by default; the closing of a busy file may be among those
    it dropped."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 20_000:
        pytest.skip(f"this kernel keeps {limit} events: too many to make")
    paths = [folder / "a.yaml", folder / "b.yaml"]
    # Equal events in a row are one: two files in turns, never closed.
    writers = [path.open("w", buffering=1) for path in paths]
    for _ in range(limit // 2 + 1):
        for writer in writers:
            writer.write("\n")
    found = changes(watch)
    assert found.any
    assert found.touched == {"a.yaml", "b.yaml"}
    for writer in writers:
        writer.close()
