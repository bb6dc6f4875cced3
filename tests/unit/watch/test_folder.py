"""A folder's files, read again where they changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_svc.errors import WatchError
from ebpf_svc.watch.declared import DeclaredService
from ebpf_svc.watch.folder import GRACE_S, Folder
from tests.unit.watch.cluster import service, services


def objects(folder: Folder) -> dict[str, list[DeclaredService]]:
    return {
        name: [each for parsed in documents for each in parsed.objects]  # type: ignore[misc]
        for name, documents in folder.files()
    }


def names(folder: Folder) -> dict[str, list[str]]:
    return {name: [each.name.name for each in found] for name, found in objects(folder).items()}


def test_only_plain_manifest_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Suffixes yaml, yml, json; no hidden file (editors' and ConfigMaps'), no subfolder."""
    for name in ("b.yaml", "a.yml", "c.json", ".d.yaml", "e.txt", "f.yaml~", ".f.yaml.swp"):
        (tmp_path / name).write_text(service(name[0].strip(".") or "x"))
    (tmp_path / "sub.yaml").mkdir()
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nothing")
    folder = Folder(tmp_path)
    assert folder.refresh(0)
    assert list(names(folder).items()) == [("a.yml", ["a"]), ("b.yaml", ["b"]), ("c.json", ["c"])]
    assert not folder.refresh(1)


def test_an_edit_keeps_the_objects_of_untouched_documents(tmp_path: Path) -> None:
    """The same objects, not equal ones: the planner skips by identity."""
    (tmp_path / "a.yaml").write_text(services("a", "b", "c"))
    (tmp_path / "z.yaml").write_text(service("z"))
    folder = Folder(tmp_path)
    folder.refresh(0)
    before = objects(folder)
    (tmp_path / "a.yaml").write_text(services("new", "a", "b") + "---\n" + service("c", ports=[]))
    assert folder.refresh(0, touched={"a.yaml"})
    after = objects(folder)
    assert [each.name.name for each in after["a.yaml"]] == ["new", "a", "b"]
    assert after["a.yaml"][1] is before["a.yaml"][0]
    assert after["a.yaml"][2] is before["a.yaml"][1]
    assert after["z.yaml"][0] is before["z.yaml"][0]


def test_a_removed_file_takes_its_objects_along(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    folder = Folder(tmp_path)
    folder.refresh(0)
    (tmp_path / "a.yaml").unlink()
    assert folder.refresh(0)
    assert names(folder) == {}


def test_a_file_that_does_not_parse_keeps_its_last_contents(tmp_path: Path) -> None:
    """And nobody hears of it before somebody had the time to finish writing."""
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    folder = Folder(tmp_path)
    folder.refresh(100)
    path.write_text("a: [\n")
    folder.refresh(100)
    assert names(folder) == {"a.yaml": ["a"]}
    assert folder.complete
    assert folder.retrying(100)
    assert folder.problems(100) == ()
    (problem,) = folder.problems(100 + GRACE_S)
    assert problem.source == "a.yaml"
    assert problem.message.startswith("yaml: line 2: ")
    assert not folder.retrying(110)
    path.write_text(service("b"))
    folder.refresh(111)
    assert names(folder) == {"a.yaml": ["b"]}
    assert folder.problems(120) == ()


def test_a_broken_file_that_never_worked_is_missing(tmp_path: Path) -> None:
    """Then no allocation may be taken back: nobody knows whose they are."""
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text(service("b"))
    folder = Folder(tmp_path)
    folder.refresh(0)
    assert not folder.complete
    assert names(folder)["b.yaml"] == ["b"]
    (tmp_path / "a.yaml").write_text(service("a"))
    assert folder.refresh(0)
    assert folder.complete


def test_a_broken_file_is_read_again_without_being_told(tmp_path: Path) -> None:
    """Same size, same time: a retry does not trust what stat says."""
    path = tmp_path / "a.yaml"
    path.write_text("[".ljust(200))
    folder = Folder(tmp_path)
    folder.refresh(0)
    folder._files["a.yaml"].signature = ()
    path.write_text(service("a").ljust(200))
    assert folder.refresh(0.1)
    assert names(folder) == {"a.yaml": ["a"]}


def test_a_file_being_written_is_left_alone(tmp_path: Path) -> None:
    """Half of a file may be good YAML: what stands there is read when the writer is done."""
    path = tmp_path / "a.yaml"
    path.write_text(services("a", "b"))
    folder = Folder(tmp_path)
    folder.refresh(0)
    path.write_text(service("a"))
    (tmp_path / "new.yaml").write_text("")
    assert not folder.refresh(0, busy={"a.yaml", "new.yaml"})
    assert names(folder) == {"a.yaml": ["a", "b"], "new.yaml": []}
    assert not folder.complete
    assert folder.refresh(0, touched={"a.yaml"})
    assert names(folder)["a.yaml"] == ["a"]
    assert folder.complete


def test_a_touched_file_is_read_whatever_its_times_say(tmp_path: Path) -> None:
    """Two writes within one tick of the clock look the same to stat."""
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    folder = Folder(tmp_path)
    folder.refresh(0)
    path.write_text(service("b"))
    status = path.stat()
    folder._files["a.yaml"].signature = (
        *(status.st_dev, status.st_ino, status.st_size),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )
    assert not folder.refresh(0)
    assert folder.refresh(0, touched={"a.yaml"})
    assert names(folder) == {"a.yaml": ["b"]}


def test_an_unreadable_file_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    folder = Folder(tmp_path)
    folder.refresh(0)
    assert [str(problem) for problem in folder.problems(5)] == ["a.yaml: Permission denied"]


def test_a_folder_that_is_gone_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.yaml").write_text(service("a"))
    folder = Folder(tmp_path / "m")
    folder.refresh(0)
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    with pytest.raises(WatchError, match="No such file"):
        folder.refresh(0)
    assert names(folder) == {"a.yaml": ["a"]}
