"""What the vm ring runs where, and that nothing it could not run looks as if it had passed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ebpf_svc.modes import MODES
from tests.lib.variants import VARIANTS
from tests.vm import guest, machines, requests, suite
from tests.vm.guest import GuestFailed, Outcome
from tests.vm.kernels import Kernel, NoKernel, Wanted, wanted
from tests.vm.setup import Setup


def kernel(name: str) -> Kernel:
    return Kernel(name, f"{name}.0-46-amd64", Path(f"/boot/vmlinuz-{name}.0-46-amd64"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """No machine: commands are noted, and `false` in one fails it."""
    ran: list[tuple[str, ...]] = []

    def run(_kernel: Kernel, command: tuple[str, ...], out: Path, **_: object) -> Outcome:
        ran.append(command)
        if "tests/packet" in command:
            raise GuestFailed("it did not boot")
        out.mkdir(parents=True)
        (out / "output").write_text("..F\n= 1 failed, 2 passed in 3.4s =\n")
        return Outcome(int("smoke" in command), 1.0)

    monkeypatch.setattr(guest, "run", run)
    monkeypatch.setattr(suite.artifacts, "prepare", lambda _: None)
    monkeypatch.setattr(suite, "LOGS", tmp_path)
    return ran


def ring(*wanted: Wanted) -> list[suite.Row]:
    return suite.run(wanted, only=(), whole=False, abreast=1, say=lambda _: None)


NAMES = ["6.1", "6.1-um", "6.12", "6.12-um"]


def test_every_kernel_is_had_as_debian_built_it_and_as_a_process() -> None:
    """Only Debian's build tells whether programs load in what people run; a process tells more."""
    rows = wanted()
    emulated = {row.name for row in rows if not row.is_user_mode}
    processes = {row.name.removesuffix("-um") for row in rows if row.is_user_mode}

    assert emulated == processes
    assert "5.10" in emulated


def test_emulated_kernels_are_asked_what_processes_cannot_tell() -> None:
    """Programs everywhere, every packet and promise where it is quick; ipvs once whole."""
    parts = [(job.kernel, job.what) for job in suite.jobs(NAMES)]

    assert sorted(parts) == [
        ("6.1", "requests"),  # which runs the programs
        *[("6.1-um", "packet"), ("6.1-um", "smoke")],
        ("6.12", "programs"),
        *[("6.12-um", "behaviour-ipvs"), ("6.12-um", "packet"), ("6.12-um", "smoke")],
        ("6.12-um", "switch-ipvs"),
    ]
    stock = [job.kernel for job in suite.jobs(NAMES) if suite.STOCK[0] in job.command]
    assert stock == ["6.12"]  # where there are modules: processes have none


def test_every_mode_is_tried_on_every_kernel_as_a_process() -> None:
    """A mode that breaks on one kernel is found; every option on the oldest and the newest. Of the
    packet ring others than the oldest are not asked what explains, nor that one all of it.
    """
    names = [*NAMES, "5.10-um", "newest-um"]
    asked = {(job.kernel, job.what): job.command for job in suite.jobs(names)}

    assert set(suite.EXPLAIN_WAY) <= set(asked["5.10-um", "packet"])
    for name in ("6.1-um", "6.12-um"):
        assert set(suite.EXPLAIN) <= set(asked[name, "packet"])
        assert {"-k", "--deselect"}.isdisjoint(asked[name, "packet"][3:])
        assert _dataplanes(asked[name, "smoke"]) == set(MODES)
    for name in ("5.10-um", "newest-um"):
        assert _dataplanes(asked[name, "smoke"]) == set(VARIANTS)


def _dataplanes(command: Sequence[str]) -> set[str]:
    return {command[at + 1] for at, word in enumerate(command) if word == "--dataplane"}


def test_emulated_kernels_are_asked_everything_on_demand() -> None:
    """For who doubts a process."""
    parts = [(job.kernel, job.what) for job in suite.jobs(["6.12"], whole=True)]

    assert parts == [("6.12", "packet"), ("6.12", "smoke")]


def test_instructions_are_counted_where_the_clock_does() -> None:
    """What a request costs is a count of the ring, not a timing."""
    (job,) = suite.jobs(["5.10", "6.1", "6.1-um"], only=["requests"])

    assert (job.kernel, job.count_instructions) == ("6.1", True)


def test_requests_that_cost_more_are_named() -> None:
    """And those nobody counted any more, which could hide a growth; a percent is no growth."""
    before = {"a": 1000, "b": 1000, "c": 1000}

    assert requests.grown({"a": 1010, "b": 1050, "d": 1}, before) == ["b", "c"]


def test_failed_command_and_dead_machine_fail_their_rows(machine, monkeypatch) -> None:
    """Neither hides the other rows."""
    monkeypatch.setattr(machines, "obtain", lambda row: kernel(row.name))

    rows = ring(Wanted("6.1-um", (), True))

    assert [(row.what, row.ok) for row in rows] == [
        *[("kernel", True), ("packet", False), ("smoke", False)]
    ]
    assert rows[1].outcome == "FAILED: it did not boot"
    assert rows[2].outcome == "FAILED: 1 failed, 2 passed in 3.4s"
    assert len(machine) == 2


@pytest.mark.parametrize("required", [True, False])
def test_kernel_that_cannot_be_had_is_told_and_fails_when_required(
    machine, monkeypatch, required
) -> None:
    """A ring that tried nothing must not look like one that passed."""

    def refuse(_: Wanted) -> Kernel:
        raise NoKernel("no such suite")

    monkeypatch.setattr(machines, "obtain", refuse)

    (row,) = ring(Wanted("4.19", (), required))

    assert row.outcome == "cannot be had: no such suite"
    assert row.ok is not required
    assert "cannot be had" in suite.table([row])
    assert machine == []


def test_release_says_the_version() -> None:
    """The compiler is told major and minor, for abilities no probe can try before loading."""
    assert kernel("6.12").version == (6, 12)


def test_words_of_a_command_stay_words() -> None:
    """A guest's shell sees what the caller wrote."""
    script = Setup([], "/venv").script(["sh", "-c", "echo 'a b'"], Path("/cache dir"))

    assert """sh -c 'echo '"'"'a b'"'"''""" in script
    assert "cp -r '/cache dir' /tmp/artifacts" in script
