"""Servers that lose patience soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ebpf_svc.health.server import HttpServer


@pytest.fixture
def make_server() -> Iterator[Callable[..., HttpServer]]:
    """Servers with little patience, stopped at the end."""
    made: list[HttpServer] = []

    def make(**options: Any) -> HttpServer:
        options = {"read_s": 0.3, "write_s": 0.3, "retry_s": 0.05} | options
        made.append(HttpServer("test", **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()
