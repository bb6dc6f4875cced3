"""What a command and the running agent say to each other, over a real socket."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc import control
from ebpf_svc.config import Mode
from ebpf_svc.control import ControlServer, Progress, Step, SwitchRequest, Tell, ask
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.status import CONTROL

STEPS = (
    Progress(Step.OPENING, "nftables"),
    Progress(Step.SERVING, "nftables"),
    Progress(Step.DRAINING, "ebpf", "1 s of at most 300 s"),
    Progress(Step.DONE, "ebpf"),
)


class Switch:
    """An agent that goes through the steps at once."""

    def __init__(self) -> None:
        self.asked: list[SwitchRequest] = []
        self.steps = STEPS

    def __call__(self, request: SwitchRequest, tell: Tell) -> None:
        self.asked.append(request)
        for step in self.steps:
            tell(step)


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def run_dir(tmp_path: Path, switch: Switch) -> Iterator[Path]:
    # Longer than an address of a socket may be.
    run_dir = tmp_path / ("x" * 120)
    run_dir.mkdir()
    server = ControlServer(run_dir, switch)
    server.start()
    yield run_dir
    server.stop()


def raw(run_dir: Path, data: bytes) -> list[dict[str, str]]:
    """Send bytes and end; what comes back."""
    fd = os.open(run_dir, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"/proc/self/fd/{fd}/{CONTROL}")
        os.close(fd)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return [json.loads(line) for line in client.makefile("r")]


def test_every_step_reaches_the_command(run_dir: Path, switch: Switch) -> None:
    """One line of JSON there, lines of JSON back, until the last step."""
    request = SwitchRequest(mode=Mode.NFTABLES, drain_s=5)
    assert tuple(ask(run_dir, request)) == STEPS
    assert switch.asked == [request]


def test_command_that_does_not_wait_hears_until_the_new_mode_serves(run_dir: Path) -> None:
    """What drains goes on draining without a listener."""
    told = list(ask(run_dir, SwitchRequest(mode=Mode.NFTABLES, wait=False)))
    assert told == list(STEPS[:2])


def test_agent_at_work_for_long_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may take minutes on a slow machine: signs of life come meanwhile, and are no steps."""
    monkeypatch.setattr(control, "SILENCE_S", 0.5)

    def slow(_request: SwitchRequest, tell: Tell) -> None:
        tell(STEPS[0])
        threading.Timer(1.5, lambda: [tell(step) for step in STEPS[1:]]).start()

    server = ControlServer(tmp_path, slow, beat_s=0.05)
    server.start()
    try:
        assert tuple(ask(tmp_path, SwitchRequest(mode=Mode.NFTABLES))) == STEPS
    finally:
        server.stop()


def test_silent_agent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs keeps nobody."""
    monkeypatch.setattr(control, "SILENCE_S", 0.2)
    server = ControlServer(tmp_path, lambda _request, tell: tell(STEPS[0]), beat_s=2.0)
    server.start()
    try:
        with pytest.raises(DataplaneError, match="does not answer"):
            list(ask(tmp_path, SwitchRequest(mode=Mode.NFTABLES)))
    finally:
        server.stop()


def test_failure_is_the_last_step(run_dir: Path, switch: Switch) -> None:
    """With the reason."""
    switch.steps = (STEPS[0], Progress(Step.FAILED, "", "mode nftables: no nft"), STEPS[3])
    assert list(ask(run_dir, SwitchRequest(mode=Mode.NFTABLES))) == list(switch.steps[:2])


def test_only_root_may_ask(run_dir: Path) -> None:
    """Whoever may connect decides about every connection of the node."""
    assert stat.S_IMODE((run_dir / CONTROL).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello\n",
        b"{}\n",
        b'{"do": "stop", "mode": "ebpf"}\n',
        b'{"do": "switch", "mode": "magic"}\n',
        b'{"do": "switch", "mode": "ebpf", "drain_s": -1}\n',
        b'{"do": "switch", "mode": "ebpf", "drain_s": 1e999}\n',
        b'{"do": "switch", "mode": "ebpf", "force": true}\n',
        b'["switch", "ebpf"]\n',
        b"\xff\xfe\n",
        b"x" * 5000,
        b'{"do": "switch", "mode": "ebpf"' + b" " * 5000 + b"}\n",
    ],
)
def test_garbage_is_refused(run_dir: Path, switch: Switch, line: bytes) -> None:
    """Nothing is begun, it is told what was wrong, and the next request is served."""
    (answer,) = raw(run_dir, line)
    assert answer["step"] == "failed"
    assert answer["detail"].startswith("not understood: ")
    assert switch.asked == []
    assert list(ask(run_dir, SwitchRequest(mode=Mode.EBPF)))


def test_socket_a_killed_agent_left_is_in_nobodys_way(tmp_path: Path, switch: Switch) -> None:
    """Nobody answers there; the next agent takes its place."""
    first = ControlServer(tmp_path, switch)
    first.start()
    assert first._listener
    first._listener.close()
    second = ControlServer(tmp_path, switch)
    second.start()
    try:
        assert list(ask(tmp_path, SwitchRequest(mode=Mode.EBPF)))
    finally:
        second.stop()
    assert not (tmp_path / CONTROL).exists()


def test_no_agent_is_told_with_what_to_do(tmp_path: Path, switch: Switch) -> None:
    """Without a socket, and with one nobody listens at."""
    for _ in range(2):
        with pytest.raises(UnsupportedHost, match="no agent runs in"):
            list(ask(tmp_path, SwitchRequest(mode=Mode.EBPF)))
        with socket.socket(socket.AF_UNIX) as dead:
            if not (tmp_path / CONTROL).exists():
                dead.bind(str(tmp_path / CONTROL))


def test_agent_that_goes_silent_is_an_error(
    run_dir: Path, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command must end."""
    monkeypatch.setattr("ebpf_svc.control.SILENCE_S", 0.05)
    switch.steps = STEPS[:1]
    with pytest.raises(DataplaneError, match="does not answer"):
        list(ask(run_dir, SwitchRequest(mode=Mode.EBPF)))


def test_agent_that_ends_is_an_error(run_dir: Path) -> None:
    """What becomes of the switch is for the next agent to say."""
    (run_dir / CONTROL).unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        fd = os.open(run_dir, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{fd}/{CONTROL}")
        os.close(fd)
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            client.sendall(b'{"step": "opening", "mode": "ebpf", "detail": ""}\n')
            client.recv(100)
            client.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(DataplaneError, match="the agent ended"):
            list(ask(run_dir, SwitchRequest(mode=Mode.EBPF)))


def test_directory_that_takes_no_socket_stops_nothing(tmp_path: Path, switch: Switch) -> None:
    """Logged: the agent serves all the same."""
    server = ControlServer(tmp_path / "gone", switch)
    server.start()
    server.stop()
