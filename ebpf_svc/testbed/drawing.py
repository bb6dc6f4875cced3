"""Draw a cluster as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ebpf_svc.testbed.cluster import Cluster
    from ebpf_svc.testbed.host import Host, Node

_LINKS = {
    "bridge": "pods on cni0, nodes route each other's pods",
    "routed": "a link and a route per pod",
    "overlay": "pods on cni0, flannel.1 between the nodes",
}


def draw(cluster: Cluster, *, brief: bool = False) -> str:
    """The hosts and their addresses as a tree; unless brief, with devices and namespaces."""
    masquerade = "on" if cluster.cni_masquerade else "off"
    lines = [
        f"cluster {cluster.id}: {cluster.pod_network.value} ({_LINKS[cluster.pod_network.value]}), "
        f"CNI masquerade {masquerade}",
        _line(cluster.client, brief),
        "  │",
        _line(cluster.router, brief),
    ]
    for node in cluster.nodes:
        last = node is cluster.nodes[-1]
        head, stem = ("  └── ", "      ") if last else ("  ├── ", "  │   ")
        lines.append(head + _line(node, brief))
        lines += [stem + line for line in _pods(node, brief)]
    return "\n".join(lines)


def _line(host: Host, brief: bool) -> str:
    where = "" if brief else f"   [{host.namespace.name}]"
    return f"{host.name}  {host.addresses.v4}  {host.addresses.v6}{where}"


def _pods(node: Node, brief: bool) -> list[str]:
    pods = list(node.pods.values())
    lines = []
    for pod in pods:
        branch = "└" if pod is pods[-1] else "├"
        device = "" if brief else f"  {pod.device}"
        lines.append(f"{branch}── {_line(pod, brief)}{device}")
    return lines
