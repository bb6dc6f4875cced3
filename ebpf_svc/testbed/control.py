"""The near end of a peer: sends commands to the program inside a host and hands out its answers."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from ebpf_svc.errors import EbpfSvcError
from ebpf_svc.testbed.patience import PATIENCE

REPLY_MARGIN_S = 10.0 * PATIENCE
"""How much longer than its own timeouts a command may take before the peer counts as hung."""


class PeerError(EbpfSvcError):
    """The program inside a host failed or ended; what the network does is never this error."""


class Peer:
    """Controls one peer process; safe to use from several threads.

    Owns the process from then on: `close()` ends it.
    """

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process, self._name = process, name
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"peer-{name}", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def submit(self, do: str, **arguments: Any) -> Future[Any]:
        """Send a command; the future carries its result or PeerError."""
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._ids)
            self._waiting[number] = future
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
                self._process.stdin.flush()
            except (OSError, ValueError) as error:  # broken pipe, or closed by close()
                del self._waiting[number]
                raise PeerError(f"the peer of {self._name} has ended") from error
        return future

    def call(self, do: str, *, takes_s: float = 0.0, **arguments: Any) -> Any:
        """Send a command and wait for its result; `takes_s` is how long it may take itself."""
        return self.submit(do, **arguments).result(takes_s + REPLY_MARGIN_S)

    def close(self) -> None:
        """End the process and every wait for it."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                # A command may still be in the buffer of a process that has ended.
                with suppress(BrokenPipeError):
                    stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            reply = json.loads(line)
            with self._lock:
                future = self._waiting.pop(reply["id"])
            if "error" in reply:
                future.set_exception(PeerError(f"{self._name}: {reply['error']}"))
            else:
                future.set_result(reply["result"])
        with self._lock:
            lost, self._waiting = list(self._waiting.values()), {}
        for future in lost:
            future.set_exception(PeerError(f"the peer of {self._name} has ended"))
