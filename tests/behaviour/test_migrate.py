"""Taking kube-proxy's place, and giving it back, under live connections."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyroute2.ipset import IPSet

from ebpf_svc.dataplane.ipvs.ruleset import removal
from ebpf_svc.dataplane.ipvs.sets import SPECS
from ebpf_svc.errors import CommandError, UnsupportedHost
from ebpf_svc.host import ipvs
from ebpf_svc.host import kubeproxy as kubeproxy_host
from ebpf_svc.host.iptables import variants
from ebpf_svc.model.desired import (
    Backend,
    DesiredState,
    Frontend,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import ServicePortName
from ebpf_svc.modes import make_dataplane
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Node
from ebpf_svc.testbed.namespace import python_argv
from ebpf_svc.testbed.traces import traces
from ebpf_svc.testbed.traffic import Outcome, ask, connection
from tests.lib import kubeproxy
from tests.lib.manifests import PROTOCOLS, Web
from tests.lib.takeover import WEB, Lasting, Site, asked, site_of
from tests.lib.waiting import eventually

IN_PLACE = {
    "test_connections_live_through_the_switch": ("legacy", "nft"),
    "test_rules_of_others_stay_word_for_word": ("",),
    "test_device_and_sets_of_ipvs_mode_go": ("",),
    "test_running_kube_proxy_is_refused": ("",),
    "test_agent_and_check_say_beside_whom_they_start": ("legacy", "nft"),
    "test_what_we_do_not_serve_is_not_taken_away": ("legacy", "nft"),
    "test_undo_gives_back_without_a_reset": ("legacy", "nft", "nftables"),
}
"""Tests -> kube-proxy's modes in which there is nothing for `migrate` to do in iptables mode, nor
in ipvs mode, which has some of these chains and whose agent removes the others at its start.
"""
TABLES_IN_PLACE = {
    "test_connections_live_through_the_switch": ("nftables",),
    "test_agent_and_check_say_beside_whom_they_start": ("nftables",),
    "test_what_we_do_not_serve_is_not_taken_away": ("nftables",),
    "test_undo_gives_back_without_a_reset": ("legacy", "nft", "nftables"),
}
"""The same in nftables mode; and its connections wait for nobody, as connection tracking has them.
"""
SHARING = ("iptables", "ipvs")
"""Modes with chains of kube-proxy's names."""
EVERY_MODE = pytest.mark.parametrize("mode", ["legacy", "nft", "nftables"])


@pytest.fixture
def site(dataplane: str, artifact_cache: Path, no_leftovers: None) -> Iterator[Site]:
    # No other rules with NAT: what our own do not keep alive, nothing does.
    with Cluster.create(node_count=1, cni_masquerade=False, cache_dir=artifact_cache) as cluster:
        made = site_of(cluster, dataplane)
        yield made
        made.agent.stop()


@pytest.fixture(autouse=True)
def rules_apart(request: pytest.FixtureRequest, dataplane: str) -> None:
    """Skip what takes for granted that our rules stand beside kube-proxy's."""
    mode = request.node.callspec.params.get("mode", "")
    if dataplane in SHARING and mode in IN_PLACE.get(request.node.originalname, ()):
        pytest.skip(f"{dataplane} mode takes kube-proxy's chains over in place")
    if dataplane == "nftables" and mode in TABLES_IN_PLACE.get(request.node.originalname, ()):
        pytest.skip("nftables mode replaces kube-proxy's tables, and has no connections of its own")


FAKE = """
import http.server, time
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"lastUpdated": "2026-01-01", "currentTime": "2026-01-01"}')
    def log_message(self, *words): pass
print("running", flush=True)
while True:
    try:
        http.server.HTTPServer(("127.0.0.1", 10256), Answer).serve_forever()
    except OSError:
        time.sleep(0.1)
"""
"""Tries again while our agent has the port, as kube-proxy does (HS8)."""
FAKE_MODE = FAKE.replace("10256", "10249").replace(
    """b'{"lastUpdated": "2026-01-01", "currentTime": "2026-01-01"}'""", "b'iptables'"
)
"""Says at /proxyMode that it has iptables mode."""


@contextmanager
def kube_proxy_process(site: Site, says: str = FAKE) -> Iterator[None]:
    """A process of that name, which answers where kube-proxy does."""
    program = site.node.folders.root / "kube-proxy"
    if not program.exists():
        program.symlink_to(sys.executable)
    argv = [str(program), "-E", "-S", "-c", says]
    with site.node.popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


@EVERY_MODE
def test_connections_live_through_the_switch(site: Site, mode: str) -> None:
    """Connections made under kube-proxy's rules go on, its rules go, others' stay (Z5, Z7)."""
    site.kube_proxy(mode)
    before = kubeproxy.chains(site.node, mode) if mode != "nftables" else set()
    with ExitStack() as stack:
        lasting = Lasting(site, stack)
        site.agent.start()
        lasting.check()
        report = site.migrate()
        lasting.check()
        assert "removed" in report
        for host in (site.shell, site.node):
            assert asked(host, site) == {"web1", "web2"}
        if mode == "nftables":
            assert "kube-proxy" not in site.node.run(["nft", "list", "tables"])
        else:
            after = kubeproxy.chains(site.node, mode)
            assert after == {name for name in before if name.split()[-1] in kubeproxy.FOREIGN}
            assert after
        lasting.check()
        assert json.loads(site.migrate("--dry-run", "--json"))["obstacles"] == []
    assert site.migrate().startswith("There are no rules")


def test_rules_of_others_stay_word_for_word(site: Site) -> None:
    """What is neither a chain of kube-proxy's nor a jump to one is left as it was."""
    site.kube_proxy("legacy")
    before = site.node.run(["iptables-legacy-save"]).splitlines()
    site.agent.start()
    site.migrate()
    after = site.node.run(["iptables-legacy-save"]).splitlines()
    own = ("KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-ROUTER", "MY-CHAIN", "CNI-HOSTPORT")
    expected = [
        line for line in before
        if line[:1] in ":-" and ("KUBE-" not in line or any(name in line for name in own))
    ]  # fmt: skip
    kept = [line for line in after if line[:1] in ":-"]
    assert [_plain(line) for line in kept] == [_plain(line) for line in expected]


def _plain(line: str) -> str:
    """Without counters."""
    return line.partition(" [")[0]


def test_device_and_sets_of_ipvs_mode_go(site: Site) -> None:
    """kube-ipvs0 and the ipsets of both families go, a set of somebody else's stays (Z6)."""
    node = site.node
    # This kernel has no dummy devices; a bridge of that name does as well.
    node.run(["ip", "link", "add", "kube-ipvs0", "type", "bridge"])
    for address in WEB.cluster:
        node.run(["ip", "address", "add", address, "dev", "kube-ipvs0"])
    names = ("KUBE-CLUSTER-IP", "KUBE-6-LOOP-BACK", "KUBE-SRC-ABCDEFGHIJKLMNOP")
    with node.namespace.entered(), IPSet() as sets:
        for name in names:
            sets.create(name, stype="hash:ip")
    rule = "-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst -j ACCEPT"
    text = f"*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n{rule}\nCOMMIT\n"
    node.run(["iptables-legacy-restore", "--noflush"], stdin=text)
    site.agent.start()
    parts = {part["kind"] for part in json.loads(site.migrate("--json"))["removed"]}
    assert parts == {"chains", "device", "ipsets"}
    assert "kube-ipvs0" not in node.run(["ip", "link"])
    with node.namespace.entered(), IPSet() as sets:
        assert [one.get_attr("IPSET_ATTR_SETNAME") for one in sets.list()] == [names[2]]
    assert asked(site.shell, site) == {"web1", "web2"}


def test_connections_through_ipvs_are_waited_for_then_all_of_it_goes(
    site: Site, dataplane: str
) -> None:
    """ipvs mode's leftovers carry connections; once those end virtual servers, device, sets and
    rules are removed (Z6).
    """
    node = site.node
    if dataplane == "ipvs":
        pytest.skip("the ipvs mode goes on with what a kube-proxy in that mode left")
    leave_ipvs(site)
    with node.namespace.entered():
        assert len(ipvs.virtual_servers()) == len(Family) * len(PROTOCOLS)
    with ExitStack() as stack:
        open_ones = [
            stack.enter_context(connection(site.shell, WEB.at_cluster_ip(family, Protocol.TCP)))
            for family in Family
        ]
        assert all(one.ping().ok for one in open_ones)
        site.agent.start()
        with pytest.raises(CommandError, match="waiting for 2 connections through IPVS"):
            site.migrate("--drain", "1")
        assert all(one.ping().ok for one in open_ones)
    removed = {part["kind"] for part in json.loads(site.migrate("--json"))["removed"]}
    assert removed == {"device", "virtual servers"}
    with node.namespace.entered(), IPSet() as sets:
        assert ipvs.virtual_servers() == ()
        left = {one.get_attr("IPSET_ATTR_SETNAME") for one in sets.list()}
        assert left == {name for name in SPECS if name not in kubeproxy_host.IPSETS}
    assert "kube-ipvs0" not in node.run(["ip", "link"])
    assert json.loads(site.migrate("--dry-run", "--json"))["found"] == []
    assert asked(site.shell, site) == {"web1", "web2"}


def leave_ipvs(site: Site) -> None:
    """Leave what kube-proxy in ipvs mode would: what ours writes, without the sign of ours.

    Skipped where the kernel has no IPVS.
    """
    node = site.node
    made = make_dataplane("ipvs", site.agent.settings)
    plans: dict[PlanKey, ServicePlan] = {}
    for family in Family:
        for protocol in PROTOCOLS:
            key = PlanKey(ServicePortName("tests", WEB.name, "", protocol), family)
            target = WEB.at_cluster_ip(family, protocol)
            frontend = Frontend(
                FrontendKey(target.address, target.port, protocol), FrontendKind.CLUSTER_IP
            )
            backends = sorted(
                (Backend(pod.address(family), WEB.target_port) for pod in site.pods),
                key=lambda each: each.address,
            )
            plans[key] = ServicePlan(key, (frontend,), tuple(backends), has_endpoints=True)
    with node.namespace.entered():
        missing = made.check().missing
        if missing:
            pytest.skip(str(UnsupportedHost(missing)))
        made.open()
        made.apply(DesiredState(plans))
        made.close()
        for variant in variants(tuple(Family)):
            if kubeproxy_host.is_ours(variant):
                mangle = variant.save("mangle")  # where kube-proxy has no rules in this mode
                variant.restore(removal(mangle, marker=False))
                variant.restore(f"*nat\n-X {kubeproxy_host.MARKER}\nCOMMIT\n")


def test_running_kube_proxy_is_refused(site: Site) -> None:
    """While kube-proxy runs nothing is removed: it would write its rules again."""
    site.kube_proxy("legacy")
    before = kubeproxy.chains(site.node, "legacy")
    with kube_proxy_process(site):
        eventually(lambda: ":10256 " in site.node.run(["ss", "-Hltn"]))
        site.agent.start()
        with pytest.raises(CommandError, match="kube-proxy runs") as caught:
            site.migrate()
        assert "patch daemonset kube-proxy" in caught.value.stderr
        assert _running(site) == {"process", "port 10256"}
    assert kubeproxy.chains(site.node, "legacy") == before
    site.migrate()
    assert kubeproxy.chains(site.node, "legacy") < before


@EVERY_MODE
def test_agent_and_check_say_beside_whom_they_start(site: Site, mode: str) -> None:
    """A kube-proxy that runs, or left rules, is a warning with the command to give."""
    site.kube_proxy(mode)
    with kube_proxy_process(site):
        site.agent.start()
        (line,) = eventually(lambda: _warnings(site))
        assert any("process" in detail for detail in line["details"])
        site.agent.stop()
    site.agent.start()
    _, line = eventually(lambda: _warnings(site), until=lambda lines: len(lines) == 2)
    assert line["command"] == "ebpf-svc migrate"
    assert line["details"]
    assert not any("process" in detail for detail in line["details"])
    found = json.loads(site.agent.command("check", "--json"))["checks"]
    states = {each["name"]: each["ok"] for each in found if each["of"] == "kube-proxy"}
    assert states == {"process": True, "rules": False}


def _warnings(site: Site) -> list[dict[str, Any]]:
    """What the agent has logged about kube-proxy."""
    lines = map(json.loads, site.agent.log_path.read_text().splitlines())
    return [line for line in lines if line["event"] == "kube-proxy.beside"]


def test_our_own_health_port_is_not_taken_for_kube_proxys(site: Site) -> None:
    """Our agent answers at kube-proxy's port in its own name; a process without it is found."""
    site.agent.start()
    eventually(lambda: ":10256 " in site.node.run(["ss", "-Hltn"]))
    assert _running(site) == set()
    with kube_proxy_process(site):
        assert _running(site) == {"process"}


def _running(site: Site) -> set[str]:
    said = json.loads(site.migrate("--dry-run", "--json"))
    return {sign["what"] for sign in said["running"]}


def test_without_our_agent_nothing_is_removed(site: Site) -> None:
    """No agent, or one that is gone: services would stop, so the command says what to start."""
    site.kube_proxy("nftables")
    with pytest.raises(CommandError, match="start it first"):
        site.migrate()
    site.agent.start()
    site.agent.kill()
    with pytest.raises(CommandError, match="start it first"):
        site.migrate()
    assert "kube-proxy" in site.node.run(["nft", "list", "tables"])


@EVERY_MODE
def test_what_we_do_not_serve_is_not_taken_away(site: Site, mode: str) -> None:
    """A frontend only kube-proxy knows stops the switch, by name; --force overrules."""
    other = Web(2)
    kubeproxy.write(site.node, mode, other, site.pods)
    site.agent.start()
    with pytest.raises(CommandError, match=f"{other.cluster.v4}:80/TCP"):
        site.migrate()
    assert ask(site.shell, other.cluster.v4, 80)[0].outcome is not Outcome.OK
    site.migrate("--force")
    assert json.loads(site.migrate("--dry-run", "--json"))["found"] == []


@EVERY_MODE
def test_undo_gives_back_without_a_reset(site: Site, mode: str) -> None:
    """New connections go to kube-proxy's rules while ours last; then no trace of us is left."""
    before = traces(site.node)
    site.agent.start()
    with ExitStack() as stack:
        lasting = Lasting(site, stack)
        with pytest.raises(CommandError, match="our agent runs"):
            site.migrate("--undo")
        site.agent.stop()
        with pytest.raises(CommandError, match="kube-proxy does not run"):
            site.migrate("--undo")
        with kube_proxy_process(site):
            with pytest.raises(CommandError, match="written no rules"):
                site.migrate("--undo")
            site.kube_proxy(mode)
            with pytest.raises(CommandError, match="waiting for 4 connections"):
                site.migrate("--undo", "--drain", "1")
            lasting.check()
            assert asked(site.shell, site) == {"web1", "web2"}
            assert _translated(site.node)
            lasting.check()
    with kube_proxy_process(site):
        # Told only where the agent lived: the rest it has left behind.
        argv = [*python_argv("ebpf_svc.cli"), "migrate", "--undo", "--yes", "--drain", "10"]
        said = site.node.run([*argv, "--run-dir", str(site.agent.settings.run_dir)])
        assert "Nothing of ours" in said
    after = traces(site.node)
    assert not any("ebpf-svc" in table for table in after["table"])
    assert {**after, "table": ()} == {**before, "table": ()}
    assert asked(site.shell, site) == {"web1", "web2"}


def _translated(node: Node) -> bool:
    """Whether netfilter has translated a connection from a frontend: kube-proxy's rules act."""
    return f"dst={WEB.cluster.v4} " in node.run(["conntrack", "-L", "-p", "tcp", "--dst-nat"])


@pytest.mark.parametrize("mode", ["legacy", "nft"])
def test_ipvs_mode_takes_over_from_iptables_mode(site: Site, dataplane: str, mode: str) -> None:
    """Its chains go without `migrate`, others' stay; connections live, `cleanup` leaves none."""
    if dataplane != "ipvs":
        pytest.skip("other modes leave these chains to `migrate`, or have them themselves")
    site.kube_proxy(mode)
    before = kubeproxy.chains(site.node, mode)
    foreign = {name for name in before if name.split()[-1] in kubeproxy.FOREIGN}
    with ExitStack() as stack:
        lasting = Lasting(site, stack)
        site.agent.start()
        eventually(lambda: "AAAAAAAA" not in " ".join(kubeproxy.chains(site.node, mode)))
        lasting.check()
        assert asked(site.shell, site) == {"web1", "web2"}
        assert site.migrate().startswith("There are no rules")
    site.agent.stop()
    site.agent.cleanup()
    assert kubeproxy.chains(site.node, mode) == foreign


@pytest.mark.parametrize("mode", ["legacy", "nft"])
def test_iptables_mode_takes_over_and_gives_back_in_place(
    site: Site, dataplane: str, mode: str
) -> None:
    """The same chains serve before, with and after us; connections and others' chains stay."""
    if dataplane != "iptables":
        pytest.skip("other modes have rules of their own beside kube-proxy's")
    site.kube_proxy(mode)
    before = kubeproxy.chains(site.node, mode)
    foreign = {name for name in before if name.split()[-1] in kubeproxy.FOREIGN}
    with ExitStack() as stack:
        lasting = Lasting(site, stack)
        site.agent.start()
        lasting.check()
        for host in (site.shell, site.node):
            assert asked(host, site) == {"web1", "web2"}
        during = kubeproxy.chains(site.node, mode)
        assert foreign <= during
        assert not [name for name in during if "AAAAAAAA" in name]  # stale ones of kube-proxy
        assert _marked(site, mode)
        assert site.migrate().startswith("There are no rules")
        site.agent.stop()
        with kube_proxy_process(site, FAKE_MODE):
            eventually(lambda: ":10249 " in site.node.run(["ss", "-Hltn"]))
            assert "Nothing of ours" in site.migrate("--undo")
        assert not _marked(site, mode)
        after = kubeproxy.chains(site.node, mode)
        assert after == {name for name in during if "EBPF-SVC" not in name}
        lasting.check()
        assert asked(site.shell, site) == {"web1", "web2"}


def _marked(site: Site, mode: str) -> bool:
    return ":EBPF-SVC " in site.node.run([f"iptables-{mode}-save", "-t", "nat"])
