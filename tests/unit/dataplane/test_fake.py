"""The fake obeys the law of the seam, so that what is tested against it holds elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.dataplane.base import Check, Dataplane
from ebpf_svc.dataplane.fake import FakeDataplane, Operation
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.model.desired import DesiredState, FrontendKey, PlanKey
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import ServicePortName
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from tests.lib.builders import make_endpoints, make_service, make_snapshot, ready
from tests.lib.strategies import desired_sequences, desired_states


def opened(kernel=None) -> FakeDataplane:
    fake = FakeDataplane(kernel)
    fake.open()
    return fake


def planned(*objects) -> DesiredState:
    return Planner(PlanOptions()).plan(make_snapshot(*objects))


def plan_key(name: str) -> PlanKey:
    return PlanKey(ServicePortName("default", name, "", Protocol.TCP), Family.V4)


WEB = make_service("web", cluster_ip="10.96.0.10")
API = make_service("api", cluster_ip="10.96.0.20")
WEB_KEY = FrontendKey("10.96.0.10", 80, Protocol.TCP)
API_KEY = FrontendKey("10.96.0.20", 80, Protocol.TCP)


def test_fake_fits_the_seam():
    """A Dataplane is what a SyncLoop can drive."""
    dataplane: Dataplane = FakeDataplane()

    assert dataplane.name == "fake"


@settings(max_examples=15, deadline=None)
@given(desired_sequences())
def test_applied_state_is_read_back_and_writes_nothing_twice(states):
    """The law: read(apply(d)) == d, and a second apply writes nothing."""
    fake = opened()
    for state in states:
        report = fake.apply(state)
        assert (fake.read(), report.failed) == (state.view(), ())
        assert fake.apply(state).writes == 0
        assert fake.apply(DesiredState(dict(state.plans))).writes == 0
        assert fake.apply(state, resync=True).repaired == ()


@settings(max_examples=15, deadline=None)
@given(desired_sequences(), st.data())
def test_state_holds_once_failures_are_over(states, data):
    """Whatever failed in between, what is held in the end is the last state."""
    fake = opened()
    for state in states:
        failing = (
            data.draw(st.lists(st.sampled_from(sorted(state.plans)), max_size=2))
            if (state.plans)
            else []
        )
        for key in failing:
            fake.fail(key, times=1)
        report = fake.apply(state)
        held = fake.read()
        for key, plan in state.plans.items():
            if str(key) not in {error.service for error in report.failed}:
                for frontend in plan.frontends:
                    assert held[frontend.key] == state.view()[frontend.key]
    while fake.apply(states[-1]).failed:
        pass

    assert fake.read() == states[-1].view()


@settings(max_examples=15, deadline=None)
@given(desired_states(), desired_states())
def test_restart_takes_over_what_an_earlier_run_left(before, after):
    """The first apply after a restart keeps what is right and removes what nobody wants."""
    first = opened()
    first.apply(before)
    first.close()

    second = opened(first.kernel)
    unchanged = {key for key, view in before.view().items() if after.view().get(key) == view}
    second.apply(after)

    assert second.read() == after.view()
    assert not unchanged & {operation.key for operation in second.journal}


@settings(max_examples=15, deadline=None)
@given(desired_states())
def test_cleanup_leaves_nothing(state):
    """After cleanup the host holds nothing of ours, also without open."""
    fake = opened()
    fake.apply(state)
    FakeDataplane(fake.kernel).cleanup()

    assert fake.read() == {}


def test_failing_service_port_does_not_hold_back_others():
    """One bad frontend is reported and retried; its neighbour is served at once."""
    fake = opened()
    state = planned(WEB, API)
    fake.fail(plan_key("api"))

    report = fake.apply(state)

    assert [error.service for error in report.failed] == [str(plan_key("api"))]
    assert set(fake.read()) == {WEB_KEY}
    assert fake.apply(state).failed
    fake.heal(plan_key("api"))
    assert fake.apply(state).writes == 1
    assert set(fake.read()) == {WEB_KEY, API_KEY}


def test_failed_deletion_is_retried():
    """A frontend that could not be removed is still known, and removed later."""
    fake = opened()
    fake.apply(planned(WEB))
    fake.fail(plan_key("web"), times=1)

    assert len(fake.apply(DesiredState()).failed) == 1
    assert set(fake.read()) == {WEB_KEY}
    assert fake.apply(DesiredState()).writes == 1
    assert fake.read() == {}


def test_writes_count_only_what_differs():
    """One changed service of two is one write, whatever the other looks like."""
    fake = opened()
    fake.apply(planned(WEB, API))
    report = fake.apply(planned(WEB, API, make_endpoints("web", ready("10.1.0.1"))))

    assert (report.writes, report.changed, report.details) == (1, 1, {"frontends": 1})
    assert fake.journal[-1] == Operation("put", WEB_KEY)


def test_frontend_that_moves_is_never_missing():
    """A cluster IP handed from one service to another is not deleted in between."""
    fake = opened()
    fake.apply(planned(WEB))
    fake.journal.clear()
    fake.apply(planned(replace(API, cluster_ips=WEB.cluster_ips)))

    assert "delete" not in {operation.verb for operation in fake.journal}
    assert set(fake.read()) == {WEB_KEY}


def test_frontend_lent_to_another_comes_back():
    """A plan that returns unchanged is written again if another had its frontend meanwhile."""
    fake = opened()
    original = planned(WEB)
    fake.apply(original)
    fake.fail(plan_key("web"), times=1)
    fake.apply(
        planned(
            replace(WEB, cluster_ips=("10.96.0.30",)), replace(API, cluster_ips=WEB.cluster_ips)
        )
    )
    fake.apply(original)

    assert fake.read() == original.view()


def test_leftover_of_a_failing_service_port_goes_with_it():
    """What an earlier run left for a service that fails and is then deleted does not stay."""
    first = opened()
    first.apply(planned(WEB))
    fake = opened(first.kernel)
    fake.fail(plan_key("web"), times=1)
    fake.apply(planned(WEB))
    fake.apply(DesiredState())

    assert fake.read() == {}


def test_drift_is_repaired_by_resync_alone():
    """What others delete, change or add is put right at the next read-back, and named."""
    fake = opened()
    state = planned(WEB, API)
    fake.apply(state)
    web = fake.read()[WEB_KEY]
    fake.lose(WEB_KEY)
    fake.plant(API_KEY, replace(web, affinity_s=7))
    fake.plant(FrontendKey("10.96.0.99", 80, Protocol.TCP), web)

    assert fake.apply(state).writes == 0
    report = fake.apply(state, resync=True)

    assert sorted(report.repaired) == [
        "10.96.0.10:80/TCP was missing",
        "10.96.0.20:80/TCP was changed",
        "10.96.0.99:80/TCP was foreign",
    ]
    assert report.writes == 3
    assert fake.read() == state.view()


def test_host_that_cannot_is_refused_with_what_mends_it():
    """Opening on a host that lacks something says what, in the check's own words."""
    fake = FakeDataplane(checks=[Check("memory", False, "none left", "buy more")])

    with pytest.raises(UnsupportedHost) as caught:
        fake.open()
    assert caught.value.missing == ("memory: none left (buy more)",)


def test_apply_before_open_is_refused():
    """A backend that was not opened must not write."""
    with pytest.raises(DataplaneError):
        FakeDataplane().apply(DesiredState())
