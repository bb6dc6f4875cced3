"""Behaviours a dataplane does not offer: each row is a strict expected failure.

Closing a gap fails the run until its row goes.
"""

from __future__ import annotations

GAPS: dict[tuple[str, str], str] = {
    ("nftables", "test_node_ports_answer_on_loopback_of_both_families"): (
        "the kernel lets no packet from ::1 leave the node; kube-proxy has none at all (X14)"
    ),
    ("nftables", "test_dropped_packets_are_counted_by_reason"): (
        "netfilter counts packets by rule, not by reason; kube-proxy has no such metric"
    ),
    ("nftables", "test_flows_are_counted"): (
        "flows are in the kernel's connection tracking; kube-proxy does not count them"
    ),
    ("nftables", "test_traffic_is_counted_by_service"): (
        "counters of rules see the first packet of a connection; kube-proxy has no such metric"
    ),
    ("iptables", "test_node_ports_answer_on_loopback_of_both_families"): (
        "the kernel lets no packet from ::1 leave the node; kube-proxy has the same gap (I7)"
    ),
    ("iptables", "test_dropped_packets_are_counted_by_reason"): (
        "netfilter counts packets by rule, not by reason; kube-proxy has no such metric"
    ),
    ("iptables", "test_flows_are_counted"): (
        "flows are in the kernel's connection tracking; kube-proxy does not count them"
    ),
    ("iptables", "test_traffic_is_counted_by_service"): (
        "counters of rules see the first packet of a connection; kube-proxy has no such metric"
    ),
}
"""(dataplane or variant, test function) -> why, in a sentence."""
