"""One mode after another: order, failures, connections that take their time, an agent that dies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_svc import choice as choice_module
from ebpf_svc.changeover import Changeover, Serving
from ebpf_svc.choice import Site
from ebpf_svc.config import Mode, Settings
from ebpf_svc.control import Progress, Step
from ebpf_svc.errors import ApplyError, DataplaneError
from ebpf_svc.model.desired import DesiredState
from tests.lib.dataplanes import Machine
from tests.lib.plans import make_frontend, make_plan
from tests.lib.waiting import eventually

ALL = ("ebpf", "nftables", "ipvs", "iptables", "userspace")
WEB = make_plan("web")
API = make_plan("api", make_frontend("10.96.0.2"))
ONE = DesiredState({WEB.key: WEB}, revision=1)
TWO = DesiredState({WEB.key: WEB, API.key: API}, revision=2)


class Agent:
    """What of an agent takes part in a switch, with a loop that applies when woken."""

    def __init__(
        self, machine: Machine, root: Path, mode: str = "ebpf", **settings: object
    ) -> None:
        options = {"ebpf": {"bpffs": root / "bpf"}, "run_dir": root / "run", **settings}
        self.machine = machine
        self.settings = Settings.model_validate({"mode": mode, **options})
        self.site = Site(self.settings, machine.make)
        self.changes: list[str] = []
        self.serving = Serving(lambda choice: self.changes.append(choice.dataplane.name))
        self.now_s = 0.0
        self.changeover = Changeover(
            self.site, self.serving, wake=self.wake, tick_s=0.01, clock=lambda: self.now_s
        )
        self.desired = ONE
        self.is_asleep = False
        self._woken, self._ended = threading.Event(), False
        self._loop = threading.Thread(target=self._run)
        self.serving.begin(self.site.open_first((mode,)))
        self.told: list[Progress] = []
        self._loop.start()
        self.changeover.start()

    def wake(self) -> None:
        if not self.is_asleep:
            self._woken.set()

    def sync(self, desired: DesiredState) -> None:
        self.desired = desired
        self._woken.set()
        eventually(lambda: self.serving.desired is desired)

    def _run(self) -> None:
        while self._woken.wait() and not self._ended:
            self._woken.clear()
            self.serving.apply(self.desired, resync=True)

    def switch(self, *modes: str, drain_s: float | None = None) -> list[Progress]:
        """Begin a switch; what is told of it is appended to as it comes."""
        told: list[Progress] = []
        self.changeover.switch(modes, drain_s=drain_s, tell=told.append)
        return told

    def die(self) -> None:
        """End as a crash would: the kernel stays as it is."""
        self.changeover.stop()
        self._ended = True
        self._woken.set()
        self._loop.join()
        self.site.release()


@pytest.fixture(autouse=True)
def _touch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "mount_bpffs", lambda settings: None)
    monkeypatch.setattr(choice_module, "MODES", ALL)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def agent(machine: Machine, tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(machine, tmp_path)
    agent.sync(ONE)
    yield agent
    agent.die()


def steps(told: list[Progress]) -> list[str]:
    return list(dict.fromkeys(f"{each.mode} {each.step}".strip() for each in told))


def ended(told: list[Progress]) -> Progress:
    return eventually(
        lambda: told and told[-1], until=lambda last: last and last.step in ("done", "failed")
    )


def test_new_one_serves_before_the_old_one_lets_go(agent: Agent, machine: Machine) -> None:
    """Opened, filled, handed over, and only then is the old one touched."""
    machine.log.clear()
    told = agent.switch("nftables")
    ended(told)
    order = [
        *("nftables open", "nftables apply"),
        *("ebpf retire", "ebpf cleanup", "nftables apply"),
    ]
    eventually(lambda: machine.log, until=order.__eq__)
    assert machine.modes() == {"nftables"}
    assert agent.changes == ["ebpf", "nftables"]
    assert steps(told) == [
        *("nftables opening", "nftables filling", "nftables serving", "ebpf done"),
    ]


def test_what_changes_while_it_is_filled_is_not_lost(agent: Agent, machine: Machine) -> None:
    """The last apply before the switch is the loop's own, of the newest state."""
    agent.desired = TWO
    ended(agent.switch("nftables"))
    assert set(machine.held["nftables"]) == set(TWO.view())


@pytest.mark.parametrize(
    ("lacks", "refuses", "reason"),
    [
        ("nft: not installed", None, "nft: not installed"),
        ("", DataplaneError("no memory"), "no memory"),
        ("", OSError("no memory"), "no memory"),
        ("", ApplyError("shop/web", "port taken"), "1 service ports cannot be served: shop/web"),
    ],
)
def test_new_one_that_fails_leaves_the_old_one_and_no_trace(
    agent: Agent, machine: Machine, lacks: str, refuses: Exception | None, reason: str
) -> None:
    """Whether it does not open or cannot be filled; the reason is told."""
    if lacks:
        machine.lacks["nftables"] = lacks
    if refuses:
        machine.refuses["nftables"] = refuses
    last = ended(told := agent.switch("nftables"))
    assert (last.step, "mode nftables: " + reason in last.detail) == (Step.FAILED, True), told
    assert "ebpf goes on" in last.detail
    assert machine.modes() == {"ebpf"}
    assert "ebpf retire" not in machine.log
    assert (agent.serving.name, agent.changes) == ("ebpf", ["ebpf"])


@pytest.mark.parametrize("wrong", [DataplaneError("full"), ApplyError("shop/api", "full")])
def test_new_one_that_fails_at_the_last_moment_is_taken_back(
    agent: Agent, machine: Machine, wrong: Exception
) -> None:
    """Filled once, it is refused what came since: the loop goes on with the old one."""
    agent.is_asleep = True
    told = agent.switch("nftables")
    eventually(lambda: machine.log[-1] == "nftables apply")
    machine.refuses["nftables"] = wrong
    agent.is_asleep = False
    agent.wake()
    assert "full" in ended(told).detail
    agent.sync(TWO)
    assert set(machine.held["ebpf"]) == set(TWO.view())
    assert machine.modes() == {"ebpf"}


def test_old_one_is_asked_until_its_connections_ended(agent: Agent, machine: Machine) -> None:
    """It is not cleaned before; meanwhile each change goes to the new one."""
    machine.busy.add("ebpf")
    told = agent.switch("nftables", drain_s=60)
    eventually(lambda: Progress(Step.DRAINING, "ebpf", "0 s of at most 60 s") in told)
    agent.sync(TWO)
    assert machine.modes() == {"ebpf", "nftables"}
    assert set(machine.held["nftables"]) == set(TWO.view())
    assert "ebpf cleanup" not in machine.log
    machine.busy.clear()
    assert ended(told).step is Step.DONE
    assert machine.modes() == {"nftables"}


def test_connections_that_take_too_long_are_cut(agent: Agent, machine: Machine) -> None:
    """The limit of the request counts, else that of the settings."""
    machine.busy.add("ebpf")
    told = agent.switch("nftables", drain_s=60)
    eventually(lambda: told and told[-1].step is Step.DRAINING)
    agent.now_s = 59.0
    eventually(lambda: "59 s of at most 60 s" in told[-1].detail)
    agent.now_s = 60.0
    assert ended(told).step is Step.DONE
    assert machine.modes() == {"nftables"}


def test_one_that_cannot_let_go_is_removed_at_once(agent: Agent, machine: Machine) -> None:
    """New connections would go by what it last knew; for once those that are open pay."""
    machine.clinging.add("ebpf")
    told = agent.switch("nftables", drain_s=60)
    assert ended(told) == Progress(Step.DONE, "ebpf", "nothing of it is left")
    assert "cannot be opened" in told[-2].detail
    assert machine.modes() == {"nftables"}


def test_mode_that_drains_may_serve_again(agent: Agent, machine: Machine) -> None:
    """An operator who changes their mind waits for nothing; the other one goes."""
    machine.busy.add("ebpf")
    first = agent.switch("nftables")
    eventually(lambda: first and first[-1].step is Step.DRAINING)
    second = agent.switch("ebpf")
    assert ended(second).step is Step.DONE
    assert ended(first).detail == "is to serve again"
    assert (agent.serving.name, machine.modes()) == ("ebpf", {"ebpf"})
    assert "ebpf cleanup" not in machine.log


def test_mode_that_cannot_serve_again_goes_on_draining(agent: Agent, machine: Machine) -> None:
    """Its connections are as good as before it was tried."""
    machine.busy.add("ebpf")
    first = agent.switch("nftables")
    eventually(lambda: first and first[-1].step is Step.DRAINING)
    machine.lacks["ebpf"] = "BTF: gone"
    assert ended(agent.switch("ebpf")).step is Step.FAILED
    assert machine.modes() == {"ebpf", "nftables"}
    machine.busy.clear()
    eventually(machine.modes, until={"nftables"}.__eq__)


def test_mode_that_serves_is_not_touched(agent: Agent, machine: Machine) -> None:
    """Asked for by name, or as the best that can run."""
    machine.log.clear()
    for modes in (("ebpf",), ALL):
        assert ended(agent.switch(*modes)) == Progress(Step.DONE, "ebpf", "serves already")
    assert machine.log == []


def test_next_that_can_run_serves_with_the_reasons_of_the_others(
    agent: Agent, machine: Machine
) -> None:
    """As at the start."""
    machine.lacks["nftables"] = "no nft"
    ended(agent.switch("nftables", "ipvs"))
    assert (agent.serving.name, agent.serving.refused) == ("ipvs", {"nftables": "no nft"})


def test_cleanup_that_fails_is_told_and_tried_again(agent: Agent, machine: Machine) -> None:
    """What serves is not in question any more."""
    machine.stuck.add("ebpf")
    last = ended(agent.switch("nftables"))
    assert (last.step, last.mode) == (Step.FAILED, "ebpf")
    machine.stuck.clear()
    agent.now_s += 31.0
    eventually(machine.modes, until={"nftables"}.__eq__)


def test_other_mode_in_the_settings_is_a_switch(agent: Agent, machine: Machine) -> None:
    """SIGHUP, or the file changed; a change of something else leaves a mode chosen by hand."""
    agent.changeover.take(agent.settings.model_copy(update={"mode": Mode.IPVS}))
    eventually(machine.modes, until={"ipvs"}.__eq__)
    ended(agent.switch("nftables"))
    changed = {"mode": Mode.IPVS, "masquerade_all": True}
    agent.changeover.take(agent.settings.model_copy(update=changed))
    ended(agent.switch("nftables"))
    assert agent.changes == ["ebpf", "ipvs", "nftables"]


def test_agent_killed_half_way_leaves_it_to_the_next(machine: Machine, tmp_path: Path) -> None:
    """Whichever mode the next one is started in: it serves first, then the others go (Z3, B15)."""
    machine.busy.add("ebpf")
    first = Agent(machine, tmp_path)
    first.sync(ONE)
    told = first.switch("nftables")
    eventually(lambda: told and told[-1].step is Step.DRAINING)
    first.die()
    assert machine.modes() == {"ebpf", "nftables"}
    machine.busy.clear()
    machine.log.clear()
    second = Agent(machine, tmp_path, "ipvs")
    try:
        second.sync(ONE)
        second.changeover.clean_leftovers()
        eventually(machine.modes, until={"ipvs"}.__eq__)
        at = machine.log.index
        assert at("ipvs apply") < at("ebpf retire") < at("ebpf cleanup")
        assert at("ipvs apply") < at("nftables retire") < at("nftables cleanup")
    finally:
        second.die()


def test_agent_that_ends_gives_up_what_is_not_done(agent: Agent, machine: Machine) -> None:
    """A loop that applies no more cannot hand over; the new one is removed."""
    agent.is_asleep = True
    told = agent.switch("nftables")
    eventually(lambda: machine.log[-1] == "nftables apply")
    agent.changeover.stop()
    assert ended(told).detail.startswith("mode nftables: given up")
    assert machine.modes() == {"ebpf"}


def test_nothing_is_switched_before_anything_is_served(machine: Machine, tmp_path: Path) -> None:
    """There would be nothing to fill the new one with (M4)."""
    agent = Agent(machine, tmp_path)
    try:
        assert "has not synced" in ended(agent.switch("nftables")).detail
        assert agent.serving.name == "ebpf"
    finally:
        agent.die()


def test_dataplane_that_serves_is_asked_for_too_early() -> None:
    """An error of ours, not a crash."""
    with pytest.raises(DataplaneError):
        _ = Serving().dataplane
