"""The relay where there is no netfilter: it listens at the addresses of the services themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_svc.dataplane.userspace import probes
from ebpf_svc.dataplane.userspace.dataplane import UserspaceDataplane
from ebpf_svc.model.desired import DesiredState, FrontendKind, ServicePlan
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Host, Pod
from ebpf_svc.testbed.traffic import Target, ask, connection, serve
from tests.behaviour.test_law import LAWS
from tests.lib.law import check_law
from tests.lib.plans import make_backend, make_frontend, make_plan
from tests.lib.strategies import snapshot_sequences
from tests.lib.waiting import eventually

CLUSTER_IP, VIP, PORT = "10.96.0.1", "198.18.128.1", 8080


class Site:
    """One node with two pods; its dataplane runs in this process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        (self.node,) = cluster.nodes
        self.web, self.shell = self.node.add_pod("web1"), self.node.add_pod("shell1")
        serve(self.web, tcp=[PORT], udp=[PORT])
        manifests = cluster.folder / "manifests"
        manifests.mkdir()
        self.settings = cluster.settings(self.node, manifests)

    def outcomes(self, host: Host, address: str = CLUSTER_IP) -> set[str]:
        """How TCP and UDP requests of a host end."""
        return {
            answer.server or answer.outcome.value
            for protocol in (Protocol.TCP, Protocol.UDP)
            for answer in ask(host, address, 80, protocol, timeout_s=0.5, count=2)
        }


@pytest.fixture(scope="module")
def site(no_leftovers: None, artifact_cache: Path) -> Iterator[Site]:
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        cluster.route_services(cluster.nodes[0])
        yield Site(cluster)


@pytest.fixture(autouse=True)
def _without_netfilter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "netfilter_missing", lambda: "there is none")


@contextmanager
def applied(site: Site, *plans: ServicePlan) -> Iterator[UserspaceDataplane]:
    with site.node.namespace.entered():
        made = UserspaceDataplane(site.settings)
        made.open()
        try:
            assert made.apply(_state(*plans)).failed == ()
            yield made
        finally:
            made.cleanup()


def _state(*plans: ServicePlan) -> DesiredState:
    return DesiredState({plan.key: plan for plan in plans})


def _plans(pod: Pod, *, local: bool = True, **options: object) -> tuple[ServicePlan, ...]:
    """A service in TCP and UDP, with a cluster IP and a VIP."""
    backend = make_backend(pod.address(Family.V4), PORT, in_local=local)
    return tuple(
        make_plan(
            "web",
            make_frontend(CLUSTER_IP, 80, protocol),
            make_frontend(
                VIP,
                80,
                protocol,
                kind=FrontendKind.LOAD_BALANCER,
                **options,  # type: ignore[arg-type]
            ),
            backends=[backend],
        )
        for protocol in ("TCP", "UDP")
    )


@LAWS
@given(data=st.data())
def test_law_holds_without_netfilter(site: Site, data: st.DataObject) -> None:
    """What is applied is read back and applied once; cleanup() leaves nothing."""
    planner = Planner(PlanOptions.from_settings(site.settings))
    states = [planner.plan(each) for each in data.draw(snapshot_sequences())]
    with site.node.namespace.entered():
        check_law(lambda: UserspaceDataplane(site.settings), site.node, states)


def test_everyone_is_served_without_netfilter(site: Site) -> None:
    """Pods, the node and the outside reach cluster IP and VIP, TCP and UDP (P1)."""
    with applied(site, *_plans(site.web)):
        for host in (site.shell, site.node, site.cluster.client, site.web):
            for address in (CLUSTER_IP, VIP):
                assert site.outcomes(host, address) == {"web1"}, (host, address)


def test_service_without_endpoints_is_refused(site: Site) -> None:
    """The kernel itself refuses: the address is its own, and nobody listens (P2)."""
    empty = [
        make_plan("web", make_frontend(CLUSTER_IP, 80, protocol), backends=[])
        for protocol in ("TCP", "UDP")
    ]
    with applied(site, *empty):
        for host in (site.shell, site.node, site.cluster.client):
            assert site.outcomes(host) == {"refused"}, host


def test_outside_hears_nothing_without_local_endpoints(site: Site) -> None:
    """eTP Local: the outside is dropped, pods and the node are served (P4, P5)."""
    with applied(site, *_plans(site.web, local=False, local_for=Sources.EXTERNAL)) as made:
        assert site.outcomes(site.cluster.client, VIP) == {"timeout"}
        for host in (site.shell, site.node):
            assert site.outcomes(host, VIP) == {"web1"}, host
        # The doors that are open already take the new judgement.
        made.apply(_state(*_plans(site.web, local_for=Sources.EXTERNAL)))
        assert site.outcomes(site.cluster.client, VIP) == {"web1"}


@pytest.mark.parametrize(
    ("ranges", "allowed"),
    [
        (["203.0.113.0/24"], "client"),
        (["203.0.113.0/24", "192.0.2.7/32"], "client"),
        (["10.244.0.0/16"], "shell"),
        (["192.0.2.0/24"], ""),
    ],
)
def test_source_ranges_are_kept_to(site: Site, ranges: list[str], allowed: str) -> None:
    """Sources outside the ranges are dropped at the VIP alone, pods as well (P10)."""
    with applied(site, *_plans(site.web, source_ranges=ranges)):
        for name, host in (("client", site.cluster.client), ("shell", site.shell)):
            assert site.outcomes(host, VIP) == ({"web1"} if name == allowed else {"timeout"})
            assert site.outcomes(host) == {"web1"}


def test_lost_route_comes_back(site: Site) -> None:
    """Someone deletes the route to a service: the next read-back puts it there again."""
    plans = _plans(site.web)
    with applied(site, *plans) as made:
        site.node.run(["ip", "route", "delete", "local", CLUSTER_IP, "table", "local"])
        assert site.outcomes(site.shell) != {"web1"}
        report = made.apply(_state(*plans), resync=True)
        assert report.repaired == (f"route to {CLUSTER_IP} was missing",)
        assert site.outcomes(site.shell) == {"web1"}


def test_retired_relay_carries_on_what_it_has(site: Site) -> None:
    """No new connection is taken, open ones go on; it is done when they have ended."""
    with applied(site, *_plans(site.web)) as made:
        target = Target(CLUSTER_IP, 80, Protocol.TCP)
        with connection(site.shell, target) as conn:
            assert conn.ping().server == "web1"
            assert not made.retire()
            assert not made.retire()
            assert site.outcomes(site.shell) == {"refused"}
            assert conn.ping().server == "web1"
        eventually(made.retire)
