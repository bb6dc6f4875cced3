"""What the table of nftables holds for a plan."""

from __future__ import annotations

from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.dataplane.userspace import rules
from ebpf_svc.dataplane.userspace.rules import Element, change, door_names, elements, parse
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.model.net import Family, Sources
from tests.lib.plans import make_backend, make_frontend, make_plan

VIP = make_frontend("198.18.0.1", kind=FrontendKind.LOAD_BALANCER, local_for=Sources.EXTERNAL)
KEY = "198.18.0.1 . 6 . 80"
LISTING = """\
table inet ebpf-svc-userspace {
	comment "ebpf-svc userspace"
	map pod4 {
		type ipv4_addr . inet_proto . inet_service : inet_service
		elements = { 10.0.0.1 . 17 . 53 : 1,
				10.0.0.1 . 6 . 80 : 3000 }
	}

	map pod6 {
		type ipv6_addr . inet_proto . inet_service : inet_service
		elements = { fd00::1 . 6 . 80 : 3001 }
	}

	set allowed_tcp4 {
		type ipv4_addr . inet_service . ipv4_addr
		flags interval
		elements = { 10.0.0.1 . 80 . 10.0.0.0/8 }
	}

	chain lead_own {
		type nat hook output priority -100; policy accept;
	}
}
"""


def test_each_class_is_led_to_the_list_it_gets() -> None:
    """eTP Local: the outside to the Local list, pods and the node to the Cluster list (P5, P7)."""
    plan = make_plan("web", VIP, backends=[make_backend("10.1.0.1", in_local=True)])
    assert door_names(plan) == ["cluster", "local"]
    assert elements(plan, {"cluster": 3000, "local": 3001}) == {
        Element("pod4", KEY): "3000",
        Element("node4", KEY): "3000",
        Element("external4", KEY): "3001",
    }


def test_empty_list_is_silent_for_its_class_alone() -> None:
    """No local endpoint: the outside hears nothing, the others are served (P4, P5)."""
    plan = make_plan("web", VIP, backends=[make_backend("10.1.0.1")])
    found = elements(plan, {"cluster": 3000, "local": 3001})
    assert found[Element("external4", KEY)] == str(rules.SILENT)
    assert found[Element("pod4", KEY)] == "3000"


def test_without_any_endpoint_everyone_is_refused() -> None:
    """No endpoint anywhere: Local policies refuse as well, and no door is needed (P2)."""
    plan = make_plan("web", VIP, backends=[])
    assert door_names(plan) == []
    assert set(elements(plan, {}).values()) == {str(rules.REFUSED)}


def test_source_ranges_do_not_overlap_in_the_set() -> None:
    """nft refuses prefixes that lie in one another; what they mean together stays (P10)."""
    ranges = ["10.0.0.0/8", "10.3.0.0/16", "192.0.2.7/32"]
    frontend = make_frontend(kind=FrontendKind.LOAD_BALANCER, source_ranges=ranges)
    found = elements(make_plan("web", frontend), {"cluster": 3000})
    assert [each.key for each in found if each.container == "allowed_tcp4"] == [
        "10.96.0.1 . 80 . 10.0.0.0/8",
        "10.96.0.1 . 80 . 192.0.2.7",
    ]
    assert Element("ranged4", "10.96.0.1 . 6 . 80") in found


def test_listing_is_split_into_rules_and_elements() -> None:
    """What nft prints over several lines is read; the rest does not depend on elements."""
    around, found = parse(LISTING)
    assert found == {
        Element("pod4", "10.0.0.1 . 17 . 53"): "1",
        Element("pod4", "10.0.0.1 . 6 . 80"): "3000",
        Element("pod6", "fd00::1 . 6 . 80"): "3001",
        Element("allowed_tcp4", "10.0.0.1 . 80 . 10.0.0.0/8"): "",
    }
    assert "elements" not in around
    assert "chain lead_own" in around


def test_only_what_differs_is_written() -> None:
    """A map's element with another value is deleted and added in one transaction."""
    held = {Element("pod4", "a"): "1", Element("pod4", "b"): "2", Element("ranged4", "c"): ""}
    wanted = {Element("pod4", "a"): "1", Element("pod4", "b"): "3", Element("ranged4", "d"): ""}
    text, touched = change(held, wanted)
    assert text == (
        "delete element inet ebpf-svc-userspace pod4 { b }\n"
        "delete element inet ebpf-svc-userspace ranged4 { c }\n"
        "add element inet ebpf-svc-userspace pod4 { b : 3 }\n"
        "add element inet ebpf-svc-userspace ranged4 { d }\n"
    )
    assert {each.key for each in touched} == {"b", "c", "d"}
    assert change(wanted, wanted) == ("", [])


def test_pods_are_told_by_prefix_or_device() -> None:
    """Every local detector has its rules; without one nobody is a pod (D1, D2)."""
    text = rules.skeleton({Family.V4: PodMatch(prefix="10.0.0.0/8"), Family.V6: None})
    assert "ip saddr 10.0.0.0/8 dnat ip to" in text
    assert "ip saddr != 10.0.0.0/8 dnat ip to" in text
    assert "map @pod6" not in text
    text = rules.skeleton({Family.V4: PodMatch(device="cni0")})
    assert 'iifname "cni0" dnat' in text
    text = rules.skeleton({Family.V4: PodMatch(device_prefix="cali")})
    assert 'iifname != "cali*" dnat' in text
