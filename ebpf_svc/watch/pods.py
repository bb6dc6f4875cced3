"""Manifests of Pods and Nodes, as far as endpoints and this node's facts need them."""

from __future__ import annotations

import sys

from ebpf_svc.model.net import Protocol
from ebpf_svc.watch import raw
from ebpf_svc.watch.declared import PROTOCOLS, DeclaredNode, DeclaredPod, ObjectRef, PodPort
from ebpf_svc.watch.faults import Faults

ZONE_LABEL = "topology.kubernetes.io/zone"
TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"


def declare_pod(ref: ObjectRef, pod: raw.Pod, faults: Faults) -> DeclaredPod | None:
    """Validate a Pod; None when `faults` says why it cannot be used."""
    meta, spec = pod.get("metadata") or {}, pod.get("spec") or {}
    status = pod.get("status") or {}
    faults.subdomain("metadata.name", ref.name)
    addresses = _addresses(status, host_network=bool(spec.get("hostNetwork")), faults=faults)
    ports = _ports(spec, faults)
    if faults:
        return None
    # A finished pod holds no endpoint, whatever its status still says.
    finished = status.get("phase") in ("Succeeded", "Failed")
    ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in status.get("conditions") or ()
    )
    labels = (meta.get("labels") or {}).items()
    return DeclaredPod(
        ref=ref,
        labels=frozenset((sys.intern(key), sys.intern(value)) for key, value in labels),
        addresses=() if finished else addresses,
        node_name=sys.intern(spec.get("nodeName") or ""),
        ready=ready,
        terminating=bool(meta.get("deletionTimestamp")),
        ports=ports,
    )


def _addresses(status: raw.PodStatus, *, host_network: bool, faults: Faults) -> tuple[str, ...]:
    lists = [("podIP", status.get("podIPs"), status.get("podIP"))]
    if host_network:
        # Such a pod has the host's addresses, and its manifest may not repeat them.
        lists.append(("hostIP", status.get("hostIPs"), status.get("hostIP")))
    for field, entries, single in lists:
        texts = {
            f"status.{field}s[{i}].ip": entry.get("ip") for i, entry in enumerate(entries or ())
        }
        if not texts:
            texts = {f"status.{field}": single}
        if found := [faults.address(path, text) for path, text in texts.items() if text]:
            return tuple(dict.fromkeys(found))
    return ()


def _ports(spec: raw.PodSpec, faults: Faults) -> tuple[PodPort, ...]:
    """Named ports; sidecars (init containers that restart) count, other init containers do not."""
    ports = []
    lists = (
        ("containers", spec.get("containers")),
        ("initContainers", spec.get("initContainers")),
    )
    for field, containers in lists:
        for i, container in enumerate(containers or ()):
            if field == "initContainers" and container.get("restartPolicy") != "Always":
                continue
            for j, entry in enumerate(container.get("ports") or ()):
                path = f"spec.{field}[{i}].ports[{j}]"
                number, protocol = entry.get("containerPort") or 0, entry.get("protocol") or "TCP"
                faults.port(f"{path}.containerPort", number)
                if not faults.supported(f"{path}.protocol", protocol, PROTOCOLS):
                    continue
                if name := entry.get("name"):
                    faults.port_name(f"{path}.name", name)
                    ports.append(PodPort(sys.intern(name), Protocol(protocol), number))
    return tuple(ports)


def declare_node(ref: ObjectRef, node: raw.Node, faults: Faults) -> DeclaredNode | None:
    """Validate a Node; None when `faults` says why it cannot be used."""
    meta, spec = node.get("metadata") or {}, node.get("spec") or {}
    faults.subdomain("metadata.name", ref.name)
    found: dict[str, list[str]] = {"InternalIP": [], "ExternalIP": []}
    for i, entry in enumerate((node.get("status") or {}).get("addresses") or ()):
        if (kind := entry.get("type")) in found:
            path = f"status.addresses[{i}].address"
            found[kind].append(faults.address(path, entry.get("address") or ""))
    cidrs = spec.get("podCIDRs") or [text for text in (spec.get("podCIDR"),) if text]
    prefixes = tuple(faults.prefix(f"spec.podCIDRs[{i}]", text) for i, text in enumerate(cidrs))
    if faults:
        return None
    doomed = any(taint.get("key") == TO_BE_DELETED_TAINT for taint in spec.get("taints") or ())
    return DeclaredNode(
        ref=ref,
        addresses=tuple(dict.fromkeys(found["InternalIP"] + found["ExternalIP"])),
        zone=(meta.get("labels") or {}).get(ZONE_LABEL, ""),
        pod_cidrs=prefixes,
        eligible=not doomed and not meta.get("deletionTimestamp"),
    )
