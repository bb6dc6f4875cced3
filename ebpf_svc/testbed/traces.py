"""What an agent has put into a node's kernel, looked at from outside the agent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

from ebpf_svc.host.bpf_prog import AttachType, cgroup_query
from ebpf_svc.host.dummy import index_of
from ebpf_svc.host.ipset import Sets
from ebpf_svc.host.ipvs import real_servers
from ebpf_svc.host.kubeproxy import LINK
from ebpf_svc.testbed.host import Node

SIDES = ("ingress", "egress")


def traces(node: Node) -> Mapping[str, tuple[str, ...]]:
    """Filters, qdiscs, netfilter tables, cgroup programs and pins of a node, by kind, sorted."""
    qdiscs = [device for device in _devices(node) if "clsact" in _qdiscs(node, device)]
    return {
        "clsact": tuple(sorted(qdiscs)),
        "filter": tuple(sorted(one for device in qdiscs for one in filters(node, device))),
        "table": tuple(sorted(node.run(["nft", "list", "tables"]).splitlines())),
        "cgroup program": tuple(sorted(_cgroup_programs(node))),
        "pin": tuple(sorted(str(path) for path in node.folders.bpffs.rglob("*"))),
        **_of_ipvs(node),
    }


def _of_ipvs(node: Node) -> Mapping[str, tuple[str, ...]]:
    """Virtual servers, sets, and the device with services' addresses."""
    with node.namespace.entered(), Sets() as held:
        return {
            "virtual server": tuple(sorted(map(str, real_servers()))),
            "set": held.names(),
            "device": (LINK,) if index_of(LINK) else (),
        }


def filters(node: Node, device: str) -> tuple[str, ...]:
    """The BPF filters of a device, as `device side name`."""
    found = []
    for side in SIDES:
        listed = node.run(["tc", "-j", "filter", "show", "dev", device, side])
        for entry in json.loads(listed or "[]"):
            if name := entry.get("options", {}).get("bpf_name"):
                found.append(f"{device} {side} {name}")
    return tuple(found)


def _devices(node: Node) -> Iterator[str]:
    for link in json.loads(node.run(["ip", "-j", "link"])):
        yield link["ifname"]


def _qdiscs(node: Node, device: str) -> str:
    return node.run(["tc", "qdisc", "show", "dev", device])


def _cgroup_programs(node: Node) -> Iterator[str]:
    fd = os.open(node.folders.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for kind in set(AttachType) - {AttachType.NONE}:
            for program in cgroup_query(fd, kind):
                yield f"{kind.name} {program}"
    finally:
        os.close(fd)
