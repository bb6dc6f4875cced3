"""A small cluster in network namespaces: an outside client, a router, two nodes with pods.

    client ── router ──┬── node1 ── pods
                       └── node2 ── pods

Everything carries the cluster's random id: namespaces `esvc-<id>-…`, files below
/run/ebpf-svc-testbed/<id>, cgroups below ebpf-svc-testbed/<id>. So `close()` and, after a crash,
`cleanup_leftovers()` find all of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

from ebpf_svc.config import EbpfSettings, Settings
from ebpf_svc.model.net import family_of
from ebpf_svc.testbed import addressing, cgroup, drawing, kernel, leftovers, underlay
from ebpf_svc.testbed.addressing import Addresses
from ebpf_svc.testbed.host import Host, Node, NodeFolders, Pod
from ebpf_svc.testbed.leftovers import CGROUP_NAME, RUN_DIR
from ebpf_svc.testbed.links import route_pods_by_node
from ebpf_svc.testbed.namespace import Namespace
from ebpf_svc.testbed.podnet import PodNetwork, wiring


class Cluster:
    """The hosts and their wires; use it as a context manager, or call `close()`."""

    def __init__(
        self, pod_network: PodNetwork, *, cni_masquerade: bool, cache_dir: Path | None
    ) -> None:
        self.id = secrets.token_hex(3)
        self.pod_network = pod_network
        self.cni_masquerade = cni_masquerade
        self.folder = RUN_DIR / self.id
        self.cache_dir = cache_dir or self.folder / "cache"
        self._groups = cgroup.cgroup2_root() / CGROUP_NAME / self.id
        self._hosts: list[Host] = []
        self._wiring = wiring(pod_network)
        self.client: Host
        self.router: Host
        self.nodes: tuple[Node, ...] = ()

    @classmethod
    def create(
        cls,
        *,
        pod_network: PodNetwork = PodNetwork.BRIDGE,
        node_count: int = 2,
        cni_masquerade: bool | None = None,
        cache_dir: Path | None = None,
        rp_filter: int | None = None,
    ) -> Cluster:
        """Build a cluster.

        Args:
            pod_network: how pods are attached.
            node_count: nodes; the first one receives the traffic to VIPs.
            cni_masquerade: hide pods behind their node's address when they talk to the outside,
                as most CNIs do; None = yes, except for ROUTED, where the router knows the pods.
            cache_dir: where agents keep compiled programs, shared to compile once; None = a
                folder of this cluster.
            rp_filter: reverse path filter of the nodes (1 strict, 2 loose); None = the kernel's
                default.
        """
        if cni_masquerade is None:
            cni_masquerade = pod_network is not PodNetwork.ROUTED
        cluster = cls(pod_network, cni_masquerade=cni_masquerade, cache_dir=cache_dir)
        try:
            cluster._build(node_count, rp_filter)
        except BaseException:
            cluster.close()
            raise
        return cluster

    def _build(self, node_count: int, rp_filter: int | None) -> None:
        leftovers.claim(self.folder)
        self.client = self._add_outside("client", addressing.OUTSIDE_CLIENT)
        self.router = self._add_outside("router", addressing.LAN_ROUTER)
        self.nodes = tuple(self._add_node(number + 1) for number in range(node_count))
        underlay.wire(self.client, self.router, self.nodes)
        self._wiring.prepare(self.nodes)
        for node in self.nodes:
            if rp_filter is not None:
                underlay.set_rp_filter(node, rp_filter)
            if self.cni_masquerade:
                underlay.masquerade_pods(node)
        if not self.cni_masquerade:
            with self.router.namespace.netlink() as ip:
                route_pods_by_node(ip, self.nodes)
        self.route_vips(self.nodes[0])
        for host in self._hosts:
            host.namespace.settle()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pods(self) -> Iterator[Pod]:
        for node in self.nodes:
            yield from node.pods.values()

    def node(self, name: str) -> Node:
        """The node of that name; raises KeyError."""
        return {node.name: node for node in self.nodes}[name]

    def route_vips(self, node: Node) -> None:
        """Let the router send traffic to external and load balancer addresses to this node."""
        self._route(addressing.VIP_CIDRS, node)

    def route_services(self, node: Node) -> None:
        """Let the router send traffic to cluster IPs to this node; at first it knows none."""
        self._route(addressing.SERVICE_CIDRS, node)

    def settings(self, node: Node, manifests: Path) -> Settings:
        """What an agent on a node is told."""
        return Settings(
            node_name=node.name,
            manifests=manifests,
            state_dir=node.folders.root / "state",
            run_dir=node.folders.root / "run",
            cluster_cidrs=addressing.CLUSTER_CIDRS,
            ebpf=EbpfSettings(
                bpffs=node.folders.bpffs,
                cgroup_root=node.folders.cgroup,
                cache_dir=self.cache_dir,
            ),
        )

    def describe(self, *, brief: bool = False) -> str:
        """The topology as a drawing; unless brief, with devices and namespaces."""
        return drawing.draw(self, brief=brief)

    def keep(self) -> None:
        """Let the cluster outlive this process, servers included.

        `python -m ebpf_svc.testbed.leftovers` removes it, or `cleanup_leftovers(kept=True)`.
        """
        for host in (*self._hosts, *self.pods):
            if host.has_peer:
                host.peer.call("stay")
        leftovers.keep(self.folder)

    def close(self) -> None:
        """Remove every trace; raises LeftoverError when something stays behind."""
        cgroup.kill(self._groups)
        for host in self._hosts:
            host.close()
        self._hosts.clear()
        leftovers.remove(self.id)

    @staticmethod
    def cleanup_leftovers(*, kept: bool = False) -> tuple[str, ...]:
        """Remove clusters whose process has ended, `kept` ones too if asked; returns their ids."""
        return leftovers.cleanup(kept=kept)

    def _route(self, prefixes: tuple[str, ...], node: Node) -> None:
        with self.router.namespace.netlink() as ip:
            for prefix in prefixes:
                ip.route("replace", dst=prefix, gateway=node.address(family_of(prefix)))

    def _namespace(self, name: str) -> Namespace:
        return Namespace(f"{leftovers.NAME_PREFIX}{self.id}-{name}")

    def _add_outside(self, name: str, addresses: Addresses) -> Host:
        host = Host(name, self._namespace(name), self._groups / "outside" / name, addresses)
        self._hosts.append(host)
        return host

    def _add_node(self, number: int) -> Node:
        name = f"node{number}"
        root = self.folder / name
        folders = NodeFolders(
            root=root,
            bpffs=root / "bpf",
            cgroup=self._groups / name,
            sandboxes=self._groups / "sandboxes",
        )
        folders.bpffs.mkdir(parents=True)
        kernel.mount("bpf", folders.bpffs, "bpf")
        node = Node(number, self._namespace(name), folders, self._wiring)
        self._hosts.append(node)
        return node
