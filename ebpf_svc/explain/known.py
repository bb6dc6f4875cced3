"""What is known of Services, endpoints and pods besides the kernel: read as an agent reads it.

Nothing is written: allocations an agent made are read, none are made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ebpf_svc.config import Settings
from ebpf_svc.errors import EbpfSvcError
from ebpf_svc.model.snapshot import Snapshot
from ebpf_svc.watch import state
from ebpf_svc.watch.addresses import local_addresses
from ebpf_svc.watch.allocate import Allocator
from ebpf_svc.watch.controlplane import ControlPlane
from ebpf_svc.watch.declared import DeclaredPod
from ebpf_svc.watch.folder import Folder
from ebpf_svc.watch.store import Store

API_S = 10.0
"""How long the first lists of an API server are waited for."""
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod, as far as a packet's source is concerned."""

    addresses: tuple[str, ...]
    node: str


@dataclass(frozen=True, slots=True)
class Known:
    """The outside world at this moment."""

    snapshot: Snapshot | None
    """None: only the kernel is known; `why_not` says why."""
    pods: Mapping[str, PodFacts] = field(default_factory=dict)
    """By `namespace/name`."""
    why_not: str = ""

    def pod_at(self, address: str) -> str:
        """The name of the pod with that address; empty when not known."""
        for name, pod in self.pods.items():
            if address in pod.addresses:
                return name
        return ""


def look(settings: Settings, node: str, *, pod_names: Iterable[str] = ()) -> Known:
    """Read what the agent with these settings reads; a failure leaves the kernel alone to speak.

    Args:
        settings: the agent's.
        node: its name.
        pod_names: pods an API server is asked for, `namespace/name`; a folder gives all it has.
    """
    try:
        if settings.manifests is not None:
            return _from_folder(settings, node)
        return _from_api(settings, node, pod_names)
    except (EbpfSvcError, OSError) as error:
        return Known(None, why_not=str(error))


def _from_folder(settings: Settings, node: str) -> Known:
    assert settings.manifests is not None
    folder = Folder(settings.manifests)
    folder.refresh(time.monotonic())
    files = [(name, list(parsed)) for name, parsed in folder.files()]
    allocator = Allocator(settings.service_cidrs, settings.node_port_range)
    allocator.holdings = state.load(settings.state_dir / state.FILE_NAME)
    result = ControlPlane(node, allocator).reconcile(iter(files), complete=folder.complete)
    store = Store(node)
    store.replace(
        services=result.services,
        slices=result.slices,
        problems=result.problems,
        node=result.node,
    )
    store.set_local_addresses(local_addresses())
    pods = {
        f"{each.ref.namespace}/{each.ref.name}": PodFacts(each.addresses, each.node_name)
        for _, documents in files
        for parsed in documents
        for each in parsed.objects
        if isinstance(each, DeclaredPod)
    }
    return Known(store.snapshot(), pods)


def _from_api(settings: Settings, node: str, pod_names: Iterable[str]) -> Known:
    from ebpf_svc.watch.kubernetes import KubernetesSource  # noqa: PLC0415  # half a second

    store = Store(node)
    source = KubernetesSource(settings.kubernetes, store)
    pods = _pods(settings, pod_names)
    source.start()
    try:
        store.set_local_addresses(local_addresses())
        deadline = time.monotonic() + API_S
        while (snapshot := store.snapshot()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
    finally:
        source.stop()
    if snapshot is None:
        return Known(None, pods, f"the API server gave no lists within {API_S:g} s")
    return Known(snapshot, pods)


def _pods(settings: Settings, names: Iterable[str]) -> dict[str, PodFacts]:
    from ebpf_svc.watch.kube.connection import ApiServer  # noqa: PLC0415

    found: dict[str, PodFacts] = {}
    server = ApiServer(settings.kubernetes)
    try:
        for name in names:
            namespace, _, pod = name.partition("/")
            with suppress(EbpfSvcError, ValueError, KeyError):
                reply = server.get(f"/api/v1/namespaces/{namespace}/pods/{pod}", {})
                item = json.loads(reply.read())
                status = item.get("status") or {}
                addresses = [each["ip"] for each in status.get("podIPs") or ()]
                node = (item.get("spec") or {}).get("nodeName", "")
                found[name] = PodFacts(tuple(addresses), node)
    finally:
        server.close()
    return found
