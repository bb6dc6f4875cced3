"""A real kube-proxy: its place is taken under live connections, and given back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ebpf_svc.bench.serving import KubeProxy, release_of
from ebpf_svc.errors import CommandError
from ebpf_svc.testbed.agent import Agent
from ebpf_svc.testbed.cluster import Cluster
from tests.lib.takeover import WEB, Lasting, Site, asked, site_of
from tests.lib.waiting import eventually

START_S = 60.0
BOTH = {"web1", "web2"}
SHARED = {"KUBE-MARK-DROP"}
"""The kubelet of that time made this chain, too, and jumped to it (Z5)."""


@pytest.fixture
def site(cluster: Cluster) -> Site:
    return site_of(cluster, "ebpf")


@pytest.fixture
def kube_proxy(site: Site, binaries: Path) -> Iterator[KubeProxy]:
    items = WEB.manifests(site.pods)
    made = KubeProxy(site.node, binaries / "kube-proxy", "iptables", items)
    yield made
    site.agent.stop()
    made.close()


def test_place_is_taken_and_given_back(site: Site, kube_proxy: KubeProxy) -> None:
    """Its connections outlive its rules, ours outlive ours, nothing of either is left (Z5-Z7)."""
    kube_proxy.start()
    eventually(lambda: asked(site.shell, site) == BOTH, within_s=START_S)
    before = kube_chains(site)
    assert before
    with ExitStack() as stack:
        lasting = Lasting(site, stack)
        site.agent.start()
        with pytest.raises(CommandError, match="kube-proxy runs"):
            site.migrate()
        kube_proxy.stop()
        lasting.check()
        report = json.loads(site.migrate("--json"))
        assert report["removed"]
        lasting.check()
        assert {name.split(":")[-1] for name in kube_chains(site)} <= SHARED
        for host in (site.shell, site.node):
            assert asked(host, site) == BOTH
    with ExitStack() as stack:
        lasting = Lasting(site, stack)
        site.agent.stop()
        kube_proxy.start()
        eventually(lambda: kube_chains(site) == before, within_s=START_S)
        lasting.check()
    assert "Nothing of ours" in site.migrate("--undo", "--drain", "20")
    assert asked(site.shell, site) == BOTH


def test_iptables_mode_writes_chains_of_the_same_names(site: Site, kube_proxy: KubeProxy) -> None:
    """Names of services and endpoints are hashes that tools know: ours are kube-proxy's (I1)."""
    kube_proxy.start()
    eventually(lambda: asked(site.shell, site) == BOTH, within_s=START_S)
    theirs = per_service(site)
    kube_proxy.stop()
    agent = Agent(site.node, site.agent.settings, mode="iptables")
    try:
        agent.start()
        assert asked(site.shell, site) == BOTH
        # Chains of frontends outside the cluster got names of their own with 1.24.
        ours = {name for name in per_service(site) if not name.startswith("KUBE-EXT-")}
        assert ours - theirs == set()
        assert {name for name in theirs if name.startswith(("KUBE-SVC-", "KUBE-SEP-"))} <= ours
    finally:
        agent.stop()


def test_release_is_told(binaries: Path) -> None:
    """What was built is what was meant."""
    assert release_of(binaries / "kube-proxy") == (1, 20)


def kube_chains(site: Site) -> set[str]:
    """kube-proxy's chains of both families, with those of services."""
    found = set()
    for tool in ("iptables-save", "ip6tables-save"):
        for line in site.node.run([tool]).splitlines():
            if line.startswith(":KUBE-"):
                found.add(f"{tool} {line.split()[0]}")
    return found


def per_service(site: Site) -> set[str]:
    """Names of the chains of services and endpoints, whatever the family."""
    names = {each.split(":")[-1] for each in kube_chains(site)}
    return {name for name in names if len(name.rpartition("-")[2]) == len("3TM4MSTUTVMUOZ6S")}
