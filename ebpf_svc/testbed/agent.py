"""The agent under test: `ebpf-svc run` as a process of a node, with its own settings and log."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from ebpf_svc.config import Settings
from ebpf_svc.errors import EbpfSvcError
from ebpf_svc.testbed.host import Node
from ebpf_svc.testbed.namespace import python_argv
from ebpf_svc.testbed.patience import PATIENCE

READY_S = 60.0 * PATIENCE
STOP_S = 10.0 * PATIENCE
POLL_S = 0.005


class AgentError(EbpfSvcError):
    """The agent did not do what it was told; `log_tail` is the end of its log."""

    def __init__(self, what: str, log_tail: str) -> None:
        super().__init__(f"{what}\n{log_tail}")
        self.log_tail = log_tail


class Agent:
    """Starts, watches and ends the agent of one node; use it as a context manager.

    Leaving the block stops the process and runs `cleanup`, so the node is as it was.
    """

    def __init__(self, node: Node, settings: Settings, *, mode: str | None = "ebpf") -> None:
        """Write its settings file; nothing runs yet. No `mode`: the settings' counts."""
        self.node, self.settings = node, settings
        self._mode = mode
        self.log_path = node.folders.root / "agent.log"
        """The agent's log, restarts included."""
        self.config = node.folders.root / "agent.json"
        """Its settings file, for commands of the tool."""
        # JSON is YAML too.
        self.config.write_text(settings.model_dump_json(indent=2))
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Agent:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.cleanup()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, wait: bool = True) -> float:
        """Start the agent; returns how long it took to be ready, in seconds (0 when not waited).

        Raises:
            AgentError: it ended or was not ready in time.
        """
        begun = time.monotonic()
        argv = [*python_argv("ebpf_svc.cli"), "run", "--config", str(self.config)]
        if self._mode is not None:
            argv += ["--mode", self._mode]
        with self.log_path.open("a") as log:
            self._process = self.node.popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if not wait:
            return 0.0
        self.wait_ready()
        return time.monotonic() - begun

    def wait_ready(self, deadline_s: float = READY_S) -> None:
        """Wait until this very process says that it has synced."""
        deadline = time.monotonic() + deadline_s
        while not self._ready():
            if not self.running:
                raise AgentError(f"the agent of {self.node.name} ended", self.log_tail())
            if time.monotonic() > deadline:
                raise AgentError(f"the agent of {self.node.name} is not ready", self.log_tail())
            time.sleep(POLL_S)

    def status(self) -> Mapping[str, Any]:
        """What the agent last wrote about itself; empty before it did."""
        try:
            status: dict[str, Any] = json.loads((self.settings.run_dir / "status.json").read_text())
        except FileNotFoundError:
            return {}
        return status

    def kill(self) -> None:
        """End the agent as a crash would: SIGKILL, nothing tidied up."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask the agent to end and wait for it; does nothing when it does not run."""
        self._end(signal.SIGTERM)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the running agent."""
        assert self._process is not None
        self._process.send_signal(number)

    def restart(self) -> float:
        """Kill the agent and start it again; returns seconds until ready."""
        self.kill()
        return self.start()

    def command(self, *words: str) -> str:
        """Run another command of the tool on the node, e.g. `show --json`; raises CommandError."""
        argv = [*python_argv("ebpf_svc.cli"), *words, "--config", str(self.config)]
        return self.node.run(argv)

    def cleanup(self) -> None:
        """Remove what the agent put into the node's kernel."""
        self.command("cleanup")

    def log_tail(self, lines: int = 30) -> str:
        """The end of everything this agent logged, restarts included."""
        try:
            return "\n".join(self.log_path.read_text().splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def _ready(self) -> bool:
        status = self.status()
        assert self._process is not None
        # The file may still be that of the process before.
        return bool(status.get("ready")) and status.get("pid") == self._process.pid

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            name = self.node.name
            raise AgentError(
                f"the agent of {name} ignored {number.name}", self.log_tail()
            ) from None
        finally:
            self._process = None
