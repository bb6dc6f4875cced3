"""What an operator is told: settings that do not fit, wrong objects, full tables, a kube-proxy."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from ebpf_svc.config import DetectLocal, DetectLocalMode, KubernetesSettings, Settings
from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.dataplane.fake import FakeDataplane
from ebpf_svc.dataplane.inspect import MapFill
from ebpf_svc.errors import ConfigError, DataplaneError, EbpfSvcError
from ebpf_svc.events import Event, EventRecorder
from ebpf_svc.host import kubeproxy
from ebpf_svc.host.kubeproxy import Sign
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.snapshot import NodeFacts, Problem, Snapshot
from ebpf_svc.notices import FILL_S, NodeCheck, Notices, say_who_else
from ebpf_svc.sync import Synced

NODE_CIDR = DetectLocal(mode=DetectLocalMode.NODE_CIDR)
BROKEN = Problem("", "Service shop/web", "spec.ports", "too many")
NODE = Problem("", "Node node1", "", "odd")


def node(*addresses: str, pods: tuple[str, ...] = ()) -> Snapshot:
    return Snapshot(NodeFacts("node1", addresses, pod_cidrs=pods))


class Sink:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def send(self, event: Event) -> None:
        self.events.append(event)

    def told(self) -> list[tuple[str, str, str]]:
        return [(str(each.regarding), each.reason, each.note) for each in self.events]


def test_doubtful_settings_are_told_once_and_again_when_the_node_is_known() -> None:
    """A6: kube-proxy logs them too, and goes on."""
    settings = Settings(bind_address="2001:db8::9", node_port_addresses=("primary",))
    check = NodeCheck(settings, ())
    with capture_logs() as lines:
        for snapshot in (node(), node(), node("192.0.2.1"), node("192.0.2.2")):
            check.queued(snapshot)
    said = [line["reason"] for line in lines if line["event"] == "config.doubtful"]
    assert [reason.partition(" ")[0] for reason in said] == ["bindAddress"]


def test_cluster_cidrs_of_the_family_the_node_lacks_end_the_agent() -> None:
    """A6: nothing it did would be right."""
    check = NodeCheck(Settings(cluster_cidrs=("fd00::/48",)), ())
    check.queued(node())
    with pytest.raises(ConfigError, match="clusterCIDRs"):
        check.queued(node("192.0.2.1"))


def test_other_pod_prefixes_end_the_agent_in_mode_node_cidr() -> None:
    """N4: they are compiled in; a Node that is gone says nothing, other modes do not care."""
    check = NodeCheck(Settings(detect_local=NODE_CIDR), ("10.1.0.0/24",))
    check.queued(node(pods=("10.1.0.0/24",)))
    check.queued(node())
    with pytest.raises(EbpfSvcError, match=r"now 10\.2\.0\.0/24, were 10\.1\.0\.0/24"):
        check.queued(node(pods=("10.2.0.0/24",)))
    NodeCheck(Settings(), ("10.1.0.0/24",)).queued(node(pods=("10.2.0.0/24",)))


class Filling(FakeDataplane):
    """A dataplane that shows how full it is."""

    def __init__(self) -> None:
        super().__init__()
        self.now: list[MapFill] = []

    def fill(self) -> list[MapFill]:
        return self.now


class Rig:
    def __init__(self, *, tells_problems: bool = True) -> None:
        self.sink, self.dataplane, self.now_s = Sink(), Filling(), 0.0
        self.notices = Notices(
            EventRecorder(self.sink),
            lambda: self.dataplane,
            "node1",
            tells_problems=tells_problems,
            clock=lambda: self.now_s,
        )

    def sync(self, *of_objects: Problem, of_plan: tuple[Problem, ...] = ()) -> None:
        self.notices.queued(Snapshot(NodeFacts("node1"), problems=of_objects))
        desired = DesiredState(problems=of_plan)
        self.notices.applied(Synced(desired, ApplyReport(), False, 0.0, 0.0))


def test_wrong_objects_are_told_once_each() -> None:
    """On the object, so that `kubectl describe` shows it; from the reader and from the plan."""
    rig = Rig()
    rig.sync(BROKEN)
    rig.sync(BROKEN, NODE)
    rig.sync(BROKEN, of_plan=(Problem("", "Service shop/api", "spec.clusterIP", "taken"),))
    assert rig.sink.told() == [
        ("Service shop/web", "InvalidService", "spec.ports: too many"),
        ("Node node1", "InvalidNode", "odd"),
        ("Service shop/api", "InvalidService", "spec.clusterIP: taken"),
    ]


def test_wrong_manifests_stay_in_the_log() -> None:
    """Whoever reads them has logged them, file and all; there is no object to tell it on."""
    rig = Rig(tells_problems=False)
    rig.sync(BROKEN)
    assert rig.sink.told() == []


def test_nearly_full_table_is_told() -> None:
    """From nine tenths on, unless entries make room for each other."""
    rig = Rig()
    rig.dataplane.now = [
        MapFill("frontends4", 89, 100, evicts=False),
        MapFill("flows4", 100, 100, evicts=True),
    ]
    rig.sync()
    assert rig.sink.told() == []
    rig.dataplane.now[0] = MapFill("frontends4", 90, 100, evicts=False)
    rig.sync()
    assert rig.sink.told() == [], "tables are not looked at with every sync"
    rig.now_s = FILL_S
    rig.sync()
    (told,) = rig.sink.told()
    assert told[:2] == ("Node node1", "TableNearlyFull")
    assert "frontends4 90 of 100" in told[2]


def test_full_table_is_told_when_an_apply_fails() -> None:
    """That is when an operator looks for the reason."""
    rig = Rig()
    rig.dataplane.now = [MapFill("backends4", 100, 100, evicts=False)]
    rig.notices.failed(DataplaneError("map backends4: no room"))
    assert "backends4 100 of 100" in rig.sink.told()[0][2]


@pytest.mark.parametrize(
    ("signs", "left", "said"),
    [
        ((), (), ""),
        ((Sign("process", "pid 7", 7),), (), "runs here (process: pid 7)"),
        ((), ("nft table ip kube-proxy",), "has run here"),
    ],
)
def test_kube_proxy_beside_us_is_told(
    monkeypatch: pytest.MonkeyPatch, signs: tuple[Sign, ...], left: tuple[str, ...], said: str
) -> None:
    """With the command that takes its place; where each has Services of its own, only logged."""
    monkeypatch.setattr(kubeproxy, "running", lambda own_pid: signs)
    monkeypatch.setattr(kubeproxy, "leftovers", lambda families: left)
    sink, beside = Sink(), Sink()
    with capture_logs() as lines:
        say_who_else(Settings(node_name="node1"), EventRecorder(sink))
        ours = KubernetesSettings(service_proxy_name="ebpf-svc")
        say_who_else(Settings(node_name="node1", kubernetes=ours), EventRecorder(beside))
    assert [line["log_level"] for line in lines] == (["warning", "info"] if said else [])
    assert beside.told() == []
    assert [reason for _, reason, _ in sink.told()] == (["KubeProxyFound"] if said else [])
    assert all(said in note and "ebpf-svc migrate" in note for _, _, note in sink.told())
