from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebpf_svc.bench.apiserver import MockApiServer
from tests.lib.apiserver import running


@pytest.fixture
def server() -> Iterator[MockApiServer]:
    """A stand-in API server with one Service, its slice and this node."""
    with running() as mock:
        yield mock


@pytest.fixture(params=[True, False], ids=["streamed", "paged"])
def streaming_lists(request: pytest.FixtureRequest) -> bool:
    """Both ways to get the first state."""
    return bool(request.param)
