"""What the rings share: which dataplane, what this machine lacks, what a failure leaves behind."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.config import Settings
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.modes import make_dataplane
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.podnet import PodNetwork
from tests.behaviour.gaps import reason_of
from tests.lib.kernel import running_kernel
from tests.lib.variants import VARIANTS, Variant
from tests.lib.world import World

LOGS = Path("test-logs")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ebpf-svc")
    group.addoption(
        *("--dataplane", "--variant"),
        choices=VARIANTS,
        action="append",
        help="only this dataplane, or this way to run it; repeatable",
    )
    group.addoption(
        "--keep", action="store_true", help="leave the clusters of failed tests up, for a look"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        module = metafunc.module.__name__.rpartition(".")[2]
        usual = [name for name, variant in VARIANTS.items() if variant.runs(module)]
        names = metafunc.config.getoption("dataplane") or usual
        metafunc.parametrize("variant", names, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    kernel = running_kernel()
    for item in items:
        if "behaviour" in item.path.parts:
            item.add_marker(pytest.mark.root)
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root (namespaces, BPF): sudo make test"))
        name = _variant_of(item)
        mode = VARIANTS[name].mode if name else ""
        if _parameters(item).get("pod_network", PodNetwork.BRIDGE) != PodNetwork.BRIDGE:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "smoke"]
        reason = reason_of(name, mode, _names(item), kernel)
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    yield
    # A variant at a time, whatever else its tests are parametrized by: its clusters are made once.
    order = {name: number for number, name in enumerate(VARIANTS, 1)}
    items.sort(key=lambda item: order.get(_variant_of(item), 0))


def _names(item: pytest.Item) -> list[str]:
    """The test function, alone and with each of its parameters."""
    test = getattr(item, "originalname", item.name)
    callspec = getattr(item, "callspec", None)
    return [test, *(f"{test}[{each}]" for each in (callspec.id.split("-") if callspec else ()))]


def _parameters(item: pytest.Item) -> Mapping[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec else {}


def _variant_of(item: pytest.Item) -> str:
    return str(_parameters(item).get("variant", ""))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep everything that explains a failure in test-logs/<test>/."""
    report = yield
    if report.failed and report.when in ("setup", "call"):
        world = getattr(item, "funcargs", {}).get("world")
        if isinstance(world, World):
            folder = LOGS / re.sub(r"[^\w.-]+", "-", item.nodeid.rpartition("/")[2])
            world.report(folder)
            report.sections.append(("what the nodes held", str(folder)))
            world.failed = True
    return report


@pytest.fixture(scope="session")
def variant(request: pytest.FixtureRequest) -> Variant:
    """The dataplane under test, and its options; one that cannot run here is skipped in its own
    words.
    """
    variant = VARIANTS[request.param]
    support = make_dataplane(variant.mode, Settings()).check()
    if not support.ok:
        pytest.skip(str(UnsupportedHost(support.missing)))
    return variant


@pytest.fixture(scope="session")
def dataplane(variant: Variant) -> str:
    """The mode of the dataplane under test."""
    return variant.mode


@pytest.fixture(scope="session")
def artifact_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, shared by every agent of the run: one compile each, or none (vm ring)."""
    if given := os.environ.get("EBPF_SVC_ARTIFACTS"):
        return Path(given)
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"


@pytest.fixture(scope="session")
def no_leftovers() -> Iterator[None]:
    """Remove what crashed runs left; a cluster of this run that stays fails its own teardown."""
    Cluster.cleanup_leftovers()
    yield
    assert Cluster.cleanup_leftovers() == ()


class Worlds:
    """The worlds of a run, one per pod network, made when first asked for.

    Those of a variant end when another is asked for: a dozen agents at rest fill a small machine.
    """

    def __init__(self, cache_dir: Path, *, keep: bool) -> None:
        self._cache_dir, self._keep = cache_dir, keep
        self._worlds: dict[tuple[Variant, PodNetwork], World] = {}

    def of(self, variant: Variant, network: PodNetwork) -> World:
        key = (variant, network)
        if key not in self._worlds:
            for other in [each for each in self._worlds if each[0] != variant]:
                self._end(self._worlds.pop(other))
            self._worlds[key] = World(
                network, cache_dir=self._cache_dir, mode=variant.mode, ebpf=variant.ebpf
            )
        return self._worlds[key]

    def close(self) -> None:
        for world in self._worlds.values():
            self._end(world)

    def _end(self, world: World) -> None:
        if self._keep and world.failed:
            world.cluster.keep()
            print(f"\nkept:\n{world.cluster.describe()}")
            print(f"enter: ip netns exec {world.cluster.nodes[0].namespace.name} bash")
        else:
            world.close()


@pytest.fixture(scope="session")
def worlds(
    request: pytest.FixtureRequest, artifact_cache: Path, no_leftovers: None
) -> Iterator[Worlds]:
    made = Worlds(artifact_cache, keep=request.config.getoption("--keep"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def pod_network(request: pytest.FixtureRequest) -> PodNetwork:
    """How pods are attached: the bridge, unless a test asks for others (`every_pod_network`)."""
    return getattr(request, "param", PodNetwork.BRIDGE)


@pytest.fixture(scope="session")
def world(variant: Variant, pod_network: PodNetwork, worlds: Worlds) -> World:
    """A cluster of that pod network with agents of that dataplane, shared by the whole run."""
    return worlds.of(variant, pod_network)
