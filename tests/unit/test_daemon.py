"""The agent as a process, with the dataplane in memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.config import Mode
from ebpf_svc.control import Progress, Step, SwitchRequest, ask
from ebpf_svc.status import CONTROL

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: shop}
spec:
  ports: [{port: 80}]
"""
DEADLINE_S = 10.0


class Agent:
    """`ebpf-svc run --mode fake` on folders of its own."""

    def __init__(self, root: Path) -> None:
        self.manifests, self.run_dir = root / "manifests", root / "run"
        self.manifests.mkdir()
        self.log_path = root / "log"
        self._argv = [
            *(sys.executable, "-m", "ebpf_svc.cli", "run", "--mode", "fake"),
            *("--manifests", str(self.manifests), "--run-dir", str(self.run_dir)),
            *("--state-dir", str(root / "state"), "--node-name", "Node1"),
        ]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self.log_path.open("a") as log:
            self.process = subprocess.Popen(self._argv, stderr=log, text=True)

    def status(self) -> dict[str, Any]:
        try:
            status: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        except FileNotFoundError:
            return {}
        return status

    def wait(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status of the running process for which that holds."""
        assert self.process
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log_path.read_text()
            status = self.status()
            if status.get("pid") == self.process.pid and holds(status):
                return status
            time.sleep(0.005)
        raise AssertionError(f"not within {DEADLINE_S} s: {self.status()}")

    def end(self, number: signal.Signals) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.log_path.read_text().splitlines()]

    def add(self, name: str) -> None:
        (self.manifests / f"{name}.yaml").write_text(SERVICE.replace("NAME", name))


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    yield agent
    if agent.process and agent.process.poll() is None:
        agent.process.kill()
        agent.process.wait()


def ready(status: dict[str, Any]) -> bool:
    return bool(status["ready"])


def test_agent_serves_the_folder_follows_it_and_stops(agent: Agent) -> None:
    """Ready with what is there, then each change, SIGHUP reads back, SIGTERM ends with code 0."""
    agent.add("web")
    agent.start()
    status = agent.wait(ready)
    assert (status["services"]["ports"], status["node"], status["mode"]) == (1, "node1", "fake")
    agent.add("api")
    agent.wait(lambda status: status["services"]["ports"] == 2)
    before = agent.status()["last_sync_s"]
    assert agent.process
    agent.process.send_signal(signal.SIGHUP)
    agent.wait(lambda status: status["last_sync_s"] > before)
    assert agent.end(signal.SIGTERM) == 0
    events = agent.events()
    assert events[0] == "agent.starting"
    assert events[-1] == "agent.stopped"
    assert "sync.applied" in events


def test_second_agent_is_refused_while_the_first_runs(agent: Agent) -> None:
    """Exit code 1 and the pid of the one that runs; the first goes on."""
    agent.start()
    agent.wait(ready)
    assert agent.process
    first = agent.process
    second = subprocess.run(
        first.args, capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert second.returncode == 1
    assert f"another agent (pid {first.pid})" in second.stderr
    assert first.poll() is None


def test_agent_starts_after_one_that_was_killed(agent: Agent) -> None:
    """A crash leaves nothing that has to be removed by hand."""
    agent.add("web")
    agent.start()
    agent.wait(ready)
    agent.end(signal.SIGKILL)
    agent.start()
    assert agent.wait(ready)["services"]["ports"] == 1


def test_agent_answers_commands_while_it_runs(agent: Agent) -> None:
    """A switch to what serves is done at once; the socket goes with the agent."""
    agent.add("web")
    agent.start()
    assert agent.wait(ready)["refused"] == {}
    told = list(ask(agent.run_dir, SwitchRequest(mode=Mode.FAKE)))
    assert told == [Progress(Step.DONE, "fake", "serves already")]
    agent.end(signal.SIGTERM)
    assert not (agent.run_dir / CONTROL).exists()
