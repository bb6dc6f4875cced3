"""Read commands, one JSON object a line; answer each with its id, in the order they finish."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ebpf_svc.testbed.peer.client import SHARES, Channel, ask, failure, ping
from ebpf_svc.testbed.peer.load import Load
from ebpf_svc.testbed.peer.server import Server

THREADS = 64


class Peer:
    """Everything one host's program holds: servers, open channels, loads."""

    def __init__(self) -> None:
        self._server = Server()
        self._channels: dict[int, Channel] = {}
        self._loads: dict[int, Load] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._probes = ThreadPoolExecutor(THREADS)
        self.stays = False

    def serve(self, name: str, ports: list[tuple[str, int]], address: str = "") -> None:
        for protocol, port in ports:
            self._server.serve(name, protocol, port, address)

    def stay(self) -> None:
        """Go on serving when standard input ends."""
        self.stays = True

    def stop_serving(self, ports: list[tuple[str, int]]) -> None:
        for protocol, port in ports:
            self._server.stop(protocol, port)

    def ask(self, probes: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Every probe at once; the requests of one probe (`count`) one after the other."""
        return list(
            self._probes.map(
                lambda probe: [ask(probe) for _ in range(probe.get("count", 1))], probes
            )
        )

    def open(self, target: dict[str, Any]) -> dict[str, Any]:
        try:
            channel = Channel(target)
        except OSError as error:
            return failure(error)
        with self._lock:
            self._next += 1
            self._channels[self._next] = channel
            return {"outcome": "ok", "channel": self._next}

    def ping(self, channel: int) -> dict[str, Any]:
        return ping(self._channels[channel])

    def close(self, channel: int) -> None:
        self._channels.pop(channel).close()

    def start_load(self, targets: list[dict[str, Any]], workers: int, pause_s: float) -> int:
        with self._lock:
            self._next += 1
            self._loads[self._next] = Load(targets, workers, pause_s)
            return self._next

    def read_load(self, load: int, reset: bool = False) -> dict[str, Any]:
        return self._loads[load].account(reset=reset)

    def stop_load(self, load: int) -> dict[str, Any]:
        return self._loads.pop(load).stop()


def main(number: int = 0) -> None:
    """Serve commands until standard input ends.

    Args:
        number: the host's, which decides on its share of the ports.
    """
    Channel.share = number % SHARES
    peer = Peer()
    write_lock = threading.Lock()

    def execute(command: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"id": command.pop("id")}
        try:
            action: Callable[..., Any] = getattr(peer, command.pop("do"))
            reply["result"] = action(**command)
        except Exception as error:  # the other end raises it
            reply["error"] = f"{type(error).__name__}: {error}"
        with write_lock:
            sys.stdout.write(json.dumps(reply) + "\n")
            sys.stdout.flush()

    with ThreadPoolExecutor(THREADS) as commands:
        for line in sys.stdin:
            commands.submit(execute, json.loads(line))
    if peer.stays:
        threading.Event().wait()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
