"""What iptables mode alone has: two backends of iptables, repair, failures of single rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.iptables.dataplane import IptablesDataplane
from ebpf_svc.host import kubeproxy
from ebpf_svc.host.iptables import BACKENDS, Variant
from ebpf_svc.model.net import Family, Sources
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.testbed.cluster import Cluster
from ebpf_svc.testbed.host import Node
from tests.lib.law import check_law
from tests.lib.plans import make_desired, make_frontend, make_plan
from tests.lib.strategies import snapshot_sequences

LAWS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SELECTIONS = ((), ("192.168.0.0/16", "fd00:192::/64"), ("localhost", "primary"), ("10.97.0.0/16",))
HINT = "KUBE-IPTABLES-HINT"


@pytest.fixture(scope="module")
def site(no_leftovers: None, artifact_cache: Path) -> Iterator[tuple[Node, Settings]]:
    """A node without an agent, and what its agent would be told."""
    with Cluster.create(node_count=1, cache_dir=artifact_cache) as cluster:
        node = cluster.nodes[0]
        yield node, cluster.settings(node, cluster.folder)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, site: tuple[Node, Settings]) -> Iterator[str]:
    """The backend that the node's kubelet says it uses."""
    variant = Variant(Family.V4, request.param)
    node, _ = site
    with node.namespace.entered():
        variant.restore(f"*mangle\n:{HINT} - [0:0]\nCOMMIT\n")
    yield request.param
    with node.namespace.entered():
        variant.restore(f"*mangle\n:{HINT} - [0:0]\n-X {HINT}\nCOMMIT\n")


@contextmanager
def opened(site: tuple[Node, Settings]) -> Iterator[IptablesDataplane]:
    """A dataplane on the node, gone with its rules afterwards."""
    node, given_settings = site
    with node.namespace.entered():
        made = IptablesDataplane(given_settings)
        made.open()
        try:
            yield made
        finally:
            made.cleanup()


@LAWS
@given(data=st.data())
def test_both_backends_obey_the_law(
    backend: str, site: tuple[Node, Settings], data: st.DataObject
) -> None:
    """What is applied is read back, whichever iptables the host uses and whatever is selected."""
    node, given_settings = site
    chosen = given_settings.model_copy(
        update={
            "node_port_addresses": data.draw(st.sampled_from(SELECTIONS)),
            "localhost_node_ports": data.draw(st.booleans()),
            "masquerade_all": data.draw(st.booleans()),
            "cluster_cidrs": data.draw(st.sampled_from([(), given_settings.cluster_cidrs])),
        }
    )
    planner = Planner(PlanOptions.from_settings(chosen))
    states = [planner.plan(each) for each in data.draw(snapshot_sequences())]
    with node.namespace.entered():
        check_law(lambda: IptablesDataplane(chosen), node, states)


def test_only_the_backend_of_the_host_gets_rules(backend: str, site: tuple[Node, Settings]) -> None:
    """Kubelet's hint decides; the other backend stays empty."""
    other = next(each for each in BACKENDS if each != backend)
    with opened(site) as dataplane:
        dataplane.apply(make_desired(make_plan()))
        assert kubeproxy.MARKER in Variant(Family.V4, backend).save("nat")["nat"].chains
        assert kubeproxy.MARKER in Variant(Family.V6, backend).save("nat")["nat"].chains
        tables = Variant(Family.V4, other).save()
        assert not [table.name for table in tables.values() if "KUBE-SERVICES" in table.chains]


def test_rules_move_with_the_host_to_the_other_backend(site: tuple[Node, Settings]) -> None:
    """A host that switches its iptables keeps no rules of ours in the old one."""
    node, given_settings = site
    with node.namespace.entered():
        legacy, nft = (Variant(Family.V4, each) for each in BACKENDS)
        legacy.restore(f"*mangle\n:{HINT} - [0:0]\nCOMMIT\n")
        try:
            first = IptablesDataplane(given_settings)
            first.open()
            first.apply(make_desired(make_plan()))
            first.close()
        finally:
            legacy.restore(f"*mangle\n:{HINT} - [0:0]\n-X {HINT}\nCOMMIT\n")
        nft.restore(f"*mangle\n:{HINT} - [0:0]\nCOMMIT\n")
    try:
        with opened(site) as dataplane:
            dataplane.apply(make_desired(make_plan()))
            assert kubeproxy.MARKER in nft.save("nat")["nat"].chains
            assert "KUBE-SERVICES" not in legacy.save("nat")["nat"].chains
    finally:
        with node.namespace.entered():
            nft.restore(f"*mangle\n:{HINT} - [0:0]\n-X {HINT}\nCOMMIT\n")


@pytest.mark.parametrize("large", [False, True])
def test_flushed_rules_come_back_with_the_next_resync(
    backend: str, site: tuple[Node, Settings], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`iptables -F; iptables -X` is noticed and mended, in large clusters too (I24)."""
    monkeypatch.setattr(
        "ebpf_svc.dataplane.iptables.family.LARGE_ENDPOINT_COUNT", 0 if large else 1000
    )
    state = make_desired(make_plan())
    with opened(site) as dataplane:
        dataplane.apply(state)
        assert dataplane.apply(state, resync=True).repaired == ()
        text = "".join(f"*{table}\n-F\n-X\nCOMMIT\n" for table in ("mangle", "nat", "filter"))
        Variant(Family.V4, backend).restore(text)
        assert not dataplane.read()
        report = dataplane.apply(state, resync=True)
        assert any("chain KUBE-SERVICES was missing" in each for each in report.repaired)
        assert any("jump from PREROUTING" in each for each in report.repaired)
        assert dataplane.read() == dataplane.view(state)


def test_what_others_did_to_our_chains_is_undone(backend: str, site: tuple[Node, Settings]) -> None:
    """A rule too many, a rule too few, a stale chain: each is named and mended (I22)."""
    state = make_desired(make_plan())
    stale = "KUBE-SVC-AAAAAAAAAAAAAAAA"
    with opened(site) as dataplane:
        dataplane.apply(state)
        variant = Variant(Family.V4, backend)
        chain = next(
            each for each in variant.save("nat")["nat"].chains if each.startswith("KUBE-SVC-")
        )
        variant.restore(
            f"*nat\n:{stale} - [0:0]\n-F {chain}\n-A KUBE-SERVICES -d 10.96.9.9/32 -j {stale}\n"
            "-I KUBE-SERVICES -j RETURN\n-F KUBE-POSTROUTING\nCOMMIT\n"
        )
        repaired = " ".join(dataplane.apply(state, resync=True).repaired)
        for expected in (chain, stale, "KUBE-POSTROUTING was changed", "rules"):
            assert expected in repaired
        assert dataplane.read() == dataplane.view(state)
        assert dataplane.apply(state, resync=True).writes == 0


def test_a_change_on_rules_that_were_tampered_with_still_arrives(
    backend: str, site: tuple[Node, Settings]
) -> None:
    """The partial write fails, everything is read, and the change is there (I23)."""
    one, two = make_plan(), make_plan("api", make_frontend("10.96.0.2"))
    with opened(site) as dataplane:
        dataplane.apply(make_desired(one, two))
        Variant(Family.V4, backend).restore("*nat\n-F KUBE-SERVICES\nCOMMIT\n")
        report = dataplane.apply(make_desired(one))
        assert report.failed == ()
        assert dataplane.read() == dataplane.view(make_desired(one))
        failures = {
            each.name: each.value
            for each in dataplane.series()
            if each.labels["ip_family"] == "IPv4"
        }
        assert failures["kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total"] == 1


def test_a_service_the_kernel_refuses_does_not_hold_back_others(
    backend: str, site: tuple[Node, Settings]
) -> None:
    """Each refused service port is reported by name; the others are served, and it heals."""
    good = [make_plan(f"s{n}", make_frontend(f"10.96.0.{n + 1}")) for n in range(5)]
    bad = make_plan("bad", make_frontend("10.96.1.1"), backends=["10.1.0.999"])
    with opened(site) as dataplane:
        report = dataplane.apply(make_desired(*good, bad))
        assert [error.service for error in report.failed] == [str(bad.key)]
        assert dataplane.read() == dataplane.view(make_desired(*good))
        report = dataplane.apply(make_desired(*good[1:], bad))
        assert [error.service for error in report.failed] == [str(bad.key)]
        assert dataplane.read() == dataplane.view(make_desired(*good[1:]))
        assert dataplane.apply(make_desired(*good)).failed == ()
        assert dataplane.read() == dataplane.view(make_desired(*good))


def test_a_treatment_no_chain_can_express_is_reported(site: tuple[Node, Settings]) -> None:
    """Nothing is served in a wrong way: the service port fails by name."""
    odd = make_plan("odd", make_frontend("10.96.0.9", local_for=Sources.POD))
    fine = make_plan()
    with opened(site) as dataplane:
        report = dataplane.apply(make_desired(fine, odd))
        assert [error.service for error in report.failed] == [str(odd.key)]
        assert dataplane.read() == dataplane.view(make_desired(fine))


def test_rules_of_a_kube_proxy_are_taken_over(backend: str, site: tuple[Node, Settings]) -> None:
    """What it left is corrected in place, not doubled; its stale chains go (I22)."""
    plan = make_plan()
    old = "KUBE-SVC-AAAAAAAAAAAAAAAA"
    with opened(site) as dataplane:
        dataplane.apply(make_desired(plan))
        variant = Variant(Family.V4, backend)
        variant.restore(
            f"*nat\n:{old} - [0:0]\n-X EBPF-SVC\n"
            f"-A KUBE-SERVICES -d 10.96.7.7/32 -j {old}\nCOMMIT\n"
        )
        assert dataplane.read() == {}  # not ours any more
        dataplane.close()
        dataplane.open()
        report = dataplane.apply(make_desired(plan))
        assert (report.failed, report.repaired) == ((), ())
        table = variant.save("nat")["nat"]
        assert old not in table.chains
        assert sum(rule.chain == "PREROUTING" for rule in table.rules) == 1
        assert dataplane.read() == dataplane.view(make_desired(plan))


def test_our_own_rules_are_not_taken_for_a_kube_proxys(site: tuple[Node, Settings]) -> None:
    """`check` and `migrate` leave alone what our agent serves with."""
    with opened(site) as dataplane:
        dataplane.apply(make_desired(make_plan()))
        assert kubeproxy.leftovers() == ()


def test_cleanup_leaves_the_rules_of_a_kube_proxy(
    backend: str, site: tuple[Node, Settings]
) -> None:
    """Without our marker, rules are not ours to remove."""
    node, given_settings = site
    with node.namespace.entered():
        variant = Variant(Family.V4, backend)
        variant.restore("*nat\n:KUBE-SERVICES - [0:0]\n-I OUTPUT -j KUBE-SERVICES\nCOMMIT\n")
        IptablesDataplane(given_settings).cleanup()
        assert "KUBE-SERVICES" in variant.save("nat")["nat"].chains
        variant.restore(
            "*nat\n:KUBE-SERVICES - [0:0]\n-D OUTPUT -j KUBE-SERVICES\n-X KUBE-SERVICES\nCOMMIT\n"
        )
