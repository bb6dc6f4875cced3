"""A folder followed as it changes, through the kernel's own events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpf_svc.config import Settings
from ebpf_svc.errors import ConfigError, WatchError
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.watch import files, folder
from ebpf_svc.watch.files import FileSource
from ebpf_svc.watch.store import Store
from tests.unit.watch.cluster import named, service, services

WITHIN_S = 5.0
"""Only a hung test waits so long."""


class World:
    """A manifest folder, and what the source makes of it."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "manifests"
        self.folder.mkdir()
        self.settings = Settings(manifests=self.folder, state_dir=root / "state")
        self.store = Store("node1")
        self._source: FileSource | None = None

    def start(self) -> None:
        self._source = FileSource(self.settings, self.store)
        self._source.start()

    def stop(self) -> None:
        if self._source is not None:
            self._source.stop()
            self._source = None

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @property
    def snapshot(self) -> Snapshot:
        found = self.store.snapshot()
        assert found is not None
        return found

    @property
    def names(self) -> list[str]:
        return sorted(name.name for name in self.snapshot.services)

    def eventually(self, condition: Callable[[], bool]) -> float:
        """Wait for it; how many seconds it took."""
        started_s = time.monotonic()
        while not condition():
            assert time.monotonic() < started_s + WITHIN_S, self.snapshot
            self.store.changed.wait(0.02)
            self.store.changed.clear()
        return time.monotonic() - started_s


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.stop()


def test_the_folder_is_known_when_start_returns(world: World) -> None:
    world.write("a.yaml", services("a", "b"))
    world.start()
    assert world.names == ["a", "b"]


@pytest.mark.parametrize("settings", [Settings(), Settings(manifests=Path("/nowhere"))])
def test_without_a_folder_there_is_nothing_to_follow(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="manifests"):
        FileSource(settings, Store("node1"))


def test_a_written_file_is_served_within_a_tenth_of_a_second(world: World) -> None:
    """The promise to whoever edits a manifest; the best of three, this machine being busy."""
    world.start()
    took_s = []
    for i in range(3):
        world.write("a.yaml", service(f"s{i}"))
        took_s.append(world.eventually(lambda i=i: world.names == [f"s{i}"]))  # type: ignore[misc]
    assert min(took_s) < 0.1


def test_a_file_renamed_into_place_is_read(world: World) -> None:
    """As editors and deployment tools write."""
    world.write("a.yaml", service("old"))
    world.start()
    world.write("a.yaml.new", service("new"))
    (world.folder / "a.yaml.new").rename(world.folder / "a.yaml")
    world.eventually(lambda: world.names == ["new"])


def test_a_removed_file_is_noticed(world: World) -> None:
    world.write("a.yaml", service("a"))
    world.start()
    (world.folder / "a.yaml").unlink()
    world.eventually(lambda: world.names == [])


def test_a_mounted_configmap_is_followed(world: World) -> None:
    """The kubelet swaps one hidden link; the visible ones never change."""
    for version in ("one", "two"):
        (world.folder / f"..{version}").mkdir()
        (world.folder / f"..{version}" / "a.yaml").write_text(service(version))
    (world.folder / "..data").symlink_to("..one")
    (world.folder / "a.yaml").symlink_to("..data/a.yaml")
    world.start()
    assert world.names == ["one"]
    (world.folder / "..data_tmp").symlink_to("..two")
    (world.folder / "..data_tmp").rename(world.folder / "..data")
    world.eventually(lambda: world.names == ["two"])


def test_a_file_is_not_read_while_it_is_being_written(world: World) -> None:
    """Truncated and half-filled it is good YAML with fewer Services: none may vanish meanwhile."""
    world.write("a.yaml", services("a", "b"))
    world.start()
    before = world.snapshot
    with (world.folder / "a.yaml").open("w") as file:
        file.write(service("a"))
        file.flush()
        world.write("other.yaml", service("other"))
        world.eventually(lambda: "other" in world.names)
        assert world.names == ["a", "b", "other"]
        assert world.snapshot.services[named("b")] is before.services[named("b")]
        file.write("---\n" + service("c"))
    world.eventually(lambda: world.names == ["a", "c", "other"])


def test_a_file_that_is_never_closed_is_read_in_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some programs keep their files open."""
    monkeypatch.setattr(files, "BUSY_S", 0.1)
    monkeypatch.setattr(files, "LOOK_S", 0.1)
    world.start()
    with (world.folder / "a.yaml").open("w") as file:
        file.write(service("a"))
        file.flush()
        world.eventually(lambda: world.names == ["a"])


def test_a_half_written_file_becomes_a_problem_only_if_it_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last good contents stay in force, and the problem goes with its cause."""
    monkeypatch.setattr(folder, "GRACE_S", 0.1)
    monkeypatch.setattr(folder, "RETRY_S", 0.02)
    monkeypatch.setattr(files, "RETRY_S", 0.02)
    world.write("a.yaml", service("a"))
    world.start()
    world.write("a.yaml", "kind: [")
    world.eventually(lambda: len(world.snapshot.problems) == 1)
    assert world.snapshot.problems[0].source == "a.yaml"
    assert world.names == ["a"]
    world.write("a.yaml", service("b"))
    world.eventually(lambda: world.names == ["b"] and not world.snapshot.problems)


def test_a_bad_object_is_shown_and_the_rest_works(world: World) -> None:
    world.write("a.yaml", service("bad", ports=[]) + "---\n" + service("good"))
    world.start()
    assert world.names == ["good"]
    assert [str(problem) for problem in world.snapshot.problems] == [
        "a.yaml: Service default/bad: spec.ports: Required value"
    ]


def test_a_touched_file_changes_nothing(world: World) -> None:
    """Writing the same again wakes nobody."""
    world.write("a.yaml", service("a"))
    world.start()
    before = world.snapshot
    world.write("a.yaml", service("a"))
    world.write("b.yaml", service("b"))
    world.eventually(lambda: world.names == ["a", "b"])
    assert world.snapshot.services[named("a")] is before.services[named("a")]
    assert world.snapshot.revision == before.revision + 1


def test_addresses_survive_a_restart(world: World) -> None:
    """Even where they would be chosen differently now."""
    world.write("a.yaml", service("a", type="NodePort"))
    world.start()
    before = world.snapshot.services[named("a")]
    world.stop()
    # Whoever starts with all files at once would serve "0" its explicit request first.
    world.write("0.yaml", service("z", clusterIP=before.cluster_ips[0]))
    world.store = Store("node1")
    world.start()
    assert world.snapshot.services[named("a")] == before
    assert world.names == ["a"]


def test_a_damaged_record_is_put_aside(world: World) -> None:
    """Serving goes on: addresses follow from names, so most come out the same."""
    world.write("a.yaml", service("a"))
    world.start()
    before = world.snapshot.services
    world.stop()
    record = world.settings.state_dir / "allocations.json"
    record.write_text("garbage")
    world.store = Store("node1")
    world.start()
    assert world.snapshot.services == before
    assert record.with_suffix(".damaged").read_text() == "garbage"
    assert '"default/a"' in record.read_text()


def test_a_folder_that_goes_and_comes_is_found_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it held stays in force meanwhile."""
    monkeypatch.setattr(files, "LOOK_S", 0.05)
    world.write("a.yaml", service("a"))
    world.start()
    world.folder.rename(world.folder.with_name("away"))
    time.sleep(0.15)
    assert world.names == ["a"]
    world.folder.mkdir()
    world.write("b.yaml", service("b"))
    world.eventually(lambda: world.names == ["b"])
    world.write("b.yaml", service("c"))
    world.eventually(lambda: world.names == ["c"])


def test_a_folder_that_is_gone_at_start_is_an_error(world: World) -> None:
    source = FileSource(world.settings, world.store)
    world.folder.rmdir()
    with pytest.raises(WatchError, match="No such file"):
        source.start()
    source.stop()


def test_a_disk_that_refuses_the_record_does_not_stop_serving(world: World) -> None:
    world.settings.state_dir.write_text("a file where a folder should be")
    world.write("a.yaml", service("a"))
    world.start()
    assert world.names == ["a"]
