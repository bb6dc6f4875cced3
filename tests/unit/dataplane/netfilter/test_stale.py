"""Which tracked UDP flows are stale, and when anybody looks."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.netfilter import stale
from ebpf_svc.dataplane.netfilter.stale import StaleFlows
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host.conntrack_table import Entry
from ebpf_svc.model.desired import DesiredState, ServicePlan
from ebpf_svc.model.net import Family
from tests.lib.plans import make_backend, make_desired, make_frontend, make_plan

VIP, NODE_PORT = ("10.96.0.1", 53), ("192.168.0.11", 30053)
POD_A, POD_B = ("10.1.0.1", 8080), ("10.1.0.2", 8080)


class Table:
    """Stands for the kernel's table of one family."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flows: list[tuple[tuple[str, int], tuple[str, int]]] = []
        self.looks = 0
        self.broken = False
        monkeypatch.setattr(stale.conntrack_table, "entries", self._entries)
        monkeypatch.setattr(stale.conntrack_table, "delete", self._delete)

    def _entries(self, family, protocol, keep):
        assert protocol == "UDP"
        self.looks += 1
        if self.broken:
            raise DataplaneError("no table")
        found = [flow for flow in self.flows if family is Family.V4 and keep(*flow)]
        return [Entry(*flow, handle=repr(flow).encode()) for flow in found]

    def _delete(self, family, doomed):
        for entry in doomed:
            self.flows.remove((entry.destination, entry.answers_from))
        return len(doomed)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    return Table(monkeypatch)


def dns(*backends: str, **options: object) -> ServicePlan:
    frontends = [make_frontend(*VIP, "UDP"), make_frontend(*NODE_PORT, "UDP")]
    return make_plan("dns", *frontends, backends=backends, **options)


def reconcile(flows: StaleFlows, *plans: ServicePlan) -> int:
    desired: DesiredState = make_desired(*plans)
    return sum(done.deleted for done in flows.reconcile(desired))


def test_flow_to_a_gone_endpoint_goes_and_others_stay(table):
    """C7: an entry goes when its answers come from nobody that serves the frontend it was sent to;
    the same for node ports (C5).
    """
    flows = StaleFlows([Family.V4])
    reconcile(flows, dns("10.1.0.1", "10.1.0.2"))
    table.flows = [(VIP, POD_A), (VIP, POD_B), (NODE_PORT, POD_A), (("8.8.8.8", 53), POD_A)]
    assert reconcile(flows, dns("10.1.0.2")) == 2
    assert table.flows == [(VIP, POD_B), (("8.8.8.8", 53), POD_A)]


def test_flow_from_before_there_was_an_endpoint_goes(table):
    """C7: a flow that was never translated answers from the frontend itself, and starts anew."""
    flows = StaleFlows([Family.V4])
    table.flows = [(VIP, VIP)]
    assert reconcile(flows, dns("10.1.0.1")) == 1


def test_same_endpoint_on_another_port_is_another_endpoint(table):
    """C7: the port counts as much as the address."""
    flows = StaleFlows([Family.V4])
    table.flows = [(VIP, ("10.1.0.1", 53))]
    assert reconcile(flows, dns("10.1.0.1")) == 1


def test_flows_to_an_endpoint_that_still_serves_stay(table):
    """C5: draining endpoints keep their flows, whatever ready and the policies say."""
    flows = StaleFlows([Family.V4])
    reconcile(flows, dns("10.1.0.1", "10.1.0.2"))
    table.flows = [(VIP, POD_A)]
    draining = make_backend("10.1.0.1", in_cluster=False)
    plan = make_plan(
        "dns", make_frontend(*VIP, "UDP"), backends=[draining, make_backend("10.1.0.3")]
    )
    assert reconcile(flows, plan) == 0
    assert table.flows == [(VIP, POD_A)]


def test_service_without_endpoints_or_gone_loses_its_flows(table):
    """Q1: with the last endpoint, or with the service, every flow goes."""
    flows = StaleFlows([Family.V4])
    reconcile(flows, dns("10.1.0.1"))
    table.flows = [(VIP, POD_A)]
    assert reconcile(flows, dns()) == 1
    reconcile(flows, dns("10.1.0.1"))
    table.flows = [(VIP, POD_A), (NODE_PORT, POD_A)]
    assert reconcile(flows) == 2


def test_only_changes_of_udp_look_at_the_table(table):
    """C1, C4: TCP and states without a change cost no look; the first state always does (C2)."""
    flows = StaleFlows([Family.V4, Family.V6])
    udp, tcp = dns("10.1.0.1"), make_plan("web", backends=["10.1.0.1"])
    reconcile(flows, udp, tcp)
    assert table.looks == 1
    reconcile(flows, udp, make_plan("web", backends=["10.1.0.9"]))
    reconcile(flows, dns("10.1.0.1"))
    assert table.looks == 1


def test_table_that_cannot_be_read_is_looked_at_again(table):
    """C3: the change is not forgotten."""
    flows = StaleFlows([Family.V4])
    table.flows, table.broken = [(VIP, VIP)], True
    plan = dns("10.1.0.1")
    assert reconcile(flows, plan) == 0
    table.broken = False
    assert reconcile(flows, plan) == 1
