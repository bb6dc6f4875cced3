"""What the kernel is told: the least that leads from what is there to what should be."""

from __future__ import annotations

from dataclasses import replace

from ebpf_svc.dataplane.iptables import fixed, words
from ebpf_svc.dataplane.iptables.difference import (
    REWRITE_ABOVE,
    Comparison,
    Expected,
    change_service,
)
from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.dataplane.iptables.removal import render_removal
from ebpf_svc.dataplane.iptables.script import Script
from ebpf_svc.dataplane.iptables.services import ServiceRules, render
from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.host.iptables import Table, parse
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.model.net import Family, Sources
from tests.lib.plans import make_frontend, make_plan

OPTIONS = RuleOptions(Family.V4, pods=PodMatch(prefix="10.0.0.0/8"))
PLAN = make_plan(
    "web",
    make_frontend("10.96.0.1"),
    make_frontend("192.0.2.1", 30080, kind=FrontendKind.NODE_PORT, masquerade_for=Sources.ALL),
)
NODE = ["192.0.2.1"]


def expected(*plans: ServiceRules) -> Expected:
    made = Expected(OPTIONS, NODE, ())
    for each in plans:
        made.add(each)
    return made


def kernel(made: Expected) -> dict[str, Table]:
    """The tables an empty kernel holds after that was written."""
    script = Comparison(made, {}).script
    tables: dict[str, Table] = {}
    for name, changes in script.tables.items():
        lines = [f"*{name}", *(f":{each} ACCEPT [0:0]" for each in ("INPUT", "OUTPUT"))]
        lines += (f":{each} - [0:0]" for each in changes.fill)
        lines += (f"-A {rule}" for rule in reversed(changes.first))
        lines += (f"-A {rule}" for rules in changes.fill.values() for rule in rules)
        tables |= parse("\n".join([*lines, "COMMIT"]))
    return tables


def test_what_is_there_costs_nothing() -> None:
    """A restart writes no rule."""
    made = expected(render(PLAN, OPTIONS))
    compared = Comparison(made, kernel(made))
    assert (compared.script.rule_count, compared.found) == (0, [])


def test_another_wording_of_the_same_rule_is_no_difference() -> None:
    """Versions of iptables differ in the order of matches, and others in comments."""
    made = expected(render(PLAN, OPTIONS))
    tables = kernel(made)
    for table in tables.values():
        table.rules = [
            replace(rule, text=rule.text.replace("kubernetes", "k8s").replace(" -m tcp", ""))
            for rule in table.rules
        ]
    assert Comparison(made, tables).found == []


def test_meaning_keeps_what_matters() -> None:
    """Order, comments and names of matches do not count; a negation, a value, the chain do."""
    rule = 'A ! -s 10.0.0.0/8 -p tcp -m comment --comment "x -j y" -m tcp --dport 80 -j B'
    assert words.meaning(rule) == words.meaning("A -p tcp --dport 80 ! -s 10.0.0.0/8 -j B")
    for other in (
        rule.replace("! ", ""),
        rule.replace("80", "81"),
        rule.replace("A ", "C "),
        rule.replace("-j B", "-j C"),
    ):
        assert words.meaning(other) != words.meaning(rule)


def test_a_change_of_an_endpoint_names_its_chains_alone() -> None:
    """Neither shared chains nor those of other endpoints are written."""
    after = make_plan("web", *PLAN.frontends, backends=["10.1.0.1", "10.1.0.3"])
    old, new = render(PLAN, OPTIONS), render(after, OPTIONS)
    script = Script()
    assert change_service(script, old, new)
    nat = script.tables["nat"]
    assert {each[:9] for each in nat.fill} == {"KUBE-SVC-", "KUBE-SEP-"}
    assert (len(nat.fill), len(nat.drop)) == (2, 1)
    assert (nat.delete, nat.first, nat.last) == ([], [], [])
    assert not change_service(Script(), new, new)


def test_a_service_that_loses_its_endpoints_turns_to_refusing() -> None:
    """Its rules in shared chains go one by one, its chains after them."""
    empty = make_plan("web", *PLAN.frontends, backends=[])
    script = Script()
    change_service(script, render(PLAN, OPTIONS), render(empty, OPTIONS))
    (text,) = script.texts(None)
    filter_part, _, nat_part = text.partition("*nat\n")
    assert filter_part.count("-I KUBE-") == 2
    assert "tcp-reset" in filter_part
    assert nat_part.count("-D KUBE-") == 2
    assert "-A" not in nat_part
    assert nat_part.index("-D ") < nat_part.index("-X ")


def test_jumps_to_node_ports_stay_last() -> None:
    """I7: a rule behind them is drift, for it would never be asked."""
    made = expected(render(PLAN, OPTIONS))
    tables = kernel(made)
    held = tables["nat"].rules
    late = next(rule for rule in held if "cluster IP" in rule.text and "SERVICES" in rule.chain)
    tables["nat"].rules = [rule for rule in held if rule is not late] + [late]
    compared = Comparison(made, tables)
    assert "order" in compared.found[0]
    assert compared.script.tables["nat"].fill["KUBE-SERVICES"][-1].endswith("-j KUBE-NODEPORTS")


def test_a_chain_full_of_foreign_rules_is_written_anew() -> None:
    """Taking rules out one by one costs more, each being looked for."""
    made = expected(render(PLAN, OPTIONS))
    tables = kernel(made)
    for count, is_anew in ((REWRITE_ABOVE, False), (REWRITE_ABOVE + 1, True)):
        few = parse(
            "\n".join(["*nat", *(f"-A KUBE-SERVICES -s 192.0.2.{n}/32" for n in range(count))])
        )
        foreign = replace(tables["nat"], rules=[*tables["nat"].rules, *few["nat"].rules])
        # Before the jumps, or it is their order that counts.
        foreign.rules.sort(key=lambda rule: "KUBE-NODEPORTS" in rule.text)
        changes = Comparison(made, {**tables, "nat": foreign}).script.tables["nat"]
        assert ("KUBE-SERVICES" in changes.fill, bool(changes.delete)) == (is_anew, not is_anew)


def test_what_nobody_decides_about_is_left_alone() -> None:
    """While a refused service port is looked for, others keep their rules (I23)."""
    web, api = render(PLAN, OPTIONS), render(make_plan("api", make_frontend("10.96.0.2")), OPTIONS)
    tables = kernel(expected(web, api))
    made = expected(web)
    made.spare(api)
    assert Comparison(made, tables).script.rule_count == 0


def test_pieces_never_name_a_chain_that_is_not_there() -> None:
    """Endpoints come first and go last, what they jump to before and after them."""
    plans = [make_plan(f"s{n}", make_frontend(f"10.96.0.{n + 1}")) for n in range(30)]
    made = expected(*(render(each, OPTIONS) for each in plans))
    script = Comparison(made, {}).script
    pieces = list(script.texts(8))
    assert len(pieces) > 10
    known: set[str] = set()
    for piece in pieces:
        for line in piece.splitlines():
            if line.startswith(":"):
                known.add(line[1:].split()[0])
            elif line.startswith("-") and (target := line.split()[-1]).startswith("KUBE-"):
                assert target in known, line
    gone = render_removal(kernel(made))
    jumps = {
        rule.chain: {each.target for each in kernel(made)["nat"].rules if each.chain == rule.chain}
        for rule in kernel(made)["nat"].rules
    }
    for piece in gone.texts(8):
        for line in piece.splitlines():
            if line.startswith(":"):
                jumps.pop(line[1:].split()[0], None)
            elif line.startswith("-X "):
                assert not [
                    chain
                    for chain, to in jumps.items()
                    if line[3:] in to - {"INPUT"} and chain.startswith("KUBE-")
                ], line
    assert "".join(gone.texts(8)).rstrip().splitlines()[-2] == "-X KUBE-MARK-MASQ"


def test_kubelets_firewall_stays_where_kubelet_is() -> None:
    """Z5: KUBE-FIREWALL is as much its own."""
    made = expected(render(PLAN, OPTIONS))
    tables = kernel(made)
    assert "KUBE-FIREWALL" in render_removal(tables).tables["filter"].drop
    tables["mangle"].chains["KUBE-KUBELET-CANARY"] = "-"
    assert "KUBE-FIREWALL" not in render_removal(tables).tables["filter"].drop


def test_what_ipvs_mode_took_over_stays() -> None:
    """Both modes have chains of the same names; the one that left must not take them along."""
    made = expected(render(PLAN, OPTIONS))
    tables = kernel(made)
    tables["nat"].rules = [
        *(rule for rule in tables["nat"].rules if rule.chain != "KUBE-SERVICES"),
        *parse("*nat\n-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst")["nat"].rules,
    ]
    removal = render_removal(tables)
    assert "KUBE-SERVICES" not in removal.tables["nat"].drop
    assert "KUBE-NODEPORTS" in removal.tables["nat"].drop
    assert not [rule for rule in removal.tables["nat"].delete if "KUBE-SERVICES" in rule]


def test_every_jump_leads_to_a_chain_that_is_made() -> None:
    """Of both families, all tables."""
    for family in Family:
        options = RuleOptions(family)
        for table in fixed.TABLES:
            changes = Comparison(Expected(options, (), ()), {}).script.tables[table]
            assert {rule.split()[-1] for rule in fixed.jumps(options, table)} <= changes.fill.keys()
