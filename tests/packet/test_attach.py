"""Programs on devices and cgroups: put everywhere they belong, kept there, taken off without trace.

In a network namespace and a cgroup of the test's own; no packet flows here.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from ebpf_svc.config import EbpfSettings, SocketLB
from ebpf_svc.dataplane.ebpf import attach, hooks, tables
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.attach import Attachments
from ebpf_svc.dataplane.ebpf.devices import DeviceRole
from ebpf_svc.dataplane.ebpf.programs import Programs
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import bpf_prog, links, netlink, rtnetlink
from ebpf_svc.host.bpf_prog import AttachType
from ebpf_svc.host.cgroup import find_root
from ebpf_svc.host.command import run
from ebpf_svc.host.links import Filter, Side
from ebpf_svc.model.net import Family
from ebpf_svc.testbed.namespace import Namespace
from tests.lib.waiting import eventually

pytestmark = pytest.mark.root

Result = TypeVar("Result")

PASS = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)
"""A program that answers 1: a socket hook that allows."""
SMALL = {"flow_entries": 1024, "affinity_entries": 64, "frontend_entries": 64}
SMALL |= {"backend_entries": 64, "slot_entries": 1024}


@dataclass
class Node:
    """A namespace with devices, a cgroup, and loaded programs to attach."""

    namespace: Namespace
    settings: EbpfSettings
    programs: Programs
    load: Callable[[], Programs]
    started: list[Attachments] = field(default_factory=list)

    def ip(self, *commands: str) -> None:
        """Run `ip` commands in the namespace, in one process."""
        run(["ip", "-n", self.namespace.name, "-b", "-"], input="\n".join(commands) + "\n")

    def tc(self, command: str) -> None:
        run(["tc", "-n", self.namespace.name, *command.split()])

    def inside(self, work: Callable[[rtnetlink.Socket], Result]) -> Result:
        """Do something with a netlink socket of the namespace."""
        with self.namespace.entered():
            netlink = rtnetlink.Socket()
        try:
            return work(netlink)
        finally:
            netlink.close()

    def index(self, device: str) -> int:
        return self.inside(
            lambda netlink: next(x.index for x in links.links(netlink) if x.name == device)
        )

    def filters(self, device: str) -> list[Filter]:
        return self.inside(lambda netlink: links.filters(netlink, self.index(device)))

    def put_filter(self, device: str, side: Side, *, prio: int, protocol: int, name: str) -> None:
        """Somebody else's filter."""
        fd = bpf_prog.load(PASS, program_type=bpf_prog.ProgramType.SCHED_CLS, name="other")
        wanted = Filter(self.index(device), side, prio, protocol, 1, name=name, program_fd=fd)
        try:
            assert self.inside(lambda nl: links.replace_filters(nl, [wanted])) == [None]
        finally:
            os.close(fd)

    def names(self, device: str) -> list[str]:
        """Side and name of each filter, in the order of the kernel."""
        return [f"{item.side.name} {item.name}" for item in self.filters(device)]

    def qdisc(self, device: str) -> str | None:
        found = self.inside(links.clsacts).get(self.index(device))
        return found.kind if found else None

    def hooks(self) -> dict[int, list[str]]:
        """Names of the programs on the cgroup, by attach type."""
        fd = os.open(self.cgroup, os.O_RDONLY)
        try:
            return {
                kind: [_name_of(i) for i in bpf_prog.cgroup_query(fd, kind)]
                for kind in AttachType
                if kind
            }
        finally:
            os.close(fd)

    @property
    def cgroup(self) -> Path:
        assert self.settings.cgroup_root is not None
        return self.settings.cgroup_root

    def start(self, settings: EbpfSettings | None = None) -> Attachments:
        attachments = Attachments(self.programs, settings or self.settings)
        self.started.append(attachments)
        with self.namespace.entered():
            attachments.start()
        return attachments

    def detach_all(self) -> int:
        with self.namespace.entered():
            return attach.detach_all(self.settings)


def _name_of(program_id: int) -> str:
    fd = bpf_prog.by_id(program_id)
    try:
        return bpf_prog.facts(fd).name
    finally:
        os.close(fd)


def veth(name: str) -> str:
    return f"link add {name} type veth peer name x{name}"


IPV4, IPV6 = 0x0800, 0x86DD
POD = [
    "INGRESS ebpf-svc/pod_ingress4",
    "INGRESS ebpf-svc/pod_ingress6",
    "EGRESS ebpf-svc/egress4",
    "EGRESS ebpf-svc/egress6",
]
NODE = [name.replace("pod_", "node_") for name in POD]
HOOKS = {
    AttachType.INET4_CONNECT: ["esvc4_connect"],
    AttachType.INET6_CONNECT: ["esvc4_mconnect", "esvc6_connect"],
    AttachType.UDP4_SENDMSG: ["esvc4_sendmsg"],
    AttachType.UDP6_SENDMSG: ["esvc4_msendmsg", "esvc6_sendmsg"],
    AttachType.UDP4_RECVMSG: ["esvc4_recvmsg"],
    AttachType.UDP6_RECVMSG: ["esvc4_mrecvmsg", "esvc6_recvmsg"],
    AttachType.INET4_GETPEERNAME: ["esvc4_peername"],
    AttachType.INET6_GETPEERNAME: ["esvc4_mpeername", "esvc6_peername"],
}
NO_HOOKS: dict[int, list[str]] = {kind: [] for kind in HOOKS}


@pytest.fixture(scope="module")
def loader(
    compiled: dict[Family, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Programs]]:
    """Loads the programs once more, with the same maps, as a restart or an upgrade does."""
    settings = EbpfSettings(bpffs=tmp_path_factory.mktemp("node") / "bpf", **SMALL)
    open_tables = Tables.open(settings, compiled)
    loaded: list[Programs] = []

    def load() -> Programs:
        programs = Programs.load(compiled, {f: open_tables.fds(f) for f in compiled})
        loaded.append(programs)
        return programs

    yield load
    for programs in loaded:
        programs.close()
    open_tables.close()
    tables.remove_pins(settings)


@pytest.fixture(scope="module")
def programs(loader: Callable[[], Programs]) -> Programs:
    return loader()


@pytest.fixture
def node(programs: Programs, loader: Callable[[], Programs]) -> Iterator[Node]:
    """A namespace with one pod device, one NIC and one tunnel; nothing attached yet."""
    root = find_root()
    if root is None:
        pytest.skip("no cgroup2 hierarchy")
    cgroup = root / f"ebpf-svc-test-{os.getpid()}"
    cgroup.mkdir()
    namespace = Namespace(f"ebpf-svc-test-{os.getpid()}")
    made = Node(namespace, EbpfSettings(cgroup_root=cgroup), programs, loader)
    made.ip(veth("veth1"), veth("eth0"), "link add br0 type bridge")
    yield made
    for attachments in made.started:
        attachments.stop()
    namespace.close()
    cgroup.rmdir()


@pytest.fixture
def attached(node: Node) -> Attachments:
    return node.start()


def test_every_device_gets_the_programs_of_its_role(node, attached):
    """Pods' devices translate what pods send, NICs what others send; bridges and peers nothing."""
    assert attached.devices() == {"veth1": DeviceRole.POD, "eth0": DeviceRole.NODE}
    assert node.names("veth1") == POD
    assert node.names("eth0") == NODE
    assert node.names("br0") == node.names("xveth1") == node.names("lo") == []
    assert attached.problems() == []


def test_every_socket_hook_is_attached_once(node, attached):
    """IPv4 over IPv6 sockets has hooks beside the IPv6 ones."""
    assert node.hooks() == HOOKS


def test_new_pod_device_gets_its_programs_at_once(node, attached):
    """Before the first packet of a new pod matters."""
    node.ip(veth("veth2"))

    eventually(lambda: node.names("veth2"), until=lambda names: names == POD, within_s=0.5)


def test_device_renamed_into_a_pattern_gets_programs_and_out_of_it_loses_them(node, attached):
    """Container runtimes make a device and name it afterwards."""
    node.ip(veth("tmp0"), "link set tmp0 name lxc0")
    eventually(lambda: node.names("lxc0"), until=lambda names: names == POD, within_s=0.5)

    node.ip("link set lxc0 name other0")
    eventually(lambda: node.qdisc("other0"), until=lambda kind: kind is None, within_s=0.5)


@pytest.mark.parametrize(
    "deed",
    [
        "qdisc del dev veth1 clsact",
        "filter del dev veth1 ingress",
        "filter del dev veth1 egress prio 48",
    ],
)
def test_what_somebody_deletes_is_put_back_at_once(node, attached, deed):
    """Netlink tells of it; the next report says what was repaired."""
    node.tc(deed)

    eventually(lambda: sorted(node.names("veth1")), until=lambda n: n == sorted(POD), within_s=0.5)
    repairs = attached.verify()
    assert repairs
    assert all(repair.startswith("veth1: filter ebpf-svc/") for repair in repairs)
    assert attached.verify() == []


def test_filter_replaced_by_another_program_is_put_back_by_the_next_look(node, attached, programs):
    """Netlink tells of it no differently from what we do ourselves: the read-back finds it."""
    wrong = programs.fd(Family.V4, "node_ingress")
    (ours, *_) = node.filters("veth1")
    place = Filter(
        *(ours.index, ours.side, ours.prio, ours.protocol, ours.handle),
        name=ours.name,
        program_fd=wrong,
    )
    assert node.inside(lambda netlink: links.replace_filters(netlink, [place])) == [None]

    assert attached.verify() == ["veth1: filter ebpf-svc/pod_ingress4 put back"]
    assert node.filters("veth1")[0] == ours


def test_hook_somebody_detaches_is_put_back_by_the_next_look(node, attached):
    """No notification exists for cgroups: the read-back finds it."""
    assert hooks.remove(node.cgroup) == 12

    repairs = attached.verify()

    assert f"{node.cgroup}: esvc4_connect attached" in repairs
    assert len(repairs) == 12
    assert node.hooks() == HOOKS


def test_deleted_device_is_forgotten(node, attached):
    """Its index may come back as another device."""
    node.ip("link del veth1")

    eventually(attached.devices, until=lambda found: "veth1" not in found, within_s=0.5)
    assert attached.verify() == []


def test_device_with_the_index_of_a_deleted_one_gets_its_own_programs(node, attached):
    """Recycled indexes must not inherit what was known of the old device."""
    node.ip("link add name veth7 index 777 type veth peer name xveth7")
    node.ip("link del veth7", "link add name eth7 index 777 type veth peer name xeth7")

    eventually(lambda: node.names("eth7"), until=lambda names: names == NODE, within_s=0.5)


@pytest.mark.verifies
def test_replacing_programs_leaves_no_moment_without_them(node, attached):
    """An upgrade swaps every filter and hook in place, under traffic."""
    index, seen, done = node.index("veth1"), [], threading.Event()

    def watch(netlink: rtnetlink.Socket) -> None:
        while not done.is_set():
            seen.append(len(links.filters(netlink, index)))

    watcher = threading.Thread(target=lambda: node.inside(watch))
    watcher.start()
    old = {item.program_id for item in node.filters("veth1")}
    try:
        for _ in range(3):
            attached.replace(node.load())
    finally:
        done.set()
        watcher.join()

    assert set(seen) == {4}
    assert not old & {item.program_id for item in node.filters("veth1")}
    assert node.names("veth1") == POD
    assert node.hooks() == HOOKS


@pytest.mark.verifies
def test_restart_takes_over_what_is_attached(node, attached):
    """The new agent's programs replace the old one's; nothing is attached twice."""
    attached.stop()
    node.programs = node.load()

    again = node.start()

    assert node.names("veth1") == POD
    assert {item.program_id for item in node.filters("eth0")} == {
        program.id for program in node.programs if program.name in ("node_ingress", "egress")
    }
    assert node.hooks() == HOOKS
    assert again.verify() == []
    again.stop()


@pytest.mark.verifies
def test_restart_with_one_family_takes_the_other_off(node, attached, compiled, loader):
    """Turning IPv6 off leaves no program of it behind."""
    attached.stop()
    both = loader()
    only = Programs({(p.family, p.name): p for p in both if p.family is Family.V4})
    node.programs = only

    again = node.start()

    assert node.names("veth1") == [name for name in POD if name.endswith("4")]
    assert node.hooks()[AttachType.INET6_CONNECT] == ["esvc4_mconnect"]
    again.stop()


def test_socket_lb_off_takes_the_hooks_off(node, attached):
    """A setting changed between two runs takes effect on what the first left, there and back."""
    attached.stop()

    again = node.start(node.settings.model_copy(update={"socket_lb": SocketLB.OFF}))

    assert node.hooks() == NO_HOOKS
    assert node.names("veth1") == POD
    assert node.names("lo") == [name for name in POD if name.startswith("EGRESS")]
    again.stop()
    back = node.start()
    assert node.hooks() == HOOKS
    assert node.names("lo") == []
    assert node.qdisc("lo") is None
    back.stop()


def test_other_agents_filters_stay_and_ours_find_a_place(node, programs):
    """Prios 47 and 48 taken by somebody else: ours go to a later one, theirs is untouched."""
    node.tc("qdisc add dev veth1 clsact")
    node.put_filter("veth1", Side.INGRESS, prio=47, protocol=IPV6, name="theirs")
    node.put_filter("veth1", Side.EGRESS, prio=48, protocol=IPV4, name="theirs")
    theirs = node.filters("veth1")

    attachments = node.start()

    assert sorted(name for name in node.names("veth1") if "ebpf-svc/" in name) == sorted(POD)
    assert attachments.verify() == []
    attachments.stop()
    assert node.detach_all() == 4 + 4 + 12
    assert node.filters("veth1") == theirs
    assert node.qdisc("veth1") == "clsact"


def test_same_prio_and_protocol_is_shared_with_another_bpf_filter(node):
    """Handles tell the two apart."""
    node.tc("qdisc add dev veth1 clsact")
    node.put_filter("veth1", Side.INGRESS, prio=47, protocol=IPV4, name="other")

    attachments = node.start()
    attachments.stop()

    assert sorted(node.names("veth1")) == sorted(["INGRESS other", *POD])
    node.detach_all()
    assert node.names("veth1") == ["INGRESS other"]


def test_ingress_qdisc_in_the_way_is_a_problem_said_once_and_half_served(node):
    """The CNI's bandwidth plugin may hold the place: an egress filter would run on ingress."""
    node.tc("qdisc add dev veth1 ingress")

    attachments = node.start()

    assert node.names("eth0") == NODE
    (problem,) = attachments.problems()
    assert problem.startswith("veth1: has a qdisc of kind ingress")
    index = node.index("veth1")
    on_ingress = node.inside(lambda netlink: links.filters(netlink, index, [Side.INGRESS]))
    assert [item.name for item in on_ingress] == ["ebpf-svc/pod_ingress4", "ebpf-svc/pod_ingress6"]
    node.tc("qdisc del dev veth1 ingress")
    eventually(attachments.problems, until=lambda found: found == [], within_s=0.5)
    assert node.names("veth1") == POD
    attachments.stop()


def test_detach_needs_no_state_and_leaves_nothing(node, attached):
    """After a crash, cleanup finds everything by name; a second one finds nothing."""
    attached.stop()

    assert node.detach_all() == 4 + 4 + 12
    assert node.names("veth1") == node.names("eth0") == []
    assert node.qdisc("veth1") is None
    assert node.qdisc("eth0") is None
    assert node.hooks() == NO_HOOKS
    assert node.detach_all() == 0


def test_detach_leaves_other_programs_on_the_cgroup(node, attached):
    """Only names of ours are taken off."""
    fd = os.open(node.cgroup, os.O_RDONLY)
    other = bpf_prog.load(
        PASS, program_type=18, attach_type=AttachType.INET4_CONNECT, name="calico_connect"
    )
    bpf_prog.cgroup_attach(fd, other, AttachType.INET4_CONNECT)
    attached.stop()

    node.detach_all()

    assert node.hooks()[AttachType.INET4_CONNECT] == ["calico_connect"]
    bpf_prog.cgroup_detach(fd, other, AttachType.INET4_CONNECT)
    os.close(other)
    os.close(fd)


def test_missing_cgroup_is_named(node):
    """A wrong setting says which directory it means."""
    missing = node.settings.model_copy(update={"cgroup_root": Path("/nowhere/cgroup")})

    with pytest.raises(DataplaneError, match="/nowhere/cgroup"):
        node.start(missing)
    with node.namespace.entered():
        assert attach.detach_all(missing) == 8


def test_lost_notifications_are_made_up_for(node, monkeypatch):
    """A thousand pods at once overrun the socket's queue: the devices are then looked at anew."""
    overruns = []
    wait = rtnetlink.Notifications.wait

    def slow_wait(self: rtnetlink.Notifications, timeout_s: float | None = None) -> object:
        try:
            return wait(self, timeout_s)
        except netlink.Overrun:
            overruns.append(1)
            raise

    monkeypatch.setattr(rtnetlink.Notifications, "wait", slow_wait)
    monkeypatch.setattr(netlink, "_QUEUE_BYTES", 1)
    attachments = node.start()

    node.ip(*(veth(f"veth{i}") for i in range(100, 200)))

    eventually(lambda: len(attachments.devices()), until=lambda count: count == 102)
    assert overruns
    assert all(node.names(f"veth{i}") == POD for i in range(100, 200, 9))
    attachments.stop()


def test_device_heard_of_many_times_at_once_gets_its_programs(node, monkeypatch):
    """What a busy agent hears late, it hears together: a device that came, went up and changed."""
    wait = rtnetlink.Notifications.wait

    def late_wait(self: rtnetlink.Notifications, timeout_s: float | None = None) -> object:
        time.sleep(0.3)
        return wait(self, timeout_s)

    monkeypatch.setattr(rtnetlink.Notifications, "wait", late_wait)
    attachments = node.start()

    node.ip(veth("veth9"), "link set veth9 up", "link set veth9 mtu 1400")

    eventually(lambda: node.names("veth9"), until=lambda names: names == POD)
    attachments.stop()


def test_many_devices_coming_and_going_leak_no_descriptor(node, attached):
    """Nodes live for months and pods for minutes."""

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for _ in range(2):
        node.ip(*(veth(f"veth{i}") for i in range(100, 160)))
        eventually(lambda: len(attached.devices()), until=lambda count: count == 62)
        node.ip(*(f"link del veth{i}" for i in range(100, 160)))
        eventually(lambda: len(attached.devices()), until=lambda count: count == 2)

    attached.verify()
    assert descriptors() == before


def test_stop_leaves_programs_and_gives_descriptors_back(node):
    """Stopping the agent leaves traffic flowing (Z2)."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    attachments = node.start()

    attachments.stop()

    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert node.names("veth1") == POD
    assert node.hooks() == HOOKS
    assert not any(thread.name == "attach" for thread in threading.enumerate())
