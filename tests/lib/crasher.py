"""Agents that are killed: forks of one process that has imported everything, so that the time
until SIGKILL is spent on the node's kernel and not on Python's start.

    python -m tests.lib.crasher SETTINGS.json MODE

Reads lines, `fork SECONDS` or `ready SECONDS`; starts an agent for each, kills it so long after its
fork or after it was ready, and answers how long it lived.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.namespace import python_argv

POLL_S = 0.005


class Crasher:
    """Asks for agents to be started and killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def crash(self, after_s: float, *, since: str = "fork") -> float:
        """Kill a new agent so long after its `fork`, or since it was `ready`.

        Returns:
            how long it lived, in seconds.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{since} {after_s}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


@contextmanager
def crasher(agent: Agent, mode: str) -> Iterator[Crasher]:
    """A crasher on an agent's node, with its settings and log; the agent must not run."""
    argv = [*python_argv("tests.lib.crasher"), str(agent.config), mode]
    pipe = subprocess.PIPE
    with (
        agent.log_path.open("a") as log,
        agent.node.popen(argv, stdin=pipe, stdout=pipe, stderr=log) as process,
    ):
        yield Crasher(process)
        assert process.stdin is not None
        process.stdin.close()


def _main(config: Path, mode: str) -> None:
    from ebpf_svc.config import Mode, Settings
    from ebpf_svc.daemon import run
    from ebpf_svc.log import configure
    from ebpf_svc.modes import make_dataplane

    settings = Settings.model_validate_json(config.read_text())
    settings = settings.model_copy(update={"mode": Mode(mode)})
    make_dataplane(mode, settings)  # imports it
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)
            configure(style=settings.log.format, level=settings.log.level)
            try:
                run(settings)
            finally:
                os._exit(1)
        since, after_s = line.split()
        began = time.monotonic()
        while since == "ready" and not _is_ready(settings.run_dir / "status.json", pid):
            time.sleep(POLL_S)
        time.sleep(float(after_s))
        lived_s = time.monotonic() - began
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"the agent ended by itself: {status}")
        print(lived_s, flush=True)


def _is_ready(path: Path, pid: int) -> bool:
    try:
        status = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return bool(status.get("ready")) and status.get("pid") == pid


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
