"""What a service port becomes in its table, told by the verdicts a packet meets (X8-X11)."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.dataplane.nftables import layout as names
from ebpf_svc.dataplane.nftables.content import Content
from ebpf_svc.dataplane.nftables.frame import frame
from ebpf_svc.dataplane.nftables.layout import LAYOUTS
from ebpf_svc.dataplane.nftables.render import Ranges, cluster_ends, local_ends, render
from ebpf_svc.dataplane.nftables.slots import Slots
from ebpf_svc.host import nf_expr as nf
from ebpf_svc.host.nf_expr import Cmp, Immediate, Lookup, Numgen, Verdict
from ebpf_svc.host.nf_tables import INTERVAL_END, Rule
from ebpf_svc.model.desired import FrontendKind, ServicePlan
from ebpf_svc.model.net import Family, Sources
from tests.lib.plans import make_backend, make_frontend, make_plan

V4 = LAYOUTS[Family.V4]
PODS = PodMatch(prefix="10.1.0.0/16")
LOCAL = Sources.EXTERNAL, Sources.NODE
BALANCER = "198.51.100.1"


def rendered(plan: ServicePlan, pods: PodMatch | None = PODS) -> Content:
    slots = Slots()
    numbers = Ranges(slots.fit(None, cluster_ends(plan)), slots.fit(None, local_ends(plan)))
    ranges = Ranges() if plan.affinity_s else numbers
    return render(plan, V4, ranges=ranges, pods=pods)


def verdicts(content: Content, name: str) -> list[str]:
    return [str(element.value) for element in content.elements.get(name, {}).values()]


def ends_of(rule: Rule) -> str:
    last = rule.expressions[-1]
    return str(last.data) if isinstance(last, Immediate) else type(last).__name__


def chain(content: Content, prefix: str) -> list[str]:
    (name,) = (name for name in content.chains if name.startswith(prefix))
    return [ends_of(rule) for rule in content.chains[name].rules]


def test_cluster_ip_leads_to_the_cluster_list() -> None:
    """X8: goto service-X, which chooses among the endpoints' numbers (X10)."""
    content = rendered(make_plan("web"))
    (to,) = verdicts(content, names.SERVICE_IPS)
    name = to.removeprefix("goto ")
    assert name.endswith("-default/web/tcp/")
    (rule,) = content.chains[name].rules
    (numgen,) = (each for each in rule.expressions if isinstance(each, Numgen))
    assert (numgen.modulus, numgen.offset) == (2, 0)
    (elements,) = (content.elements[key] for key in content.elements if "endpoints" in key)
    assert len(elements) == 2
    assert content.shared[names.CLUSTER_IPS] == {V4.pack("10.96.0.1")}


def test_no_endpoints_refuse() -> None:
    """P2: no chain, no translation, a reset or an ICMP error at every frontend."""
    plan = make_plan(
        "web",
        make_frontend(),
        make_frontend("192.168.0.11", 30080, kind=FrontendKind.NODE_PORT),
        backends=(),
    )
    content = rendered(plan)
    assert verdicts(content, names.NO_ENDPOINT_SERVICES) == ["goto reject-chain"]
    assert verdicts(content, names.NO_ENDPOINT_NODEPORTS) == ["goto reject-chain"]
    assert not content.chains
    assert names.SERVICE_IPS not in content.elements


def test_internal_local_without_local_endpoint_drops() -> None:
    """P3: a timeout, not a refusal."""
    content = rendered(make_plan("web", make_frontend(local_for=Sources.ALL)))
    assert verdicts(content, names.NO_ENDPOINT_SERVICES) == ["drop"]
    assert names.SERVICE_IPS not in content.elements


def test_external_policy_local_spares_pods_and_the_node() -> None:
    """X9, P5: both go to all endpoints, the node masqueraded; the rest to local ones."""
    frontend = make_frontend(
        BALANCER, kind=FrontendKind.LOAD_BALANCER, local_for=LOCAL[0], masquerade_for=LOCAL[1]
    )
    backends = [make_backend("10.1.0.1", in_local=True), make_backend("10.2.0.1")]
    content = rendered(make_plan("web", frontend, backends=backends))
    told = [verdict.split("-")[0] for verdict in chain(content, "external-")]
    assert told == ["goto service", "jump mark", "goto service", "goto local"]
    assert names.NO_ENDPOINT_SERVICES not in content.elements


def test_external_policy_local_without_local_endpoint_is_both_served_and_dropped() -> None:
    """X8: pods and the node are served (P5), anybody else waits in vain (P4)."""
    frontend = make_frontend(
        BALANCER, kind=FrontendKind.EXTERNAL_IP, local_for=LOCAL[0], masquerade_for=LOCAL[1]
    )
    content = rendered(make_plan("web", frontend))
    assert verdicts(content, names.NO_ENDPOINT_SERVICES) == ["drop"]
    assert len(verdicts(content, names.SERVICE_IPS)) == 1
    assert not any("local-" in verdict for verdict in chain(content, "external-"))


def test_without_detector_pods_are_like_anybody() -> None:
    """D2: no rule for pods."""
    frontend = make_frontend(
        BALANCER,
        kind=FrontendKind.EXTERNAL_IP,
        local_for=Sources.POD | Sources.EXTERNAL,
        masquerade_for=Sources.NODE,
    )
    content = rendered(make_plan("web", frontend), pods=None)
    told = [verdict.split("-")[0] for verdict in chain(content, "external-")]
    assert told == ["jump mark", "goto service"]


def test_node_port_is_one_element_for_all_addresses() -> None:
    """X6: (protocol, port), beside the set of addresses; ::1 never serves one."""
    plan = make_plan(
        "web",
        *(
            make_frontend(address, 30080, kind=FrontendKind.NODE_PORT, masquerade_for=Sources.ALL)
            for address in ("127.0.0.1", "192.168.0.11")
        ),
    )
    content = rendered(plan)
    assert len(content.elements[names.SERVICE_NODEPORTS]) == 1
    assert len(content.shared[names.NODEPORT_IPS]) == 2
    v6 = make_plan(
        "web", make_frontend("::1", 30080, kind=FrontendKind.NODE_PORT), backends=["fd00::1"]
    )
    content = render(v6, LAYOUTS[Family.V6], ranges=Ranges(), pods=None)
    assert names.SERVICE_NODEPORTS not in content.elements


def test_affinity_is_shared_by_all_frontends() -> None:
    """X5, X10, P13: a set an endpoint, asked before one is drawn; one for both lists."""
    frontends = [
        make_frontend(),
        make_frontend(BALANCER, kind=FrontendKind.EXTERNAL_IP, local_for=LOCAL[0]),
    ]
    backends = [make_backend("10.1.0.1", in_local=True), make_backend("10.2.0.1")]
    content = rendered(make_plan("web", *frontends, backends=backends, affinity_s=60))
    assert [one.timeout_s for one in content.sets.values()] == [60, 60]
    service = next(content.chains[name] for name in content.chains if name.startswith("service-"))
    looked = [
        each.set for rule in service.rules for each in rule.expressions if isinstance(each, Lookup)
    ]
    assert set(looked) == {*content.sets, ""}
    assert [name.partition("-")[0] for name in content.chains].count("endpoint") == 2


def test_endpoint_that_reaches_itself_is_known() -> None:
    """X12: source, destination, protocol and port."""
    content = rendered(make_plan("web", backends=["10.1.0.1"]))
    (key,) = content.shared[names.HAIRPIN]
    end = bytes((10, 1, 0, 1))
    assert key == end + end + bytes((6, 0, 0, 0)) + (8080).to_bytes(2, "big") + bytes(2)


@pytest.mark.parametrize(
    ("ranges", "bounds"),
    [
        (["10.0.0.0/8"], ["0.0.0.0 end", "10.0.0.0", "11.0.0.0 end"]),
        (["10.0.0.0/8", "10.3.0.0/16"], ["0.0.0.0 end", "10.0.0.0", "11.0.0.0 end"]),
        (["10.0.0.0/8", "11.0.0.0/16"], ["0.0.0.0 end", "10.0.0.0", "11.1.0.0 end"]),
        (["128.0.0.0/1"], ["0.0.0.0 end", "128.0.0.0"]),
    ],
)
def test_source_ranges_become_segments(ranges: list[str], bounds: list[str]) -> None:
    """X11: overlaps and neighbours are merged; the last address has nothing behind it."""
    frontend = make_frontend(BALANCER, kind=FrontendKind.LOAD_BALANCER, source_ranges=ranges)
    content = rendered(make_plan("web", frontend, backends=()))
    (name,) = (name for name in content.chains if name.startswith("firewall-"))
    (rule,) = content.chains[name].rules
    assert rule.inline is not None
    found = [
        V4.unpack(each.key) + (" end" if each.flags & INTERVAL_END else "")
        for each in rule.inline.elements
    ]
    assert found == bounds
    assert ends_of(rule) == "drop"


@pytest.mark.parametrize(
    ("pods", "masquerade_all", "expected"),
    [(None, False, 0), (PODS, False, 1), (None, True, 1), (PodMatch(device="cni0"), False, 1)],
)
def test_cluster_ip_traffic_is_masqueraded_by_one_rule(
    pods: PodMatch | None, masquerade_all: bool, expected: int
) -> None:
    """X7: from all but pods (P8), from all (D3), or from nobody (D2)."""
    content = frame(V4, mark=0x4000, pods=pods, masquerade_all=masquerade_all)
    rules = content.chains[names.SERVICES].rules
    marks = [rule for rule in rules if ends_of(rule) == f"jump {names.MARK}"]
    assert len(marks) == expected
    inverted = [
        each
        for rule in marks
        for each in rule.expressions
        if isinstance(each, Cmp) and each.operation == nf.NOT_EQUAL
    ]
    assert bool(inverted) is (pods is not None and not masquerade_all)


def test_unallocated_cluster_ips_are_dropped() -> None:
    """X13: after known cluster IPs refuse their unknown ports (P16); only the family's ranges."""
    cidrs = ("10.96.0.0/16", "10.112.0.0/12", "fd00:10:96::/112")
    content = frame(V4, mark=1, pods=None, masquerade_all=False, service_cidrs=cidrs)
    rules = content.chains[names.CLUSTER_IPS_CHECK].rules
    assert [ends_of(rule) for rule in rules] == [f"goto {names.REJECT}", "drop", "drop"]


def test_loopback_is_guarded_before_anything_else() -> None:
    """S7: with node ports on 127.0.0.1, and only then; both as source and as destination."""

    def first(*, localhost: bool) -> list[str]:
        content = frame(V4, mark=1, pods=None, masquerade_all=False, localhost=localhost)
        return [ends_of(rule) for rule in content.chains["filter-prerouting-pre-dnat"].rules]

    assert first(localhost=True) == ["drop", "drop", f"jump {names.FIREWALL_CHECK}"]
    assert first(localhost=False) == [f"jump {names.FIREWALL_CHECK}"]


def test_verdicts_read_as_nft_prints_them() -> None:
    """For messages."""
    assert str(Verdict(nf.GOTO, "x")) == "goto x"
    assert str(names.DROP) == "drop"
