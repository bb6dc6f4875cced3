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


def draw(cluster: Cluster) -> str:
    """The hosts, their addresses, devices and namespaces, as a tree."""
    masquerade = "on" if cluster.cni_masquerade else "off"
    lines = [
        f"cluster {cluster.id}: {cluster.pod_network.value} ({_LINKS[cluster.pod_network.value]}), "
        f"CNI masquerade {masquerade}",
        _line(cluster.client),
        "  │",
        _line(cluster.router),
    ]
    for node in cluster.nodes:
        last = node is cluster.nodes[-1]
        head, stem = ("  └── ", "      ") if last else ("  ├── ", "  │   ")
        lines.append(head + _line(node))
        lines += [stem + line for line in _pods(node)]
    return "\n".join(lines)


def _line(host: Host) -> str:
    return f"{host.name}  {host.addresses.v4}  {host.addresses.v6}   [{host.namespace.name}]"


def _pods(node: Node) -> list[str]:
    pods = list(node.pods.values())
    return [f"{'└' if pod is pods[-1] else '├'}── {_line(pod)}  {pod.device}" for pod in pods]
