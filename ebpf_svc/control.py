"""How a command talks to the running agent: a UNIX socket in its run directory.

A request is one line of JSON, the answer a line for each step until the last; while a step takes
long, empty lines show that the agent lives. Only the agent's own user, root, may connect. Anything
else than a well-formed request is told so and dropped.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ebpf_svc.config import Mode
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.log import get_logger
from ebpf_svc.status import CONTROL

REQUEST_BYTES = 4096
REQUEST_S = 5.0
"""A client says what it wants within this time, or is dropped."""
BEAT_S = 5.0
"""How often the agent shows that it lives, however long a step takes."""
SILENCE_S = 60.0
"""An agent that shows nothing for so long is not waited for."""

log = get_logger(__name__)


class Step(StrEnum):
    """How far a switch has come."""

    OPENING = "opening"
    FILLING = "filling"
    SERVING = "serving"
    """The new dataplane has every connection that begins from here on."""
    DRAINING = "draining"
    """The old one keeps those that are open."""
    DONE = "done"
    FAILED = "failed"


LAST = frozenset({Step.DONE, Step.FAILED})


@dataclass(frozen=True, slots=True)
class Progress:
    """A line of the answer."""

    step: Step
    mode: str = ""
    """Whose step it is: the new mode until it serves, then the old one; empty when it is none's."""
    detail: str = ""


Tell = Callable[[Progress], None]


class SwitchRequest(BaseModel):
    """Let another mode serve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    do: Literal["switch"] = "switch"
    mode: Mode
    drain_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """How long open connections keep the old dataplane; None = as the agent's settings say."""
    wait: bool = True
    """Tell everything until the old dataplane is gone; else only until the new one serves."""

    def is_answered_by(self, progress: Progress) -> bool:
        """Whether nothing more is to be told."""
        return progress.step in LAST or (progress.step is Step.SERVING and not self.wait)


class ControlServer:
    """The agent's end."""

    def __init__(
        self,
        run_dir: Path,
        switch: Callable[[SwitchRequest, Tell], None],
        *,
        beat_s: float = BEAT_S,
    ) -> None:
        """Nothing listens yet.

        Args:
            run_dir: where the socket is to be.
            switch: begins what was asked and returns; tells each step, from any thread.
            beat_s: pause between two signs of life while a step takes long.
        """
        self._run_dir, self._switch, self._beat_s = run_dir, switch, beat_s
        self._listener: socket.socket | None = None

    def start(self) -> None:
        """Listen; a socket that cannot be had is only logged, for nobody's traffic needs it."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with _short(self._run_dir) as path:
                # An agent that was killed has left it.
                with suppress(FileNotFoundError):
                    os.unlink(path)  # noqa: PTH108  # not a place, but a way to one
                mask = os.umask(0o177)
                try:
                    listener.bind(path)
                finally:
                    os.umask(mask)
            listener.listen()
        except OSError as error:
            listener.close()
            log.warning("control.refused", path=str(self._run_dir / CONTROL), error=str(error))
            return
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="control", daemon=True).start()

    def stop(self) -> None:
        """Take no more requests; may be called again, and before `start`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            (self._run_dir / CONTROL).unlink(missing_ok=True)
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(client,), name="control-client", daemon=True
            ).start()

    def _serve(self, client: socket.socket) -> None:
        # A client that leaves changes nothing about what it began.
        with client, suppress(OSError):
            client.settimeout(REQUEST_S)
            try:
                request = SwitchRequest.model_validate_json(_line(client))
            except (ValidationError, ValueError) as error:
                log.warning("control.garbage", error=str(error))
                _send(client, Progress(Step.FAILED, detail=f"not understood: {_first(error)}"))
                return
            log.info("control.request", command=request.do, mode=request.mode.value)
            told: queue.SimpleQueue[Progress] = queue.SimpleQueue()
            self._switch(request, told.put)
            while True:
                try:
                    progress = told.get(timeout=self._beat_s)
                except queue.Empty:
                    client.sendall(b"\n")
                    continue
                _send(client, progress)
                if request.is_answered_by(progress):
                    return


def ask(run_dir: Path, request: SwitchRequest) -> Iterator[Progress]:
    """Have the agent of that run directory do something; yields each step until the last.

    Raises:
        UnsupportedHost: no agent listens there.
        DataplaneError: it ended, or went silent, before the last step.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as server:
        try:
            with _short(run_dir) as path:
                server.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise UnsupportedHost(
                [f"no agent runs in {run_dir}: `ebpf-svc run --mode` starts one in that mode"]
            ) from error
        server.settimeout(SILENCE_S)
        server.sendall(request.model_dump_json().encode() + b"\n")
        try:
            with server.makefile("r") as lines:
                for line in lines:
                    if not line.strip():
                        continue
                    told = json.loads(line)
                    progress = Progress(Step(told["step"]), told["mode"], told["detail"])
                    yield progress
                    if request.is_answered_by(progress):
                        return
        except (OSError, ValueError) as error:
            raise DataplaneError(f"the agent does not answer: {error}") from error
        raise DataplaneError("the agent ended")


def _line(client: socket.socket) -> bytes:
    """What comes until the end of a line; raises ValueError when there is none."""
    data = b""
    while b"\n" not in data:
        piece = client.recv(REQUEST_BYTES)
        data += piece
        if not piece or len(data) > REQUEST_BYTES:
            raise ValueError("one line of JSON was expected")
    return data.partition(b"\n")[0]


def _first(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        return f"{where}: {problem['msg']}" if where else problem["msg"]
    return str(error)


def _send(client: socket.socket, progress: Progress) -> None:
    line = {"step": progress.step, "mode": progress.mode, "detail": progress.detail}
    client.sendall(json.dumps(line).encode() + b"\n")


@contextmanager
def _short(run_dir: Path) -> Iterator[str]:
    """A path of the socket that fits into an address of 108 bytes, however deep the directory."""
    fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{CONTROL}"
    finally:
        os.close(fd)
