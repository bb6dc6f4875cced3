"""The iptables rules of ipvs mode: about sets that have elements, told from those of others."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.ipvs import rules, ruleset
from ebpf_svc.dataplane.ipvs.rules import FILTER, MANGLE, NAT, RuleOptions
from ebpf_svc.dataplane.ipvs.ruleset import difference, removal
from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.host.iptables import Table, parse
from ebpf_svc.model.net import Family

OPTIONS = RuleOptions(Family.V4, PodMatch(prefix="10.244.0.0/16"))
BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")


def saved(text: str, *foreign: str) -> dict[str, Table]:
    """What a kernel holds after it was told `text`, beside rules of others in each table."""
    lines = []
    for line in text.splitlines():
        if line.startswith("*"):
            lines += [line, *(f":{chain} ACCEPT [0:0]" for chain in BUILT_IN)]
            lines += foreign
        else:
            lines.append(line.replace("-I ", "-A ", 1))
    return parse("\n".join(lines))


def test_what_is_there_costs_nothing() -> None:
    """A restart writes no rule, whatever others have."""
    first = difference(OPTIONS, {})
    assert first.count
    tables = saved(first.text, ":OTHER - [0:0]", "-A INPUT -j OTHER")
    assert difference(OPTIONS, tables) == ruleset.Changes("", 0, ())


def test_loopback_is_dismissed_first() -> None:
    """Row 62: the first rule of nat/KUBE-SERVICES."""
    first, *_ = rules.contents(OPTIONS)[NAT]["KUBE-SERVICES"]
    assert first == "KUBE-SERVICES -s 127.0.0.0/8 -j RETURN"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (OPTIONS, "! -s 10.244.0.0/16 -m set --match-set KUBE-CLUSTER-IP dst,dst"),
        (
            RuleOptions(Family.V4, PodMatch(device="cni0")),
            "! -i cni0 -m set --match-set KUBE-CLUSTER-IP dst,dst",
        ),
        (
            RuleOptions(Family.V4, PodMatch(device_prefix="cali")),
            "! -i cali+ -m set --match-set KUBE-CLUSTER-IP dst,dst",
        ),
        (RuleOptions(Family.V4), "-m set --match-set KUBE-CLUSTER-IP src,dst"),
        (
            RuleOptions(Family.V6, masquerade_all=True),
            "-m set --match-set KUBE-6-CLUSTER-IP dst,dst",
        ),
    ],
)
def test_who_is_masqueraded_at_cluster_ips(options: RuleOptions, expected: str) -> None:
    """V15: all, those that are no pods, or what a VIP itself sends."""
    chain = rules.contents(options)[NAT]["KUBE-SERVICES"]
    assert f"KUBE-SERVICES {expected} -j KUBE-MARK-MASQ" in chain


def test_policy_local_returns_before_ports_are_marked() -> None:
    """V15: per protocol the set of policy Local comes before the one with all ports."""
    chain = rules.contents(OPTIONS)[NAT]["KUBE-NODE-PORT"]
    for protocol in ("TCP", "UDP", "SCTP"):
        positions = [
            number for number, rule in enumerate(chain) if f"-p {protocol.lower()} " in rule
        ]
        order = [chain[number] for number in positions]
        assert [rule.split()[-1] for rule in order] == [
            "KUBE-MARK-MASQ",
            "RETURN",
            "KUBE-MARK-MASQ",
        ]
        assert "--src-type LOCAL" in order[0]
        assert "-LOCAL-" in order[1]
        assert "-LOCAL-" not in order[2]


def test_refusal_comes_before_everything_else_of_the_filter() -> None:
    """P2, V16: what has no endpoints is refused though its address is a service's; only what opens
    something is looked at.
    """
    chain = rules.contents(OPTIONS)[FILTER]["KUBE-IPVS-FILTER"]
    assert chain[0].endswith("-m conntrack ! --ctstate NEW -j RETURN")
    assert "KUBE-NO-ENDPOINTS" in chain[1]
    assert chain[1].endswith("tcp-reset")
    assert "KUBE-NO-ENDPOINTS" in chain[2]
    assert "KUBE-IPVS-IPS" in chain[-1]
    assert chain[-1].endswith("icmp-port-unreachable")


def test_damage_is_found_and_only_it_is_written() -> None:
    """A chain changed, a jump gone: both come back, the rest is not touched."""
    text = difference(OPTIONS, {}).text
    lines = [
        line for line in text.splitlines()
        if "-j DROP" not in line and not line.startswith("-I POSTROUTING")
    ]  # fmt: skip
    changes = difference(OPTIONS, saved("\n".join(lines)))
    assert changes.found == (
        "IPv4 nat: jump to KUBE-POSTROUTING was missing",
        "IPv4 filter: chain KUBE-SOURCE-RANGES-FIREWALL was changed",
        "IPv4 mangle: chain KUBE-SOURCE-RANGES-FIREWALL was changed",
    )
    assert sorted(line for line in changes.text.splitlines() if line.startswith(":")) == [
        ":KUBE-SOURCE-RANGES-FIREWALL - [0:0]",
        ":KUBE-SOURCE-RANGES-FIREWALL - [0:0]",
    ]


def test_wording_of_the_hosts_tool_is_accepted_once_it_is_known() -> None:
    """A tool that prints rules another way does not make us write for ever."""
    text = difference(OPTIONS, {}).text.replace("--set-xmark 0x4000/0x4000", "--or-mark 0x4000")
    tables = saved(text)
    assert difference(OPTIONS, tables).count
    wording = ruleset.wording_of(OPTIONS, tables)
    assert difference(OPTIONS, tables, wording=wording).count == 0


FEW = {"KUBE-CLUSTER-IP", "KUBE-LOOP-BACK", "KUBE-IPVS-IPS"}
"""Occupied by a service of type ClusterIP."""
GUARDED = FEW | {"KUBE-LOAD-BALANCER", "KUBE-LOAD-BALANCER-FW", "KUBE-LOAD-BALANCER-SOURCE-CIDR"}


def test_sets_without_elements_are_not_asked() -> None:
    """Nor is there a jump to a chain that asks none, or a table for it."""
    text = difference(OPTIONS, {}, FEW).text
    assert set(rules.SET.findall(text)) == FEW
    jumps = [line for line in text.splitlines() if line.startswith("-I ")]
    for chain in ("KUBE-PROXY-FIREWALL", "KUBE-NODE-PORT"):
        assert not any(line.endswith(chain) for line in jumps)
    assert "-j KUBE-NODE-PORT" not in text
    assert "*mangle" not in text
    tables = saved(text)
    assert difference(OPTIONS, tables, FEW) == ruleset.Changes("", 0, ())
    # Ours all the same, and told from the iptables mode's, whatever is occupied.
    assert ruleset.is_ours(saved(difference(OPTIONS, {}, ()).text))
    assert "KUBE-CLUSTER-IP" in difference(OPTIONS, {}, ()).text


def test_rules_follow_the_sets_that_have_elements() -> None:
    """What leads from one to the other is what differs, and leads back."""
    few = saved(difference(OPTIONS, {}, FEW).text)
    more = difference(OPTIONS, few, GUARDED).text
    assert "*mangle" in more
    assert ":KUBE-POSTROUTING" not in more
    guarded = saved(difference(OPTIONS, {}, GUARDED).text)
    back = difference(OPTIONS, guarded, FEW).text
    deleted = [line.split() for line in back.splitlines() if line.startswith("-D ")]
    assert [(words[1], words[-1]) for words in deleted] == [
        ("INPUT", "KUBE-PROXY-FIREWALL"),
        ("FORWARD", "KUBE-PROXY-FIREWALL"),
        ("OUTPUT", "KUBE-IPVS-OUT-FILTER"),
    ]
    assert set(rules.SET.findall(back)) <= FEW


def test_removal_takes_ours_and_leaves_others() -> None:
    """Chains, jumps to them, and in the end the sign; nothing of others."""
    tables = saved(difference(OPTIONS, {}).text, ":OTHER - [0:0]", "-A INPUT -j OTHER")
    assert ruleset.is_ours(tables)
    text = removal(tables, marker=False)
    assert "OTHER" not in text
    assert "EBPF-SVC" not in text
    assert text.count("-D ") == sum(len([*rules.jumps(table)]) for table in rules.TABLES)
    assert removal(tables, marker=True) == "*nat\n:EBPF-SVC - [0:0]\n-X EBPF-SVC\nCOMMIT\n"


def test_rules_of_a_kube_proxy_are_not_ours() -> None:
    """Without the sign they are somebody else's."""
    text = difference(OPTIONS, {}).text.replace(":EBPF-SVC - [0:0]\n", "")
    assert not ruleset.is_ours(saved(text))


def test_chains_the_iptables_mode_has_too_stay_with_it() -> None:
    """It serves by now: only what it does not know by these names goes."""
    tables = saved(difference(OPTIONS, {}).text)
    tables[NAT].chains["KUBE-NODEPORTS"] = "-"
    tables[NAT].rules[:] = [each for each in tables[NAT].rules if each.chain != "KUBE-SERVICES"]
    text = removal(tables, marker=False)
    assert ":KUBE-NODE-PORT " in text
    for chain in ("KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-FORWARD", "KUBE-PROXY-FIREWALL"):
        assert f"-X {chain}\n" not in text
    assert removal(tables, marker=True) == ""
    del tables[NAT].chains["KUBE-NODE-PORT"]
    assert not ruleset.is_ours(tables)


def test_chains_the_iptables_mode_left_keep_nothing() -> None:
    """A kube-proxy in iptables mode was here before: KUBE-SERVICES is ours now, and goes."""
    tables = saved(difference(OPTIONS, {}).text)
    tables[NAT].chains["KUBE-NODEPORTS"] = "-"
    assert ruleset.is_ours(tables)
    text = removal(tables, marker=False)
    assert "-X KUBE-SERVICES\n" in text
    assert "KUBE-NODEPORTS" not in text


def test_packets_of_the_node_are_checked_before_ipvs_takes_them() -> None:
    """P10: in table mangle, whose OUTPUT comes before IPVS."""
    ((jump, to),) = rules.jumps(MANGLE)
    assert to == "KUBE-IPVS-OUT-FILTER"
    assert jump.startswith("OUTPUT ")
    assert rules.contents(OPTIONS)[MANGLE]["KUBE-IPVS-OUT-FILTER"] == (
        "KUBE-IPVS-OUT-FILTER -m set --match-set KUBE-LOAD-BALANCER-FW dst,dst "
        "-j KUBE-SOURCE-RANGES-FIREWALL",
    )
