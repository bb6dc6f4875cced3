"""Run programs of the host."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from ebpf_svc.errors import CommandError

NOT_FOUND = 127
TIMED_OUT = 124
"""Exit codes a shell and timeout(1) would give."""


def run(argv: Sequence[str], *, input: str | None = None, timeout_s: float = 30.0) -> str:
    """Run a program in this thread's network namespace and return its standard output.

    Args:
        argv: the program, looked up in PATH, and its arguments; no shell sees them.
        input: what it reads from standard input; None = nothing.
        timeout_s: seconds before it is killed.

    Raises:
        CommandError: it is missing (code 127), took too long (124) or exited with a code above 0.
    """
    try:
        done = subprocess.run(
            argv,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as exc:
        raise CommandError(argv, NOT_FOUND, exc.strerror or "") from exc
    except subprocess.TimeoutExpired as exc:
        raise CommandError(argv, TIMED_OUT, f"no answer within {timeout_s:g} s") from exc
    if done.returncode != 0:
        raise CommandError(argv, done.returncode, done.stderr)
    return done.stdout
