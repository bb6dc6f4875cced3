"""Running programs of the host."""

from __future__ import annotations

import time

import pytest

from ebpf_svc.errors import CommandError
from ebpf_svc.host.command import NOT_FOUND, TIMED_OUT, run


def test_output_is_returned() -> None:
    """Standard output as text, whatever went to stderr."""
    assert run(["sh", "-c", "echo out; echo err >&2"]) == "out\n"


def test_input_reaches_the_program() -> None:
    """What is given is its standard input; without it, there is none to wait for."""
    assert run(["cat"], input="add table\n") == "add table\n"
    assert run(["cat"]) == ""


def test_failure_carries_code_and_stderr() -> None:
    """The caller sees what a shell would have shown."""
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "echo no such table >&2; exit 3"])
    assert (caught.value.code, caught.value.stderr) == (3, "no such table\n")


def test_missing_program_is_a_command_error() -> None:
    """Not being installed is a failure of the command, told like any other."""
    with pytest.raises(CommandError) as caught:
        run(["ebpf-svc-no-such-program"])
    assert caught.value.code == NOT_FOUND


def test_program_that_hangs_is_killed() -> None:
    """An answer that does not come within the time is a failure."""
    begun = time.monotonic()
    with pytest.raises(CommandError) as caught:
        run(["sleep", "60"], timeout_s=0.05)
    assert caught.value.code == TIMED_OUT
    assert time.monotonic() - begun < 5
