"""What nftables mode alone has: cost of a change, repair, take-over, what nft sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpf_svc.bench.population import Population
from ebpf_svc.config import DetectLocal, DetectLocalMode, Settings
from ebpf_svc.dataplane.nftables import family, loopback, probe
from ebpf_svc.dataplane.nftables.dataplane import NftablesDataplane
from ebpf_svc.dataplane.nftables.layout import LAYOUTS, Layout
from ebpf_svc.host import kubeproxy, nf_owner, nfnetlink, sysctl
from ebpf_svc.host.command import run
from ebpf_svc.host.netlink import Failure
from ebpf_svc.host.nf_tables import DELCHAIN, DELSET, NEWSET, Rule
from ebpf_svc.host.nfnetlink import Refused, Request
from ebpf_svc.model.desired import DesiredState, Frontend, FrontendKind
from ebpf_svc.model.net import Family, Sources
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Node
from tests.lib.law import check_law
from tests.lib.plans import make_backend, make_desired, make_frontend, make_plan
from tests.lib.strategies import snapshot_sequences

LAWS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SELECTIONS = ((), ("192.168.0.0/16", "fd00:192::/64"), ("localhost", "primary"), ("10.97.0.0/16",))
DETECTORS = (
    DetectLocal(),
    DetectLocal(mode=DetectLocalMode.BRIDGE_INTERFACE, bridge_interface="cni0"),
    DetectLocal(mode=DetectLocalMode.INTERFACE_NAME_PREFIX, interface_name_prefix="veth"),
)
TABLE = "ip kube-proxy"
BALANCER = "198.51.100.1"
KUBE_PROXY = """
table ip kube-proxy {
    comment "rules for kube-proxy"
    set cluster-ips { type ipv4_addr; comment "Active ClusterIPs"; elements = { 10.96.0.9 } }
    set nodeport-ips { type ipv4_addr; comment "IPs that accept NodePort traffic"; }
    set hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service; }
    map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
    map service-nodeports { type inet_proto . inet_service : verdict; }
    map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
    map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
    map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
    chain filter-input { type filter hook input priority 0; }
    chain nat-prerouting { type nat hook prerouting priority -100; }
    chain nat-output { type nat hook output priority -100; }
    chain nat-postrouting { type nat hook postrouting priority 100; }
    chain services {
        ip daddr . meta l4proto . th dport vmap @service-ips
    }
}
"""
"""What kube-proxy writes at its start, as far as it must fit with what is there (X3, X5, X6)."""


@pytest.fixture(scope="module")
def site(no_leftovers: None, artifact_cache: Path) -> Iterator[tuple[Node, Settings]]:
    """A node without an agent, and what its agent would be told."""
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        node = cluster.nodes[0]
        yield node, cluster.settings(node, cluster.folder)


@pytest.fixture
def node(site: tuple[Node, Settings]) -> Iterator[Node]:
    """The same node, entered; without tables afterwards."""
    node, given_settings = site
    with node.namespace.entered():
        yield node
        NftablesDataplane(given_settings).cleanup()


@pytest.fixture
def made(node: Node, site: tuple[Node, Settings]) -> Iterator[NftablesDataplane]:
    """A dataplane on the node."""
    made = NftablesDataplane(site[1])
    made.open()
    yield made
    made.close()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Sequence[Request]]]:
    """The transactions that are sent meanwhile."""
    sent: list[Sequence[Request]] = []
    real = nfnetlink.Socket.commit

    def commit(
        self: nfnetlink.Socket, wanted: Sequence[Request], *, generation: int | None = None
    ) -> None:
        sent.append(wanted)
        real(self, wanted, generation=generation)

    with monkeypatch.context() as patch:
        patch.setattr(nfnetlink.Socket, "commit", commit)
        yield sent


def some_services() -> DesiredState:
    """One of each kind of thing a table holds."""
    backends = [make_backend("10.1.0.1", in_local=True), make_backend("10.2.0.1")]
    balancer = make_frontend(
        BALANCER,
        kind=FrontendKind.LOAD_BALANCER,
        local_for=Sources.EXTERNAL,
        masquerade_for=Sources.NODE,
        source_ranges=["203.0.113.0/24", "192.0.2.0/25"],
    )
    return make_desired(
        make_plan("plain", masquerading("10.96.0.1")),
        make_plan("sticky", masquerading("10.96.0.2"), affinity_s=60),
        make_plan("closed", masquerading("10.96.0.3"), backends=()),
        make_plan(
            "balanced",
            masquerading("10.96.0.4"),
            balancer,
            backends=backends,
        ),
    )


def masquerading(address: str) -> Frontend:
    """A cluster IP as the node's settings have it planned."""
    return make_frontend(address, masquerade_for=Sources.NODE | Sources.EXTERNAL)


@LAWS
@given(data=st.data())
def test_law_holds_whatever_is_set(site: tuple[Node, Settings], data: st.DataObject) -> None:
    """What is applied is read back, with any detector and any selection of node ports (D1-D3)."""
    node, given_settings = site
    chosen = given_settings.model_copy(
        update={
            "node_port_addresses": data.draw(st.sampled_from(SELECTIONS)),
            "localhost_node_ports": data.draw(st.booleans()),
            "masquerade_all": data.draw(st.booleans()),
            "detect_local": data.draw(st.sampled_from(DETECTORS)),
            "cluster_cidrs": data.draw(st.sampled_from([(), given_settings.cluster_cidrs])),
        }
    )
    planner = Planner(PlanOptions.from_settings(chosen))
    states = [planner.plan(each) for each in data.draw(snapshot_sequences())]
    with node.namespace.entered():
        check_law(lambda: NftablesDataplane(chosen), node, states)


@LAWS
@given(snapshots=snapshot_sequences(max_size=6))
def test_changes_add_up_to_the_whole(
    site: tuple[Node, Settings], snapshots: list[Snapshot]
) -> None:
    """After any changes a look at everything, by us or by the next run, finds nothing to do."""
    node, given_settings = site
    planner = Planner(PlanOptions.from_settings(given_settings))
    with node.namespace.entered():
        made, next_run = NftablesDataplane(given_settings), NftablesDataplane(given_settings)
        made.open()
        try:
            made.apply(DesiredState())
            for desired in map(planner.plan, snapshots):
                assert made.apply(desired).failed == ()
                run(["nft", "add table inet somebody; delete table inet somebody"])
                report = made.apply(desired, resync=True)
                assert (report.writes, report.repaired) == (0, ())
                next_run.open()
                assert next_run.apply(desired).writes == 0
        finally:
            next_run.close()
            made.cleanup()


def test_without_detector_pods_are_read_back_as_anybody(
    node: Node, site: tuple[Node, Settings]
) -> None:
    """D2: with nothing to tell pods by, they get the Local list like clients outside."""
    made = NftablesDataplane(site[1].model_copy(update={"cluster_cidrs": ()}))
    made.open()
    frontend = make_frontend(
        BALANCER,
        kind=FrontendKind.EXTERNAL_IP,
        local_for=Sources.POD | Sources.EXTERNAL,
        masquerade_for=Sources.NODE,
    )
    backends = [make_backend("10.1.0.1", in_local=True), make_backend("10.2.0.1")]
    desired = make_desired(make_plan("web", frontend, backends=backends))
    made.apply(desired)
    made.close()
    assert made.read() == made.view(desired)


@pytest.mark.parametrize("services", [10, 1000])
def test_change_costs_what_it_touches(
    made: NftablesDataplane, monkeypatch: pytest.MonkeyPatch, services: int
) -> None:
    """One endpoint for another: four messages in one transaction, however many services."""
    population = Population(services, 10)
    planner, snapshot = Planner(PlanOptions()), population.snapshot()
    with counted(monkeypatch) as sent:
        made.apply(planner.plan(snapshot))
    assert len(sent) == 2, "a first apply is one transaction a family"
    for number in range(3):
        snapshot = population.changed(snapshot, number)
        with counted(monkeypatch) as sent:
            report = made.apply(planner.plan(snapshot))
        assert [len(requests) for requests in sent if requests] == [4]
        assert (report.writes, report.changed) == (4, 1)


def test_look_at_an_untouched_table_is_one_message(
    made: NftablesDataplane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nobody else writes to nf_tables, reading back needs no list."""
    made.apply(some_services())
    monkeypatch.setattr(family, "read_table", None)
    assert made.apply(some_services(), resync=True).repaired == ()


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (f"delete table {TABLE}", "the table was missing"),
        ("flush ruleset", "the table was missing"),
        (f"flush chain {TABLE} services", "chain services was changed"),
        (f"add rule {TABLE} services counter", "chain services was changed"),
        (f"insert rule {TABLE} nat-postrouting drop", "chain nat-postrouting was changed"),
        (f"add chain {TABLE} theirs", "chain theirs was foreign"),
        (f"flush map {TABLE} service-ips", "4 of service-ips were missing"),
        (f"flush set {TABLE} cluster-ips", "4 of cluster-ips were missing"),
        (f"add element {TABLE} cluster-ips {{ 10.96.0.77 }}", "1 of cluster-ips were foreign"),
        (f"add set {TABLE} theirs {{ type ipv4_addr; }}", "set theirs was foreign"),
        (f"add table {TABLE} {{ flags dormant; }}", "the table was switched off"),
    ],
)
def test_what_others_change_is_put_right_and_told(
    made: NftablesDataplane, node: Node, harm: str, found: str
) -> None:
    """A flush by hand, a foreign rule, a firewall that starts anew: read back, repaired, named."""
    desired = some_services()
    made.apply(desired)
    assert made.read() == made.view(desired)
    node.run(["nft", harm])
    report = made.apply(desired, resync=True)
    assert f"table {TABLE}: {found}" in report.repaired
    assert made.read() == made.view(desired)
    assert made.apply(desired, resync=True).repaired == ()


def test_change_upon_a_table_that_is_gone_writes_all(made: NftablesDataplane, node: Node) -> None:
    """Nobody waits for the next look: what is refused is read back at once."""
    made.apply(some_services())
    node.run(["nft", "delete", "table", *TABLE.split()])
    more = make_plan("more", masquerading("10.96.0.9"), backends=["10.1.0.9"])
    desired = DesiredState({**some_services().plans, more.key: more})
    report = made.apply(desired)
    assert report.repaired == (f"table {TABLE}: the table was missing",)
    assert made.read() == made.view(desired)


def test_restart_writes_nothing(made: NftablesDataplane, site: tuple[Node, Settings]) -> None:
    """Z2: what stands is taken over, the numbers of endpoints too."""
    plan = make_plan("plain", masquerading("10.96.0.1"), backends=["10.1.0.1", "10.1.0.2"])
    made.apply(make_desired(plan))
    # Other numbers than a first apply would give.
    plan = make_plan("plain", masquerading("10.96.0.1"), backends=["10.1.0.2", "10.1.0.3"])
    made.apply(make_desired(plan))
    again = NftablesDataplane(site[1])
    again.open()
    try:
        report = again.apply(make_desired(plan))
        assert (report.writes, report.repaired) == (0, ())
    finally:
        again.close()


def test_numbers_in_use_are_nobody_elses(made: NftablesDataplane) -> None:
    """Service ports come after others changed, shrank, grew and went."""
    plans = {}

    def apply(name: str, vip: int, *hosts: int) -> None:
        backends = [f"10.1.{vip}.{host}" for host in hosts]
        plan = make_plan(name, masquerading(f"10.96.0.{vip}"), backends=backends)
        plans[name] = plan
        if not hosts:
            del plans[name]
        desired = make_desired(*plans.values())
        assert made.apply(desired).failed == ()
        assert made.read() == made.view(desired)

    apply("one", 1, 1, 2)
    apply("one", 1, 1, 3)
    apply("two", 2, 1, 2, 3)
    apply("one", 1, 1, 3, 4, 5, 6)
    apply("three", 3, 1)
    apply("two", 2)
    apply("four", 4, 1, 2)
    apply("five", 5, 1, 2)
    apply("one", 1, 6)
    apply("six", 6, *range(1, 9))


def test_table_of_kube_proxy_is_replaced_in_one_transaction(
    made: NftablesDataplane, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody meets a node without rules in between."""
    run(["nft", "-f", "-"], input=KUBE_PROXY)
    desired = some_services()
    with counted(monkeypatch) as sent:
        assert made.apply(desired).failed == ()
    assert len([requests for requests in sent if requests]) == len(LAYOUTS)
    assert made.read() == made.view(desired)
    assert 'comment "ebpf-svc' in node.run(["nft", "list", "table", *TABLE.split()])


def test_kube_proxy_finds_what_it_knows(made: NftablesDataplane, node: Node) -> None:
    """Started later in nftables mode, it adds its sets and chains to ours without a conflict."""
    made.apply(some_services())
    run(["nft", "-f", "-"], input=KUBE_PROXY)


def test_what_nft_prints_it_reads(made: NftablesDataplane, node: Node) -> None:
    """Types and comments are those an operator expects; a saved ruleset can be loaded."""
    made.apply(some_services())
    text = node.run(["nft", "list", "table", *TABLE.split()])
    assert "ip daddr . meta l4proto . th dport vmap @service-ips" in text
    assert '10.96.0.1 . tcp . 80 comment "default/plain cluster IP" : goto service-' in text
    assert "dnat ip to numgen random mod 2 map @service-endpoints-0" in text
    assert "ip saddr != { 192.0.2.0/25, 203.0.113.0/24 } drop" in text
    node.run(["nft", "delete", "table", *TABLE.split()])
    run(["nft", "-f", "-"], input=text)
    assert made.apply(some_services(), resync=True).repaired == ()


def test_one_refused_service_port_does_not_hold_up_others(made: NftablesDataplane) -> None:
    """The kernel takes no timeout of ten thousand years; the rest is written."""
    good = make_plan("good", masquerading("10.96.0.1"))
    bad = make_plan("bad", masquerading("10.96.0.2"), affinity_s=10**15)
    report = made.apply(make_desired(good, bad))
    assert [error.service for error in report.failed] == [str(bad.key)]
    assert made.read() == made.view(make_desired(good))
    mended = replace(bad, affinity_s=60)
    assert made.apply(make_desired(good, mended)).failed == ()
    assert made.read() == made.view(make_desired(good, mended))


@pytest.mark.parametrize("is_old", [False, True])
def test_affinity_takes_another_timeout(
    made: NftablesDataplane, node: Node, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    """X19: in place, so clients stay where they are; kernels before 6.3 get the sets made anew."""
    plan = make_plan("sticky", masquerading("10.96.0.1"), backends=["10.1.0.1"], affinity_s=60)
    made.apply(make_desired(plan))
    (name,) = (
        line.split()[1]
        for line in node.run(["nft", "list", "table", *TABLE.split()]).splitlines()
        if line.strip().startswith("set affinity-")
    )
    node.run(["nft", f"add element {TABLE} {name} {{ 192.0.2.9 }}"])
    if is_old:
        real = nfnetlink.Socket.commit

        def commit(
            self: nfnetlink.Socket, wanted: Sequence[Request], *, generation: int | None = None
        ) -> None:
            # A set that stands is left as it is.
            remade = any(request.kind == DELSET for request in wanted)
            kept = [request for request in wanted if request.kind != NEWSET or remade]
            real(self, kept, generation=generation)

        monkeypatch.setattr(nfnetlink.Socket, "commit", commit)
    desired = make_desired(replace(plan, affinity_s=90))
    report = made.apply(desired)
    assert (report.failed, report.repaired) == ((), ())
    assert made.read() == made.view(desired)
    text = node.run(["nft", "list", "set", *TABLE.split(), name])
    assert "timeout 1m30s" in text
    # The dataplane finds out by itself what this kernel does.
    stays = made._tables[Family.V4]._can_retime
    assert ("192.0.2.9" in text) is stays
    assert not (is_old and stays)
    assert made.apply(desired, resync=True).repaired == ()


def test_chains_an_old_kernel_keeps_go_later(
    made: NftablesDataplane, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X18: kernels before 6.2 refuse to delete them at once; they are emptied, and go later."""
    desired = make_desired(make_plan("plain", masquerading("10.96.0.1")))
    made.apply(desired)
    real = nfnetlink.Socket.commit

    def commit(
        self: nfnetlink.Socket, wanted: Sequence[Request], *, generation: int | None = None
    ) -> None:
        doomed = [i for i, request in enumerate(wanted) if request.kind == DELCHAIN]
        if doomed and len(wanted) > 1:
            raise Refused([(index, Failure(16, "busy")) for index in doomed])
        real(self, wanted, generation=generation)

    monkeypatch.setattr(nfnetlink.Socket, "commit", commit)
    monkeypatch.setattr(family, "STALE_CHAIN_S", -1.0)
    assert made.apply(make_desired()).failed == ()
    listed = ["nft", "list", "chains"]
    assert "service-" in node.run(listed)
    made.apply(make_desired())
    assert "chain service-" not in node.run(listed).replace("service-endpoints-check", "")
    assert made.apply(make_desired(), resync=True).repaired == ()


def test_route_localnet_goes_with_its_guard(
    made: NftablesDataplane, site: tuple[Node, Settings]
) -> None:
    """S7: on for node ports on 127.0.0.1, off again after cleanup, by a later run as well."""
    kind = FrontendKind.NODE_PORT
    port = make_frontend("127.0.0.1", 30080, kind=kind, masquerade_for=Sources.ALL)
    assert sysctl.read(loopback.SETTING) == "0"
    desired = make_desired(make_plan("web", port))
    made.apply(desired)
    assert sysctl.read(loopback.SETTING) == "1"
    assert made.read() == made.view(desired)
    again = NftablesDataplane(site[1])
    again.open()
    assert again.apply(desired).writes == 0
    again.cleanup()
    assert sysctl.read(loopback.SETTING) == "0"


def test_service_cidrs_of_the_api_take_effect_at_once(made: NftablesDataplane, node: Node) -> None:
    """X13: what is in them and no cluster IP is dropped; kube-proxy waits for a full sync."""
    listed = ["nft", "list", "chain", *TABLE.split(), "cluster-ips-check"]
    made.apply(some_services())
    cidrs = ("10.112.0.0/12", "fd00:10:112::/112")
    desired = replace(some_services(), service_cidrs=cidrs)
    assert made.apply(desired).writes > 0
    assert "ip daddr 10.112.0.0/12 drop" in node.run(listed)
    assert "10.96.0.0" not in node.run(listed)
    assert made.apply(desired).writes == 0


def test_probe_leaves_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that undoes itself: nobody sees its table, and it is gone."""
    with counted(monkeypatch) as sent:
        assert all(check.ok for check in probe.checks(tuple(LAYOUTS.values())))
    assert len(sent) == len(LAYOUTS)
    assert "probe" not in node.run(["nft", "list", "tables"])


def test_probe_says_what_is_missing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel refuses is named."""
    real = probe._requests

    def requests(layout: Layout) -> list[Request]:
        return [*layout.table.add_rules("nowhere", [Rule(())]), *real(layout)]

    monkeypatch.setattr(probe, "_requests", requests)
    (check,) = probe.checks([LAYOUTS[Family.V4]])
    assert not check.ok
    assert "rule of chain nowhere" in check.detail


def test_tables_of_others_are_left_alone(node: Node, site: tuple[Node, Settings]) -> None:
    """cleanup removes what carries our sign: not kube-proxy's table of the same name."""
    run(["nft", "-f", "-"], input=KUBE_PROXY)
    try:
        NftablesDataplane(site[1]).cleanup()
        assert NftablesDataplane(site[1]).read() == {}
        assert "kube-proxy" in node.run(["nft", "list", "tables"])
    finally:
        node.run(["nft", "delete", "table", *TABLE.split()])


def test_table_that_kube_proxy_went_on_with_is_its_own(
    made: NftablesDataplane, node: Node, site: tuple[Node, Settings]
) -> None:
    """It keeps our comment, but removes our chain: cleanup leaves such a table alone."""
    made.apply(some_services())
    assert kubeproxy.nft_tables() == ()
    run(["nft", f"delete chain {TABLE} {nf_owner.SIGN_CHAIN.name}"])
    assert kubeproxy.nft_tables() == (TABLE,)
    NftablesDataplane(site[1]).cleanup()
    tables = node.run(["nft", "list", "tables"])
    assert f"table {TABLE}" in tables
    assert "ip6 kube-proxy" not in tables
    kubeproxy.remove_nft_tables()
    assert "kube-proxy" not in node.run(["nft", "list", "tables"])


def test_tables_are_handed_over_as_they_are(made: NftablesDataplane, node: Node) -> None:
    """`migrate --undo` beside a kube-proxy of the same mode: rules stay, our sign goes."""
    port = make_frontend("127.0.0.1", 30080, kind=FrontendKind.NODE_PORT)
    made.apply(make_desired(make_plan("web", port)))
    before = node.run(["nft", "list", "map", *TABLE.split(), "service-nodeports"])
    made.hand_over()
    assert kubeproxy.nft_tables() == kubeproxy.NFT_TABLES
    assert node.run(["nft", "list", "map", *TABLE.split(), "service-nodeports"]) == before
    assert sysctl.read(loopback.SETTING) == "0"
    kubeproxy.remove_nft_tables()


def test_failures_are_counted(made: NftablesDataplane) -> None:
    """By kube-proxy's names, a family each."""
    assert {one.value for one in made.series()} == {0}
    made.apply(make_desired(make_plan("bad", masquerading("10.96.0.2"), affinity_s=10**15)))
    failed = {one.labels["ip_family"]: one.value for one in made.series() if "sync_f" in one.name}
    assert failed["IPv4"] > 0
    assert failed["IPv6"] == 0


def test_retiring_keeps_translating_what_is_open(made: NftablesDataplane, node: Node) -> None:
    """Connection tracking needs some chain of type nat; where no other is there, ours stay."""
    made.apply(some_services())
    assert not made.retire()
    assert made.read() == {}
    assert "type nat hook postrouting" in node.run(["nft", "list", "table", *TABLE.split()])
    run(["nft", "add table inet other"])
    run(["nft", "add chain inet other nat { type nat hook postrouting priority 100; }"])
    assert made.retire()
    run(["nft", "delete table inet other"])
