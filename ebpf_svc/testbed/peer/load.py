"""Steady load: workers that ask until told to stop, and the account of every answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from ebpf_svc.testbed.peer.client import ask

KEPT_FAILURES = 20


class Load:
    """Workers asking the same targets in turn, each pausing between two requests."""

    def __init__(self, targets: list[dict[str, Any]], workers: int, pause_s: float) -> None:
        self._targets, self._pause_s = targets, pause_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._ok = 0
        self._failed = 0
        self._ended = [0] * workers
        self._servers: Counter[str] = Counter()
        self._failures: list[dict[str, Any]] = []
        self._slowest_ms = 0.0
        self._begun = time.monotonic()
        self._threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, worker: int) -> None:
        number = worker
        while not self._stop.is_set():
            target = self._targets[number % len(self._targets)]
            number += 1
            self._count(worker, target, ask(target))
            self._stop.wait(self._pause_s)

    def _count(self, worker: int, target: dict[str, Any], answer: dict[str, Any]) -> None:
        with self._lock:
            self._ended[worker] += 1
            if answer["outcome"] == "ok":
                self._ok += 1
                self._servers[answer["server"]] += 1
                self._slowest_ms = max(self._slowest_ms, answer["latency_ms"])
                return
            self._failed += 1
            if len(self._failures) < KEPT_FAILURES:
                at = {
                    "address": target["address"],
                    "port": target["port"],
                    "protocol": target["protocol"],
                }
                self._failures.append(
                    {**answer, **at, "at_s": round(time.monotonic() - self._begun, 3)}
                )

    def account(self, *, reset: bool = False) -> dict[str, Any]:
        """What was counted so far; `reset` starts the count anew."""
        with self._lock:
            report = {
                "ok": self._ok,
                "failed": self._failed,
                "servers": dict(self._servers),
                "failures": list(self._failures),
                "slowest_ms": self._slowest_ms,
                "least": min(self._ended),
            }
            if reset:
                self._ended = [0] * len(self._ended)
                self._ok = self._failed = 0
                self._servers.clear()
                self._failures.clear()
                self._slowest_ms = 0.0
            return report

    def stop(self) -> dict[str, Any]:
        """Let every worker finish its request, then give the account."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.account()
