"""Fixtures of the behaviour tests: services that come with a test and go with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pytest

from ebpf_svc.testbed.host import Pod
from tests.lib.manifests import Endpoint, Web
from tests.lib.world import World


class Publish(Protocol):
    """Publish a new service behind these endpoints (default: every serving pod of the world)."""

    def __call__(
        self, endpoints: Sequence[Endpoint | Pod] | None = None, **options: Any
    ) -> Web: ...


@pytest.fixture
def publish(world: World) -> Iterator[Publish]:
    """Services of this test alone; agents an earlier test left dead are started again."""
    published: list[Web] = []
    world.heal()

    def make(endpoints: Sequence[Endpoint | Pod] | None = None, **options: Any) -> Web:
        web = world.new_web(**options)
        published.append(web)
        world.publish(web, world.webs if endpoints is None else endpoints)
        return web

    yield make
    world.heal()
    world.withdraw(*published)


@pytest.fixture
def programs(dataplane: str) -> None:
    """For tests of what only the eBPF dataplane puts into the kernel."""
    if dataplane != "ebpf":
        pytest.skip(f"{dataplane} mode has no programs, no maps and no table `inet ebpf-svc`")
