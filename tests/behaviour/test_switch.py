"""Every mode after every other, under traffic: `ebpf-svc switch`, and a start in another mode."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from ebpf_svc.config import Mode, Settings
from ebpf_svc.errors import CommandError
from ebpf_svc.model.net import Protocol
from ebpf_svc.modes import MODES, make_dataplane
from ebpf_svc.testbed.agent import Agent, AgentError
from ebpf_svc.testbed.cluster import Cluster
from tests.lib.switching import Pings, Site, step, wrong_in
from tests.lib.variants import VARIANTS
from tests.lib.waiting import eventually


def tour(modes: Sequence[str], about: str = "") -> list[str]:
    """A way from the first mode back to it that takes every step from one to another once.

    About a mode: the steps from it and to it alone.
    """
    steps = {
        mode: [other for other in modes if other != mode and about in ("", mode, other)]
        for mode in modes
    }
    way, found = [modes[0]], []
    while way:
        if steps[way[-1]]:
            way.append(steps[way[-1]].pop())
        else:
            found.append(way.pop())
    return found[::-1]


def test_tour_takes_every_step_once() -> None:
    """Else a pair of modes would go untested."""
    way = tour(["a", "b", "c", "d"])
    steps = sorted(itertools.permutations("abcd", 2))
    assert sorted(itertools.pairwise(way)) == steps
    about = tour(["a", "b", "c", "d"], about="c")
    assert sorted(itertools.pairwise(about)) == [step for step in steps if "c" in step]


def can_run(mode: str) -> bool:
    return make_dataplane(mode, Settings()).check().ok


@pytest.fixture
def cluster(artifact_cache: Path, no_leftovers: None) -> Iterator[Cluster]:
    with Cluster.create(cache_dir=artifact_cache) as cluster:
        yield cluster


@pytest.fixture
def about(request: pytest.FixtureRequest) -> str:
    """The mode this run is about: that of the one `--variant` asked for; "" = every mode."""
    chosen = {VARIANTS[name].mode for name in request.config.getoption("dataplane") or ()}
    return chosen.pop() if len(chosen) == 1 else ""


def test_switch_loses_no_connection_and_leaves_no_trace(cluster: Cluster, about: str) -> None:
    """Open connections go on, new ones never fail, UDP goes on, and the old mode is gone (Z3, B15).

    Each mode after each other that can run here: what a node holds then is the same whichever mode
    was before, and nothing of any in the end.
    """
    modes = [mode for mode in MODES if can_run(mode)]
    way, site = tour(modes, about), Site(cluster, modes[0])
    clean = site.held()
    wrong: list[str] = []
    held: dict[str, Mapping[str, tuple[str, ...]]] = {}
    with site.agent:
        held[way[0]] = site.held()
        for before, after in itertools.pairwise(way):
            begun = time.monotonic()
            wrong += step(site, before, after)
            now = _settled(site, held.get(after))
            wrong += _differences(f"{before} -> {after}", held.setdefault(after, now), now)
            print(f"{before} -> {after}: {time.monotonic() - begun:.1f} s")
    wrong += _differences("in the end", clean, site.held())
    assert wrong == []


def _ours(held: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Pins of ours; the file system has some of its own."""
    return [pin for pin in held["pin"] if not pin.endswith(".debug")]


def _settled(
    site: Site, expected: Mapping[str, tuple[str, ...]] | None
) -> Mapping[str, tuple[str, ...]]:
    """What the node holds, once what was removed with the old mode's is back."""
    deadline = time.monotonic() + 3.0
    while True:
        now = site.held()
        if now == expected or (expected is None) or time.monotonic() > deadline:
            return now
        time.sleep(0.1)


def _differences(
    what: str, one: Mapping[str, tuple[str, ...]], other: Mapping[str, tuple[str, ...]]
) -> list[str]:
    return [
        f"{what}: {kind}: {sorted(set(one[kind]) ^ set(other[kind]))}"
        for kind in one
        if sorted(one[kind]) != sorted(other[kind])
    ]


OTHER = "iptables"
"""A mode that every machine of developers has."""


@pytest.fixture
def not_about_a_third(about: str) -> None:
    """For tests of these two modes alone: a run about another does without them."""
    if about not in ("", "ebpf", OTHER):
        pytest.skip(f"is about ebpf and {OTHER}, not about {about}")


@pytest.mark.usefixtures("not_about_a_third")
@pytest.mark.parametrize(("before", "after"), [("ebpf", OTHER), (OTHER, "ebpf")])
def test_start_in_another_mode_is_a_switch_too(cluster: Cluster, before: str, after: str) -> None:
    """What a gone agent left goes on until the new one serves, and until its connections end."""
    if not can_run(before) or not can_run(after):
        pytest.skip(f"{before} or {after} cannot run here: see `ebpf-svc check`")
    site = Site(cluster, before)
    settings = site.agent.settings
    with Agent(site.node, settings, mode=after):
        alone = site.held()
    site.agent.start()
    with ExitStack() as stack:
        loads = site.load(stack, is_lossy=True)
        with ExitStack() as open_connections:
            connections = Pings(site.open(open_connections, Protocol.TCP))
            open_connections.callback(connections.stop)
            connections.more()
            site.agent.stop()
            connections.more()
            agent = stack.enter_context(Agent(site.node, settings, mode=after))
            connections.more(40)
            lost = connections.stop()
        eventually(
            lambda: _differences("", alone, site.held()), until=lambda two: not two, within_s=20
        )
        assert agent.status()["mode"] == after
        assert wrong_in(lost, loads, losing=site.losing(before, after)) == []


@pytest.mark.usefixtures("not_about_a_third")
def test_mode_that_cannot_run_is_told_everywhere(cluster: Cluster) -> None:
    """Log, status, metric and an Event on the Node; the next mode serves, nothing is left of it."""
    site = Site(cluster, "auto")
    with site.api_server() as server, site.without_cgroup(server) as agent:
        mode = agent.status()["mode"]
        assert mode in MODES[1:]
        assert "nowhere" in agent.status()["refused"]["ebpf"]
        (line,) = [line for line in agent.log_tail(1000).splitlines() if "mode.refused" in line]
        assert '"mode": "ebpf"' in line
        metrics = site.page("/metrics")
        assert f'ebpf_svc_mode{{mode="{mode}"}} 1.0' in metrics
        assert 'ebpf_svc_mode_refused{mode="ebpf"' in metrics
        assert site.page("/proxyMode") == mode
        events = {each["reason"]: each for each in server.created}
        event = eventually(lambda: events.get("ProxyModeFallback"))
        assert event["regarding"]["name"] == "node1"
        assert "ebpf: " in event["note"]
        assert "nowhere" in agent.command("show")
        eventually(
            site.held, until=lambda held: not held["clsact"] and not _ours(held), within_s=30
        )


@pytest.mark.usefixtures("not_about_a_third")
def test_named_mode_that_cannot_run_ends_the_start(cluster: Cluster) -> None:
    """With what is missing; whoever names a mode may have a reason, so nothing else serves."""
    agent = Site(cluster, "ebpf").without_cgroup()
    with pytest.raises(AgentError, match="nowhere"):
        agent.start()
    agent.cleanup()


@pytest.mark.usefixtures("not_about_a_third")
def test_mode_that_cannot_run_is_refused_by_the_switch(cluster: Cluster) -> None:
    """The command says why and ends with 1; what serves goes on and nothing was touched."""
    site = Site(cluster, OTHER)
    with site.without_cgroup() as agent:
        held = site.held()
        with pytest.raises(CommandError, match="nowhere") as caught:
            agent.command("switch", "ebpf")
        assert caught.value.code == 1
        assert agent.status()["mode"] == OTHER
        assert _differences("", held, site.held()) == []


@pytest.mark.usefixtures("not_about_a_third")
def test_mode_in_the_settings_changes_while_the_agent_runs(cluster: Cluster) -> None:
    """An edit of the file is a switch; one of something else leaves a mode chosen by hand."""
    site = Site(cluster, OTHER)
    agent = Agent(
        site.node, site.agent.settings.model_copy(update={"mode": Mode(OTHER)}), mode=None
    )

    def write(**fields: object) -> None:
        agent.config.write_text(json.dumps({**json.loads(agent.config.read_text()), **fields}))

    with agent, ExitStack() as stack:
        pid, loads = agent.status()["pid"], site.load(stack, is_lossy=True)
        write(mode="ebpf")
        eventually(lambda: agent.status()["mode"], until="ebpf".__eq__, within_s=20)
        agent.command("switch", OTHER, "--drain-s", "0")
        write(resync_period_s=20)
        eventually(lambda: agent.log_tail().count("config.changed"), until=(2).__eq__)
        assert (agent.status()["mode"], agent.status()["pid"]) == (OTHER, pid)
        assert wrong_in([], loads, losing=site.losing(OTHER, "ebpf")) == []
