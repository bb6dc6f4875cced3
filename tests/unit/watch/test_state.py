"""Allocations on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_svc.errors import WatchError
from ebpf_svc.watch.allocate import Holding
from ebpf_svc.watch.state import load, save
from tests.unit.watch.cluster import named

HOLDINGS = {
    named("web"): Holding(("10.96.0.7", "fd00::7"), (("http/TCP", 30080), ("/UDP", 30081)), 0),
    named("lb", "prod"): Holding(("fd00::8", "10.96.0.8"), (), 32000),
    named("headless"): Holding(),
}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    """Order included: the first address is the primary one. The folder is made."""
    path = tmp_path / "deep" / "allocations.json"
    save(path, HOLDINGS)
    assert load(path) == HOLDINGS


def test_saving_again_replaces_the_file_in_one_step(tmp_path: Path) -> None:
    """Nothing else is left in the folder, and one Service stands on one line."""
    path = tmp_path / "allocations.json"
    save(path, HOLDINGS)
    save(path, {named("web"): HOLDINGS[named("web")]})
    assert [each.name for each in tmp_path.iterdir()] == ["allocations.json"]
    assert path.read_text().splitlines()[1:-1] == [
        '  "default/web": {"cluster_ips": ["10.96.0.7", "fd00::7"],'
        ' "node_ports": {"http/TCP": 30080, "/UDP": 30081}}'
    ]


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "allocations.json"
    save(path, HOLDINGS)
    (tmp_path / "allocations.new").write_text("half of")
    assert load(path) == HOLDINGS


def test_no_file_is_no_allocation(tmp_path: Path) -> None:
    assert load(tmp_path / "allocations.json") == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"version": 2, "services": {}}',
        '{"version": 1, "services": {"web": {}}}',
        '{"version": 1, "services": {"a/b": {"cluster_ips": ["x"]}}}',
        '{"version": 1, "services": {"a/b": {"node_ports": {"a/TCP": "1"}}}}',
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "allocations.json"
    path.write_text(text)
    with pytest.raises(WatchError, match="is damaged"):
        load(path)


def test_what_two_hold_stays_with_the_first(tmp_path: Path) -> None:
    """An edited file cannot make two Services claim one address or port."""
    path = tmp_path / "allocations.json"
    same = '{"cluster_ips": ["10.96.0.7"], "node_ports": {"/TCP": 30080}, %s}'
    health = '"health_check_node_port": 31000'
    one, two = same % health, same % health
    path.write_text(f'{{"version": 1, "services": {{"b/b": {two}, "a/a": {one}}}}}')
    assert load(path) == {
        named("a", "a"): Holding(("10.96.0.7",), (("/TCP", 30080),), 31000),
        named("b", "b"): Holding(),
    }


def test_a_disk_that_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WatchError, match="file"):
        save(tmp_path / "file" / "allocations.json", HOLDINGS)
