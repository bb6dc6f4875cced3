"""Rules of one service port, word for word as kube-proxy's, and what cannot be one."""

from __future__ import annotations

import re

import pytest

from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.dataplane.iptables.services import render
from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.errors import ApplyError
from ebpf_svc.model.desired import (
    Backend,
    Frontend,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.model.service import ServicePortName

NAME = ServicePortName("ns1", "svc1", "p80", Protocol.TCP)
HASH, ENDPOINT = "XPGD46QRK7WJZT7O", "SXIVWICOYRO3J4NJ"
"""kube-proxy's own names for that service port and 10.180.0.1:80 (I17)."""
PODS = RuleOptions(Family.V4, pods=PodMatch(prefix="10.0.0.0/8"))
OUTSIDE = Sources.NODE | Sources.EXTERNAL
CLUSTER = (Sources.NONE, Sources.ALL)
LOCAL = (Sources.EXTERNAL, Sources.NODE)


def cluster_ip(local_for: Sources = Sources.NONE, masquerade_for: Sources = OUTSIDE) -> Frontend:
    key = FrontendKey("172.30.0.41", 80, Protocol.TCP)
    return Frontend(key, FrontendKind.CLUSTER_IP, local_for, masquerade_for)


def external(
    kind: FrontendKind,
    address: str,
    port: int,
    treatment: tuple[Sources, Sources] = CLUSTER,
    ranges: tuple[str, ...] | None = None,
) -> Frontend:
    return Frontend(FrontendKey(address, port, Protocol.TCP), kind, *treatment, ranges)


def plan(*frontends: Frontend, backends: tuple[Backend, ...], affinity_s: int = 0) -> ServicePlan:
    return ServicePlan(
        PlanKey(NAME, Family.V4), tuple(frontends), backends, bool(backends), affinity_s
    )


ONE = (Backend("10.180.0.1", 80),)


def test_a_cluster_ip_is_kube_proxys_word_for_word() -> None:
    """I7, I11, I14 with the comments of I18 and the names of I17."""
    rules = render(plan(cluster_ip(), backends=ONE), PODS)
    service, endpoint = f"KUBE-SVC-{HASH}", f"KUBE-SEP-{ENDPOINT}"
    assert rules.entries["nat"] == [
        "KUBE-SERVICES -d 172.30.0.41/32 -p tcp -m comment --comment "
        f'"ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j {service}'
    ]
    assert rules.entries["filter"] == []
    assert rules.chains == {
        service: (
            f"{service} ! -s 10.0.0.0/8 -d 172.30.0.41/32 -p tcp -m comment --comment "
            '"ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ',
            f'{service} -m comment --comment "ns1/svc1:p80 -> 10.180.0.1:80" -j {endpoint}',
        ),
        endpoint: (
            f'{endpoint} -s 10.180.0.1/32 -m comment --comment "ns1/svc1:p80" -j KUBE-MARK-MASQ',
            f'{endpoint} -p tcp -m comment --comment "ns1/svc1:p80" -m tcp '
            "-j DNAT --to-destination 10.180.0.1:80",
        ),
    }


def test_many_endpoints_get_equal_shares() -> None:
    """I13: rule i of n has 1/(n-i), and the last has no condition."""
    backends = tuple(Backend(f"10.180.0.{n}", 80) for n in range(1, 5))
    chain = render(plan(cluster_ip(), backends=backends), PODS).chains[f"KUBE-SVC-{HASH}"]
    chances = [re.findall(r"--probability (\S+)", rule) for rule in chain[1:]]
    assert chances == [["0.25000000000"], ["0.33333333349"], ["0.50000000000"], []]


def test_affinity_is_asked_before_chance() -> None:
    """I12: a rule for each endpoint that looks back, and one in its chain that remembers."""
    rules = render(plan(cluster_ip(), backends=ONE, affinity_s=10_800), PODS)
    chain = rules.chains[f"KUBE-SVC-{HASH}"]
    assert "--rcheck --seconds 10800 --reap --name KUBE-SEP-" in chain[1]
    assert "--rcheck" not in chain[2]
    assert f"--set --name KUBE-SEP-{ENDPOINT}" in rules.chains[f"KUBE-SEP-{ENDPOINT}"][1]


def test_a_kernel_that_cannot_remember_balances_all_the_same() -> None:
    """Without xt_recent no rule names it."""
    options = RuleOptions(Family.V4, pods=PODS.pods, has_recent=False)
    rules = render(plan(cluster_ip(), backends=ONE, affinity_s=10_800), options)
    assert not [rule for held in rules.chains.values() for rule in held if "recent" in rule]


@pytest.mark.parametrize(
    ("pods", "masquerade_for", "expected"),
    [
        (PodMatch(prefix="10.0.0.0/8"), OUTSIDE, "! -s 10.0.0.0/8 -d 172.30.0.41/32 -p tcp"),
        (PodMatch(device="cbr0"), OUTSIDE, "-d 172.30.0.41/32 ! -i cbr0 -p tcp"),
        (PodMatch(device_prefix="cali"), OUTSIDE, "-d 172.30.0.41/32 ! -i cali+ -p tcp"),
        (None, Sources.ALL, "-d 172.30.0.41/32 -p tcp"),
    ],
)
def test_whoever_is_no_pod_is_masqueraded(
    pods: PodMatch | None, masquerade_for: Sources, expected: str
) -> None:
    """P8, D1, D3: the first rule of the chain the cluster IP leads to (I11)."""
    rules = render(
        plan(cluster_ip(masquerade_for=masquerade_for), backends=ONE), RuleOptions(Family.V4, pods)
    )
    assert rules.chains[f"KUBE-SVC-{HASH}"][0].startswith(f"KUBE-SVC-{HASH} {expected} ")


def test_a_node_port_of_policy_cluster_is_masqueraded() -> None:
    """I8, I9, P6: one rule however many addresses answer."""
    ports = [external(FrontendKind.NODE_PORT, each, 30080) for each in ("127.0.0.1", "192.0.2.1")]
    rules = render(plan(cluster_ip(), *ports, backends=ONE), PODS)
    chain = f"KUBE-EXT-{HASH}"
    assert rules.entries["nat"][1:] == [
        f'KUBE-NODEPORTS -p tcp -m comment --comment "ns1/svc1:p80" -m tcp --dport 30080 -j {chain}'
    ]
    assert rules.chains[chain] == (
        f'{chain} -m comment --comment "masquerade traffic for ns1/svc1:p80 external destinations" '
        "-j KUBE-MARK-MASQ",
        f"{chain} -j KUBE-SVC-{HASH}",
    )


def test_policy_local_spares_pods_and_the_node() -> None:
    """I9, P5: pods keep their source, the node is masqueraded, the rest gets the Local list."""
    port = external(FrontendKind.NODE_PORT, "192.0.2.1", 30080, LOCAL)
    backends = (Backend("10.180.0.1", 80, True, True), Backend("10.180.9.1", 80))
    chain = render(plan(port, backends=backends), PODS).chains[f"KUBE-EXT-{HASH}"]
    targets = [(rule.split()[1], rule.split()[-1]) for rule in chain]
    assert targets == [
        ("-s", f"KUBE-SVC-{HASH}"),
        ("-m", "KUBE-MARK-MASQ"),
        ("-m", f"KUBE-SVC-{HASH}"),
        ("-j", f"KUBE-SVL-{HASH}"),
    ]
    assert ["--src-type LOCAL" in rule for rule in chain] == [False, True, True, False]


def test_policy_local_without_local_endpoints_drops_the_rest() -> None:
    """I2, P4: who is not sent to the Cluster list falls to a DROP in filter."""
    port = external(FrontendKind.NODE_PORT, "192.0.2.1", 30080, LOCAL)
    rules = render(plan(port, backends=ONE), PODS)
    assert not rules.chains[f"KUBE-EXT-{HASH}"][-1].endswith(f"-j KUBE-SVL-{HASH}")
    assert rules.entries["filter"] == [
        'KUBE-EXTERNAL-SERVICES -d 192.0.2.1/32 -p tcp -m comment --comment "ns1/svc1:p80 has no '
        'local endpoints" -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j DROP'
    ]


def test_without_endpoints_every_address_refuses() -> None:
    """I1, I2, P2: nothing in nat; TCP gets a reset, which the kernel does not limit."""
    vip = external(FrontendKind.LOAD_BALANCER, "198.51.100.1", 80, ranges=("203.0.113.0/24",))
    rules = render(plan(cluster_ip(), vip, backends=()), PODS)
    assert (rules.chains, rules.entries["nat"]) == ({}, [])
    assert [rule.split()[0] for rule in rules.entries["filter"]] == [
        "KUBE-SERVICES",
        "KUBE-EXTERNAL-SERVICES",
    ]
    assert all(
        rule.endswith("-j REJECT --reject-with tcp-reset") for rule in rules.entries["filter"]
    )


def test_source_ranges_guard_a_vip() -> None:
    """I10, I5: ranges lead on, the rest falls to KUBE-PROXY-FIREWALL."""
    ranges = ("198.51.100.1/32", "203.0.113.0/24")
    vip = external(FrontendKind.LOAD_BALANCER, "198.51.100.1", 80, ranges=ranges)
    rules = render(plan(cluster_ip(), vip, backends=ONE), PODS)
    chain = f"KUBE-FW-{HASH}"
    assert [rule.split()[1:3] for rule in rules.chains[chain][:-1]] == [["-s", r] for r in ranges]
    assert " -j " not in rules.chains[chain][-1]
    assert rules.entries["nat"][-1].endswith(f'loadbalancer IP" -m tcp --dport 80 -j {chain}')
    assert rules.entries["filter"][0].startswith("KUBE-PROXY-FIREWALL -d 198.51.100.1/32 ")
    assert rules.entries["filter"][0].endswith("-j DROP")


def test_large_clusters_leave_out_comments_of_endpoints() -> None:
    """I21: not those of rules in shared chains, which tools read."""
    rules = render(plan(cluster_ip(), backends=ONE), PODS, comments=False)
    endpoint = rules.chains[f"KUBE-SEP-{ENDPOINT}"]
    assert not [rule for rule in endpoint if "comment" in rule]
    assert "comment" not in rules.chains[f"KUBE-SVC-{HASH}"][-1]
    assert "cluster IP" in rules.entries["nat"][0]


def test_node_ports_on_ipv6_loopback_have_no_place() -> None:
    """I7: the kernel lets no packet from ::1 leave."""
    key = PlanKey(NAME, Family.V6)
    ports = tuple(external(FrontendKind.NODE_PORT, each, 30080) for each in ("::1", "fd00::1"))
    only = ServicePlan(key, ports[:1], (Backend("fd00::9", 80),), has_endpoints=True)
    options = RuleOptions(Family.V6, pods=PodMatch(prefix="fd00::/16"))
    assert render(only, options).chains == {}
    both = ServicePlan(key, ports, (Backend("fd00::9", 80),), has_endpoints=True)
    assert any("[fd00::9]:80" in rule for rule in render(both, options).chains.popitem()[1])


@pytest.mark.parametrize(
    "frontend",
    [
        cluster_ip(local_for=Sources.POD),
        cluster_ip(masquerade_for=Sources.POD),
        external(FrontendKind.NODE_PORT, "192.0.2.1", 30080, (Sources.NONE, Sources.NODE)),
        external(FrontendKind.NODE_PORT, "192.0.2.1", 30080, (Sources.ALL, Sources.NODE)),
    ],
)
def test_treatments_without_a_chain_are_refused(frontend: Frontend) -> None:
    """Better not served than served in another way than planned."""
    with pytest.raises(ApplyError, match="ns1/svc1:p80"):
        render(plan(frontend, backends=ONE), PODS)
