"""Names of tables and chains: kube-proxy's own, and the one by which rules are known as ours. Pure.

kubelet and CNI plugins make chains whose names begin with `KUBE-` too, so ours go by exact name.
"""

from __future__ import annotations

import re

from ebpf_svc.dataplane.netfilter.names import iptables_hash
from ebpf_svc.host.kubeproxy import CANARY, MARKER
from ebpf_svc.model.desired import Backend
from ebpf_svc.model.service import ServicePortName

FILTER, NAT, MANGLE = "filter", "nat", "mangle"

SERVICES, NODE_PORTS = "KUBE-SERVICES", "KUBE-NODEPORTS"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
FORWARD, PROXY_FIREWALL = "KUBE-FORWARD", "KUBE-PROXY-FIREWALL"
MARK_MASQ, POSTROUTING = "KUBE-MARK-MASQ", "KUBE-POSTROUTING"
FIREWALL = "KUBE-FIREWALL"
"""kubelet's as much as ours."""
KUBELET_CANARY = "KUBE-KUBELET-CANARY"
HINTS = (KUBELET_CANARY, "KUBE-IPTABLES-HINT")
"""Chains in mangle by which kubelet says which backend the host uses."""

SHARED = {
    FILTER: (SERVICES, EXTERNAL_SERVICES, NODE_PORTS, PROXY_FIREWALL),
    NAT: (SERVICES, NODE_PORTS),
}
"""Table -> chains in which each service port has rules of its own."""
OURS = {
    FILTER: frozenset({*SHARED[FILTER], FORWARD, CANARY}),
    NAT: frozenset({*SHARED[NAT], MARK_MASQ, POSTROUTING, CANARY, MARKER}),
    MANGLE: frozenset({CANARY}),
}
"""Table -> chains that go when we go; KUBE-FIREWALL stays where kubelet is."""

_PER_SERVICE = re.compile(r"KUBE-(?:SVC|SVL|SEP|FW|EXT)-[A-Z2-7]{16}")


def is_per_service(chain: str) -> bool:
    """Whether a chain of table nat belongs to one service port (I17)."""
    return _PER_SERVICE.fullmatch(chain) is not None


def cluster_chain(port: ServicePortName) -> str:
    """Balances over the Cluster list."""
    return f"KUBE-SVC-{iptables_hash(port)}"


def local_chain(port: ServicePortName) -> str:
    """Balances over the Local list."""
    return f"KUBE-SVL-{iptables_hash(port)}"


def external_chain(port: ServicePortName) -> str:
    """Treats what comes to addresses other than the cluster IP."""
    return f"KUBE-EXT-{iptables_hash(port)}"


def firewall_chain(port: ServicePortName) -> str:
    """Lets in sources that may use a VIP."""
    return f"KUBE-FW-{iptables_hash(port)}"


def endpoint_chain(port: ServicePortName, backend: Backend) -> str:
    """Sends to one endpoint."""
    return f"KUBE-SEP-{iptables_hash(port, backend)}"
