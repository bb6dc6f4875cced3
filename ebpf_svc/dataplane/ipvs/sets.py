"""The ipsets of ipvs mode, by kube-proxy's names (V13). Pure.

A packet's treatment follows from the sets its destination is in, so rules seldom change with
services. Unlike kube-proxy's, sets are made at the start and stay when empty, and a hash may hold a
million entries: KUBE-LOOP-BACK has every endpoint, since a plan does not tell which are local.
"""

from __future__ import annotations

from ebpf_svc.host.ipset import Entry, Spec
from ebpf_svc.model.net import Family, Protocol

MAXELEM = 1 << 20
NAME_MAX = 31
"""What the kernel's names have room for."""

LOOP_BACK = "LOOP-BACK"
CLUSTER_IP = "CLUSTER-IP"
EXTERNAL_IP, EXTERNAL_IP_LOCAL = "EXTERNAL-IP", "EXTERNAL-IP-LOCAL"
LOAD_BALANCER, LOAD_BALANCER_LOCAL = "LOAD-BALANCER", "LOAD-BALANCER-LOCAL"
LOAD_BALANCER_FW = "LOAD-BALANCER-FW"
SOURCE_CIDR, SOURCE_IP = "LOAD-BALANCER-SOURCE-CIDR", "LOAD-BALANCER-SOURCE-IP"
HEALTH_CHECK = "HEALTH-CHECK-NODE-PORT"
IPVS_IPS = "IPVS-IPS"
NO_ENDPOINTS = "NO-ENDPOINTS"
"""Ours alone: frontends that refuse."""
NODE_PORT = {
    Protocol.TCP: "NODE-PORT-TCP",
    Protocol.UDP: "NODE-PORT-UDP",
    # A bitmap of ports means TCP or UDP, so these name the address as well.
    Protocol.SCTP: "NODE-PORT-SCTP-HASH",
}
NODE_PORT_LOCAL = {
    Protocol.TCP: "NODE-PORT-LOCAL-TCP",
    Protocol.UDP: "NODE-PORT-LOCAL-UDP",
    Protocol.SCTP: "NODE-PORT-LOCAL-SCTP-HASH",
}

_ADDRESS_PORT, _PORTS = "hash:ip,port", "bitmap:port"
TYPES = {
    LOOP_BACK: "hash:ip,port,ip",
    CLUSTER_IP: _ADDRESS_PORT,
    EXTERNAL_IP: _ADDRESS_PORT,
    EXTERNAL_IP_LOCAL: _ADDRESS_PORT,
    LOAD_BALANCER: _ADDRESS_PORT,
    LOAD_BALANCER_LOCAL: _ADDRESS_PORT,
    LOAD_BALANCER_FW: _ADDRESS_PORT,
    SOURCE_CIDR: "hash:ip,port,net",
    SOURCE_IP: "hash:ip,port,ip",
    NODE_PORT[Protocol.TCP]: _PORTS,
    NODE_PORT[Protocol.UDP]: _PORTS,
    NODE_PORT[Protocol.SCTP]: _ADDRESS_PORT,
    NODE_PORT_LOCAL[Protocol.TCP]: _PORTS,
    NODE_PORT_LOCAL[Protocol.UDP]: _PORTS,
    NODE_PORT_LOCAL[Protocol.SCTP]: _ADDRESS_PORT,
    HEALTH_CHECK: _PORTS,
    IPVS_IPS: "hash:ip",
    NO_ENDPOINTS: _ADDRESS_PORT,
}
ADDRESS_KINDS = (CLUSTER_IP, EXTERNAL_IP, EXTERNAL_IP_LOCAL, LOAD_BALANCER)
"""Together they hold every frontend that is no node port."""

SetEntry = tuple[str, Entry]
"""A set by its whole name, and an element of it."""


def name_of(short: str, family: Family) -> str:
    """A set's name in a family: cut to what the kernel takes."""
    prefix = "KUBE-" if family is Family.V4 else "KUBE-6-"
    return f"{prefix}{short}"[:NAME_MAX]


SPECS = {
    name_of(short, family): Spec(
        name_of(short, family), kind, family, 0 if kind == _PORTS else MAXELEM
    )
    for family in Family
    for short, kind in TYPES.items()
}
"""Every set by its name."""


def specs_of(family: Family) -> list[Spec]:
    """The sets of a family."""
    return [SPECS[name_of(short, family)] for short in TYPES]


def names_of(family: Family) -> frozenset[str]:
    """The sets of a family by name."""
    return frozenset(name_of(short, family) for short in TYPES)
