"""Behaviours a dataplane does not offer: each row is a strict expected failure.

Closing a gap fails the run until its row goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

_RELAYED = "the relay connects to backends itself, so they see the node; kube-proxy's did, too (U7)"
_WITH_AGENT = "the agent is the relay: without it nothing serves, as with kube-proxy's (Z2, U1)"

_ENDS_AT_THE_RELAY = "errors beyond the relay are about its socket, as with kube-proxy's (U7)"

_ONE_LIST = "a virtual server has one list of endpoints for all its clients, as kube-proxy's (V8)"

_ONE_PORT = (
    "IPVS keeps a client's port: two connections from one port that meet at a pod are one there, "
    "as with kube-proxy"
)

_FLOW_ENDS_AT_ONCE = (
    "a UDP flow is forgotten with its endpoint, so that its next datagram goes elsewhere; so an "
    "answer under way is not translated, as with kube-proxy (C7, V11)"
)

_NO_MEMORY_OF_ITS_OWN_CALLS = (
    "IPVS takes an answer to a node's own call from the number of a node port for a request, "
    "whatever connection tracking knows, as for kube-proxy (B9)"
)

_TOO_BIG = (
    "IPVS takes no IPv6 datagram above the MTU from the node or a pod behind a bridge: it answers "
    "`too big`, as it does for kube-proxy"
)

GAPS: dict[tuple[str, str], str] = {
    ("ipvs", "test_internal_policy_local_drops_without_a_local_endpoint"): _ONE_LIST,
    ("ipvs", "test_client_keeps_its_pod"): (
        "clients are remembered by each virtual server for itself, as kube-proxy's (V6)"
    ),
    ("ipvs", "test_each_request_renews_affinity_and_silence_ends_it"): (
        "a client is remembered until IPVS has forgotten its last connection, two minutes after "
        "its end, as with kube-proxy (V6)"
    ),
    ("ipvs", "test_open_connections_outlive_their_service"): (
        "a connection dies with its virtual server, as with kube-proxy (V12)"
    ),
    ("ipvs", "test_port_used_for_two_services_of_one_pod_has_two_connections"): _ONE_PORT,
    ("ipvs", "test_port_used_for_a_service_may_be_used_for_its_pod"): _ONE_PORT,
    (
        "ipvs",
        "test_port_used_for_two_addresses_of_a_service_may_return_to_the_first[UDP]",
    ): _ONE_PORT,
    ("ipvs", "test_answer_under_way_when_its_pod_leaves_arrives"): _FLOW_ENDS_AT_ONCE,
    ("nftables", "test_answer_under_way_when_its_pod_leaves_arrives"): _FLOW_ENDS_AT_ONCE,
    ("iptables", "test_answer_under_way_when_its_pod_leaves_arrives"): _FLOW_ENDS_AT_ONCE,
    (
        "ipvs",
        "test_connection_from_the_number_of_a_node_port_gets_its_answers",
    ): _NO_MEMORY_OF_ITS_OWN_CALLS,
    (
        "ipvs",
        "test_datagrams_from_the_number_of_a_node_port_get_their_answers",
    ): _NO_MEMORY_OF_ITS_OWN_CALLS,
    (
        "ipvs",
        "test_datagrams_of_an_unconnected_socket_get_their_answers",
    ): _NO_MEMORY_OF_ITS_OWN_CALLS,
    ("ipvs", "test_explained_is_what_happens_without_local_endpoints"): (
        "a Local virtual server with no endpoint here sends to others, unmasqueraded, as "
        "kube-proxy's (V8): `explain` tells so, but not that the answers then miss the node"
    ),
    ("ipvs", "test_large_datagrams_pass_through_services"): _TOO_BIG,
    ("ipvs", "test_large_datagrams_reach_a_node_port_of_the_node_itself"): _TOO_BIG,
    ("ipvs", "test_datagram_cut_in_pieces_arrives_whole[IPv6]"): _TOO_BIG,
    ("ipvs", "test_datagram_cut_in_pieces_arrives_whole_the_first_piece_last[IPv6]"): _TOO_BIG,
    ("ipvs", "test_node_ports_answer_on_loopback_of_both_families"): (
        "what comes from 127.0.0.1 is left alone, as by kube-proxy in this mode (V7)"
    ),
    ("ipvs", "test_dropped_packets_are_counted_by_reason"): (
        "netfilter counts packets by rule, not by reason; kube-proxy has no such metric"
    ),
    ("ipvs", "test_traffic_is_counted_by_service"): (
        "virtual servers count packets, not service ports; kube-proxy has no such metric"
    ),
    ("userspace", "test_pod_keeps_its_address_at_cluster_ips"): _RELAYED,
    ("userspace", "test_external_policy_local_keeps_the_client_address"): _RELAYED,
    ("userspace", "test_external_policy_local_keeps_pod_addresses"): _RELAYED,
    ("userspace", "test_masquerade_all_hides_pods_at_cluster_ips"): _RELAYED,
    ("userspace", "test_without_a_detector_nobody_is_told_from_pods"): _RELAYED,
    (
        "userspace",
        "test_agent_killed_and_restarted_under_load_without_a_failed_request",
    ): _WITH_AGENT,
    ("userspace", "test_open_connections_outlive_agent_and_endpoint"): _WITH_AGENT,
    ("userspace", "test_udp_flows_outlive_a_restart_of_the_agent"): _WITH_AGENT,
    ("userspace", "test_agent_killed_at_any_point_of_its_applies_under_load"): _WITH_AGENT,
    (
        "userspace",
        "test_pod_prefixes_of_the_node_are_awaited_and_end_the_agent_when_others",
    ): _WITH_AGENT,
    ("userspace", "test_traffic_is_counted_by_service"): (
        "of a stream a relay sees bytes, not packets; it counts connections, bytes and datagrams"
    ),
    ("userspace", "test_sctp_passes_through_services"): (
        "a relay of sockets carries no SCTP; kube-proxy's did not either (U6)"
    ),
    ("userspace", "test_undo_gives_back_without_a_reset"): _WITH_AGENT,
    (
        "userspace",
        "test_agent_that_starts_without_the_api_server_keeps_what_the_kernel_holds",
    ): _WITH_AGENT,
    (
        "userspace",
        "test_closed_port_of_the_endpoint_refuses_for_the_service",
    ): _ENDS_AT_THE_RELAY,
    (
        "userspace",
        "test_datagram_that_outlives_its_hops_is_reported_to_its_socket",
    ): _ENDS_AT_THE_RELAY,
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
"""(dataplane or variant, test function or one of its parameters) -> why, in a sentence."""

_NO_ERROR_OF_ITS_OWN = (
    "before Linux 5.18 a socket hook cannot choose the error: processes get EPERM at once, "
    "packets are refused as ever (P2)"
)

KERNEL_GAPS: dict[tuple[str, str], tuple[tuple[int, int], str]] = {
    ("ebpf", "test_service_without_endpoints_refuses_at_once"): ((5, 18), _NO_ERROR_OF_ITS_OWN),
    ("ebpf-no-sockets", "test_service_without_endpoints_refuses_at_once"): (
        (0, 0),
        "without socket hooks packets are refused, on every kernel",
    ),
}
"""The same for older kernels: (first Linux without the gap, why); a variant's own row counts."""


def reason_of(variant: str, mode: str, tests: Iterable[str], kernel: tuple[int, int]) -> str | None:
    """Why a test, by any of the names a row may have for it, is expected to fail, or None."""
    for row in product((variant, mode), tests):
        if row in GAPS:
            return GAPS[row]
        if row in KERNEL_GAPS:
            until, why = KERNEL_GAPS[row]
            return why if kernel < until else None
    return None
