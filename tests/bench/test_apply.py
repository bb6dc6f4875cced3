"""The apply benchmark runs, on a cluster small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ebpf_svc.bench import apply, kubeproxy
from ebpf_svc.bench.population import Population
from ebpf_svc.config import Settings
from ebpf_svc.model.net import Family
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner


@pytest.mark.root
def test_benchmark_prints_a_table_and_writes_every_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every size has its rows; a change costs the same writes at each."""
    path = tmp_path / "apply.json"
    words = [
        "--services",
        "5",
        "40",
        "--endpoints",
        "3",
        "--cold",
        "2",
        "--changes",
        "4",
        "--no-agent",
    ]
    assert apply.main([*words, "--no-agent", "--json", str(path)]) == 0
    series = {each["name"]: each["samples"] for each in json.loads(path.read_text())["series"]}
    assert len(series["40 x 3 cold, plan and apply"]) == 2
    assert series["40 x 3 cold, map writes"] == [40 * (3 + 3 + 3 + 1)]
    assert series["5 x 3 one endpoint, map writes"] == series["40 x 3 one endpoint, map writes"]
    assert "40 x 3 one endpoint [ms]" in capsys.readouterr().out


def test_population_plans_to_as_many_services_and_endpoints() -> None:
    """What is measured is what the row says."""
    population = Population(7, 3)
    planner = Planner(PlanOptions.from_settings(Settings()))
    desired = planner.plan(population.snapshot())
    assert len(desired.plans) == 7
    assert {plan.key.family for plan in desired.plans.values()} == {Family.V4}
    ends = [(each.address, each.port) for plan in desired.plans.values() for each in plan.backends]
    assert len(ends) == len(set(ends)) == 21


def test_change_of_a_population_replaces_one_endpoint() -> None:
    """All other services keep their identity, as in a store."""
    population = Population(7, 3)
    before = population.snapshot()
    after = population.changed(before, 5)
    differing = [name for name in before.slices if before.slices[name] is not after.slices[name]]
    assert len(differing) == 1
    assert after.services is before.services
    (old,), (new,) = before.slices[differing[0]], after.slices[differing[0]]
    assert len(set(old.endpoints) - set(new.endpoints)) == 1
    assert len(new.endpoints) == 3


def test_manifests_of_a_population_hold_both_objects_of_each_service(tmp_path: Path) -> None:
    """The agent is given what the planner was measured with."""
    Population(1001, 2).write_manifests(tmp_path)
    items = [
        item
        for path in sorted(tmp_path.iterdir())
        for item in json.loads(path.read_text())["items"]
    ]
    assert len(list(tmp_path.iterdir())) == 2
    kinds = [item["kind"] for item in items]
    assert kinds.count("Service") == kinds.count("EndpointSlice") == 1001
    assert items[0]["spec"]["clusterIP"] == "10.96.0.1"


def test_churn_changes_one_service_in_a_hundred() -> None:
    """One endpoint each; the rest keep their identity."""
    population = Population(300, 2)
    before = population.snapshot()
    after = population.churned(before, 5)
    differing = [name for name in before.slices if before.slices[name] is not after.slices[name]]
    assert len(differing) == 3
    for name in differing:
        (old,), (new,) = before.slices[name], after.slices[name]
        assert len(set(old.endpoints) - set(new.endpoints)) == 1


def test_rollout_replaces_every_endpoint_of_its_services() -> None:
    """And two rollouts in a row share no address."""
    population = Population(10, 3)
    first = population.rolled_out(population.snapshot(), 1, services=4)
    second = population.rolled_out(first, 2, services=4)
    addresses = [
        {each.address for (one,) in snapshot.slices.values() for each in one.endpoints}
        for snapshot in (population.snapshot(), first, second)
    ]
    assert len(addresses[0] - addresses[1]) == len(addresses[1] - addresses[2]) == 12


def test_kube_proxys_figures_stand_beside_the_size_they_are_of() -> None:
    """Its own mode where it has it, with both variants of the tool, all of its modes else; nothing
    for other sizes.
    """
    assert kubeproxy.beside("nftables", 10_000, 10, "cold_s") == "nftables 11.3-14.4"
    assert kubeproxy.beside("ebpf", 10_000, 10, "cold_s") == "iptables-legacy 9, nftables 11.3-14.4"
    both = "iptables-legacy 3.4, iptables-nft 299"
    assert kubeproxy.beside("iptables", 5_000, 10, "cold_s") == both
    assert kubeproxy.beside("ebpf", 10_000, 3, "cold_s") == ""
    assert kubeproxy.beside("ebpf", 123, 10, "cold_s") == ""
