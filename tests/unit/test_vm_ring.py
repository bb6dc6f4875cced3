"""What the vm ring runs where, and that nothing it could not run looks as if it had passed."""

from __future__ import annotations

from pathlib import Path

import pytest

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


NAMES = ["5.10", "6.1", "6.12", "6.12-um", "7.2"]


def test_kernel_as_a_process_is_one_that_is_emulated_too() -> None:
    """Only Debian's build tells whether programs load in what people run."""
    names = {row.name: row.is_user_mode for row in wanted()}

    assert any(names.values())
    assert {name.removesuffix("-um") for name in names} <= set(names)


def test_every_kernel_is_asked_the_oldest_and_processes_all() -> None:
    """Programs everywhere, every packet where most is missing or it is quick; ipvs once whole."""
    parts = [(job.kernel, job.what) for job in suite.jobs(NAMES)]

    assert sorted(parts) == [
        *[("5.10", "packet"), ("5.10", "smoke")],
        *[("6.1", "programs"), ("6.1", "requests"), ("6.1", "smoke")],
        *[("6.12", "programs"), ("6.12", "smoke")],
        *[("6.12-um", "behaviour-ipvs"), ("6.12-um", "packet"), ("6.12-um", "smoke")],
        *[("7.2", "programs"), ("7.2", "smoke")],
    ]


def test_every_mode_is_tried_on_the_ends() -> None:
    """A mode that breaks on the oldest or the newest kernel is found."""
    smoke = {job.kernel: job.command for job in suite.jobs(NAMES, only=["smoke"])}

    modes = {variant.mode for variant in VARIANTS.values()}
    assert modes <= set(smoke["5.10"])
    assert modes <= set(smoke["7.2"])
    assert {"ebpf", "ipvs"} <= set(smoke["6.1"])
    assert set(VARIANTS) <= {*smoke["6.12-um"], *smoke["6.12"]}


def test_every_mode_is_tried_between_the_ends() -> None:
    """Emulated kernels of Debian's releases share the modes between them."""
    names = ["5.10", "6.1", "6.12", "7.2"]
    smoke = {job.kernel: job.command for job in suite.jobs(names, only=["smoke"])}

    modes = {variant.mode for variant in VARIANTS.values()}
    chosen = {*smoke["6.1"], *smoke["6.12"]}
    assert modes - chosen == set()


def test_fast_path_is_tried_where_it_can_be() -> None:
    """Emulated, for a kernel in user mode runs no programs in drivers; and not on the oldest."""
    names = ["5.10", "5.10-um", "6.12", "6.12-um"]
    asked = {(job.kernel, job.what): job.command for job in suite.jobs(names)}

    assert set(VARIANTS) - set(asked["6.12-um", "smoke"]) == {"ebpf-fast"}
    assert set(VARIANTS) & set(asked["6.12", "smoke"]) == {"ebpf-fast"}
    assert ("5.10", "smoke") not in asked
    assert ("5.10", "packet") not in asked


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

    rows = ring(Wanted("6.12", (), True))

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
