"""Why a packet went no further, and how a flow ended, as sentences."""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "no_local_endpoint": "the traffic policy is Local and no endpoint is on this node",
    "no_endpoint": "the service has no endpoint anywhere",
    "source_range": "the client is in none of the load balancer's source ranges",
    "flow_table": "the flow table takes no more entries",
    "client_port_clash": "the client's port is in use by another connection to the same endpoint",
    "rewrite_failed": "the packet cannot be rewritten (SCTP cannot change its port)",
    "discarded": "it answers nobody, or was sent where nothing is",
    "not_served": "nothing is served at that address and port",
    "client_fin": "the client has closed its side",
    "backend_fin": "the backend has closed its side",
    "reset": "one side has reset the connection",
    "forgotten": "connection tracking has forgotten it",
}
"""Keys are those of `FlowEvent.reason`, of which drops are spelled as the metrics spell them."""


def reason_in_words(reason: str) -> str:
    """The sentence for a reason; its own word where there is none, empty for none."""
    return REASONS.get(reason, reason.replace("_", " "))
