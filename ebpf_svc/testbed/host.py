"""The machines of the testbed: a host is a namespace, a cgroup and the processes started there."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpf_svc.errors import CommandError
from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing, cgroup
from ebpf_svc.testbed.addressing import Addresses
from ebpf_svc.testbed.control import Peer
from ebpf_svc.testbed.namespace import Namespace, python_argv
from ebpf_svc.testbed.patience import PATIENCE

if TYPE_CHECKING:
    from ebpf_svc.testbed.podnet import PodWiring

COMMAND_TIMEOUT_S = 30.0 * PATIENCE
_numbers = itertools.count()


class Host:
    """A machine: the outside client, the router, a node or a pod."""

    def __init__(self, name: str, namespace: Namespace, group: Path, addresses: Addresses) -> None:
        group.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.namespace = namespace
        self.cgroup = group
        self.addresses = addresses
        self._number = next(_numbers)
        self._peer: Peer | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def address(self, family: Family) -> str:
        return self.addresses.of(family)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process on this host; whatever still runs ends with the host."""
        return self.namespace.popen(argv, cgroup=self.cgroup, **options)

    def run(self, argv: Sequence[str], stdin: str = "") -> str:
        """Run a command on this host and return what it printed; raises CommandError."""
        pipe = subprocess.PIPE
        with self.popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            try:
                stdout, stderr = process.communicate(stdin, timeout=COMMAND_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        if process.returncode != 0:
            raise CommandError(argv, process.returncode, stderr)
        return stdout

    @property
    def peer(self) -> Peer:
        """The program that serves and asks on this host, started at first use."""
        if self._peer is None or not self._peer.alive:
            argv = python_argv("ebpf_svc.testbed.peer", site_packages=False)
            argv.append(str(self._number))
            pipe = subprocess.PIPE
            self._peer = Peer(self.popen(argv, stdin=pipe, stdout=pipe), self.name)
        return self._peer

    @property
    def has_peer(self) -> bool:
        """Whether that program runs."""
        return self._peer is not None and self._peer.alive

    def close(self) -> None:
        """End every process of the host and give its namespace up."""
        cgroup.kill(self.cgroup)
        if self._peer is not None:
            self._peer.close()
        self.namespace.close()


class Pod(Host):
    """A pod of a node: one namespace, attached the way the cluster's pod network does."""

    def __init__(
        self, node: Node, name: str, namespace: Namespace, group: Path, addresses: Addresses
    ) -> None:
        super().__init__(name, namespace, group, addresses)
        self.node = node
        self.device = ""
        """Name of the host side of its veth pair."""


@dataclass(frozen=True, slots=True)
class NodeFolders:
    """Where a node keeps what an agent needs."""

    root: Path
    bpffs: Path
    cgroup: Path
    """Processes of the node and its pods live below; the agent's socket hooks attach here."""
    sandboxes: Path
    """The cgroup of sandboxed pods: outside the node's."""


class Node(Host):
    """A machine of the cluster: NIC `eth0`, its own bpffs and cgroup, pods."""

    def __init__(
        self, number: int, namespace: Namespace, folders: NodeFolders, wiring: PodWiring
    ) -> None:
        super().__init__(
            f"node{number}",
            namespace,
            folders.cgroup / "host",
            addressing.node_addresses(number),
        )
        self.number = number
        self.folders = folders
        self.pods: dict[str, Pod] = {}
        self._wiring = wiring
        self._next_host_number = addressing.FIRST_POD

    def add_pod(self, name: str, addresses: Addresses | None = None) -> Pod:
        """Attach a new pod; without addresses it gets the next free ones of the node's range.

        Raises:
            TentativeAddress: one of its or the node's addresses may not be used in time.
        """
        return self._attach(name, addresses, self.folders.cgroup / "pods" / name)

    def add_sandbox_pod(self, name: str, addresses: Addresses | None = None) -> Pod:
        """Attach a pod whose processes no socket hook of the node sees, as with Kata or gVisor."""
        return self._attach(name, addresses, self.folders.sandboxes / name)

    def remove_pod(self, pod: Pod) -> None:
        """End a pod's processes and take its interface away."""
        del self.pods[pod.name]
        self._wiring.detach(self, pod)
        pod.close()
        cgroup.remove(pod.cgroup)

    def close(self) -> None:
        for pod in self.pods.values():
            pod.close()
        super().close()

    def _attach(self, name: str, addresses: Addresses | None, group: Path) -> Pod:
        if addresses is None:
            addresses = addressing.pod_addresses(self.number, self._next_host_number)
            self._next_host_number += 1
        prefix = self.namespace.name.removesuffix(self.name)
        pod = Pod(self, name, Namespace(f"{prefix}{name}"), group, addresses)
        self.pods[name] = pod
        self._wiring.attach(self, pod)
        for host in (self, pod):
            host.namespace.settle()
        return pod
