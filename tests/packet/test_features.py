"""Probing this machine: says what is so, and leaves nothing behind."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ebpf_svc.errors import CommandError
from ebpf_svc.host import bpf, features, mounts, nft
from ebpf_svc.host.command import run

pytestmark = pytest.mark.root


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_machine_that_runs_the_tests_has_everything_required(tmp_path):
    """The packet ring compiles and loads programs here: the probes must agree."""
    probes = features.probe_all(tmp_path / "bpf")

    assert [(p.name, p.detail) for p in probes if p.required and not p.ok] == []
    assert all(probe.detail for probe in probes)


def test_probing_leaves_nothing_behind(tmp_path):
    """`check` may be run on a production node at any time."""
    features.probe_all(tmp_path / "bpf")
    before = descriptors(), run(["nft", "list", "tables"]), run(["ip", "-br", "link"])

    features.probe_all(tmp_path / "bpf")

    assert (descriptors(), run(["nft", "list", "tables"]), run(["ip", "-br", "link"])) == before
    assert not mounts.is_on_bpffs(tmp_path / "bpf")
    assert not (tmp_path / "bpf").exists()


def test_cached_programs_make_the_compiler_optional(tmp_path):
    """A node supplied with artifacts needs neither bcc nor headers."""
    compiling = {"bcc", "headers"}
    probes = features.probe_all(tmp_path, is_compiled=True)

    assert {probe.name for probe in probes if not probe.required} >= compiling
    fresh = features.probe_all(tmp_path)
    assert {probe.name for probe in fresh if probe.required} >= compiling


def test_missing_ability_says_how_to_mend_it(monkeypatch, tmp_path):
    """Each probe that fails gives the command."""

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(bpf, "map_create", refuse)

    probe = features.maps()

    assert not probe.ok
    assert "LPM trie (Operation not permitted)" in probe.detail
    assert probe.mend


def test_netfilter_without_masquerade_is_reported_in_its_own_words(monkeypatch):
    """The kernel may lack the module even where nft is installed."""

    class Refusing:
        def apply(self) -> None:
            raise CommandError(["nft"], 1, "Error: Could not process rule: No such file\n...")

    monkeypatch.setattr(nft, "masquerade_rules", lambda _: Refusing())

    probe = features.masquerade()

    assert (probe.ok, probe.detail) == (False, "Error: Could not process rule: No such file")


def test_cgroup_outside_the_hierarchy_is_refused(tmp_path):
    """A plain directory named by mistake is found before anything is attached."""
    probe = features.cgroup2(tmp_path)

    assert not probe.ok
    assert str(tmp_path) in probe.detail


def test_work_in_a_new_namespace_stays_there():
    """The calling thread's own namespace is never changed."""
    mine = Path("/proc/thread-self/ns/net").readlink()

    there = features.in_new_netns(lambda: Path("/proc/thread-self/ns/net").readlink())

    assert there != mine
    assert Path("/proc/thread-self/ns/net").readlink() == mine
    with pytest.raises(KeyError, match="lost"):
        features.in_new_netns(lambda: {}["lost"])
