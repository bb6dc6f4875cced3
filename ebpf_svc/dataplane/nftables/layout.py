"""What differs between the two tables, and what every packet is asked for there. Pure.

Names of chains, sets and maps are kube-proxy's (X2-X6): whoever reads the table knows them, and
kube-proxy finds its own. The maps `service-endpoints-N` alone are ours; see decision 0009.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from ebpf_svc.host import nf_expr as nf
from ebpf_svc.host.nf_expr import Expression, Lookup, Meta, Payload, Verdict
from ebpf_svc.host.nf_owner import TABLES
from ebpf_svc.host.nf_tables import (
    INET_PROTO,
    INET_SERVICE,
    INTEGER,
    IPV4_ADDR,
    IPV6_ADDR,
    MAP,
    VERDICT,
    DataType,
    Hook,
    Set,
    Table,
    pad,
)
from ebpf_svc.model.net import Family

CLUSTER_IPS, NODEPORT_IPS = "cluster-ips", "nodeport-ips"
HAIRPIN = "hairpin-connections"
SERVICE_IPS, SERVICE_NODEPORTS = "service-ips", "service-nodeports"
NO_ENDPOINT_SERVICES, NO_ENDPOINT_NODEPORTS = "no-endpoint-services", "no-endpoint-nodeports"
FIREWALL_IPS = "firewall-ips"
SERVICE_ENDPOINTS = "service-endpoints-"
"""A map's number follows."""

SERVICES, FIREWALL_CHECK = "services", "firewall-check"
NODEPORT_CHECK, SERVICE_CHECK = "nodeport-endpoints-check", "service-endpoints-check"
CLUSTER_IPS_CHECK = "cluster-ips-check"
MASQUERADING, MARK, REJECT = "masquerading", "mark-for-masquerade", "reject-chain"

NAT = "nat"
_PREROUTING, _INPUT, _FORWARD, _OUTPUT, _POSTROUTING = range(5)
_PRE_DNAT, _DSTNAT, _FILTER, _SRCNAT = -110, -100, 0, 100
BASE_CHAINS = {
    "filter-prerouting-pre-dnat": Hook("filter", _PREROUTING, _PRE_DNAT),
    "filter-output-pre-dnat": Hook("filter", _OUTPUT, _PRE_DNAT),
    "filter-input": Hook("filter", _INPUT, _FILTER),
    "filter-forward": Hook("filter", _FORWARD, _FILTER),
    "filter-output": Hook("filter", _OUTPUT, _FILTER),
    "nat-prerouting": Hook(NAT, _PREROUTING, _DSTNAT),
    "nat-output": Hook(NAT, _OUTPUT, _DSTNAT),
    "nat-postrouting": Hook(NAT, _POSTROUTING, _SRCNAT),
}
"""X3."""

INDEX = struct.Struct("=I")
"""A number of an endpoint."""
_PORT = struct.Struct(">H")
_EXPR_PAYLOAD, _EXPR_CONCAT, _EXPR_NUMGEN = 7, 13, 23
_DESC_TH, _DESC_IP, _DESC_IP6 = 11, 12, 13


@dataclass(frozen=True, slots=True)
class Layout:
    """One family's table."""

    family: Family
    table: Table
    address: DataType
    source_at: int
    destination_at: int
    reject_code: int
    """ICMP's port unreachable."""
    typeof_endpoints: bytes
    """How `nft` is told the types of `service-endpoints`."""

    @property
    def port_register(self) -> int:
        """Where a port comes to lie behind an address in register 1."""
        return nf.register(self.address.length)

    def pack(self, address: str) -> bytes:
        """An address as keys and packets have it."""
        return socket.inet_pton(_AF[self.family], address)

    def unpack(self, data: bytes) -> str:
        """The address in the first bytes of a key or value."""
        return socket.inet_ntop(_AF[self.family], data[: self.address.length])

    def end(self, address: str, port: int) -> bytes:
        """An endpoint as the value of a map."""
        return self.pack(address) + _PORT.pack(port) + b"\0\0"

    def unpack_end(self, data: bytes) -> tuple[str, int]:
        """The address and port of such a value."""
        return self.unpack(data), unpack_port(data[self.address.length :])

    def source(self, register: int = 1) -> Payload:
        """Load the source address."""
        return self._load(self.source_at, register)

    def destination(self, register: int = 1) -> Payload:
        """Load the destination address."""
        return self._load(self.destination_at, register)

    def destination_end(self) -> tuple[Expression, ...]:
        """Load destination address, protocol and port as a key of `service-ips`."""
        at = self.address.length
        return (self.destination(), *protocol_and_port(at))

    def sets(self) -> tuple[Set, ...]:
        """Every set and map but those of affinity and endpoints (X5, X6)."""
        address = self.address
        end = (address, INET_PROTO, INET_SERVICE)
        node_port = (INET_PROTO, INET_SERVICE)
        return (
            Set(CLUSTER_IPS, (address,), comment="Active ClusterIPs"),
            Set(NODEPORT_IPS, (address,), comment="IPs that accept NodePort traffic"),
            Set(HAIRPIN, (address, *end), comment="Endpoints that may reach themselves"),
            *(
                Set(name, key, (VERDICT,), MAP, comment=comment)
                for name, key, comment in (
                    (SERVICE_IPS, end, "ClusterIP, ExternalIP and LoadBalancer IP traffic"),
                    (SERVICE_NODEPORTS, node_port, "NodePort traffic"),
                    (NO_ENDPOINT_SERVICES, end, "Services with no endpoints: drop or reject"),
                    (NO_ENDPOINT_NODEPORTS, node_port, "NodePorts with no endpoints"),
                    (FIREWALL_IPS, end, "Destinations with LoadBalancerSourceRanges"),
                )
            ),
        )

    def endpoints_map(self, name: str) -> Set:
        """A map from numbers to endpoints."""
        return Set(
            name,
            (INTEGER,),
            (self.address, INET_SERVICE),
            MAP,
            comment="Endpoints by the numbers that rules choose from",
            typeof=self.typeof_endpoints,
        )

    def _load(self, offset: int, register: int) -> Payload:
        return Payload(nf.NETWORK_HEADER, offset, self.address.length, register)


def endpoints_map_name(shard: int) -> str:
    """The name of a map from numbers to endpoints."""
    return f"{SERVICE_ENDPOINTS}{shard}"


def end_key(address: bytes, protocol: int, port: int) -> bytes:
    """A key of `service-ips` and its like."""
    return address + node_port_key(protocol, port)


def node_port_key(protocol: int, port: int) -> bytes:
    """A key of `service-nodeports`."""
    return pad(bytes((protocol,))) + pad(_PORT.pack(port))


def unpack_port(data: bytes) -> int:
    """The port in the first bytes of data."""
    port: int = _PORT.unpack_from(data)[0]
    return port


def protocol_and_port(at: int) -> tuple[Expression, ...]:
    """Load protocol and destination port, from that byte of the registers on."""
    return (
        Meta(nf.META_L4PROTO, nf.register(at)),
        Payload(nf.TRANSPORT_HEADER, 2, 2, nf.register(at + 4)),
    )


def find_verdict(name: str, *load: Expression) -> tuple[Expression, ...]:
    """Do what a map says about the key that was loaded."""
    return (*load, Lookup(name, register=nf.VERDICT_REGISTER))


def goto(chain: str) -> Verdict:
    """Go on in another chain, and not come back."""
    return Verdict(nf.GOTO, chain)


def jump(chain: str) -> Verdict:
    """Go on in another chain, then here."""
    return Verdict(nf.JUMP, chain)


DROP, RETURN = Verdict(nf.DROP), Verdict(nf.RETURN)


def _typeof(kind: int, *parts: bytes) -> bytes:
    """An expression as `nft` keeps it: its number, then what belongs to it."""
    return _tlv(0, struct.pack("=I", kind)) + _tlv(1, b"".join(parts))


def _tlv(kind: int, value: bytes) -> bytes:
    return bytes((kind, len(value))) + value


def _number(kind: int, value: int) -> bytes:
    return _tlv(kind, struct.pack("=I", value))


def _field(description: int, field: int) -> bytes:
    return _typeof(_EXPR_PAYLOAD, _number(0, description), _number(1, field))


def _typeof_endpoints(description: int, field: int) -> bytes:
    """`typeof numgen random mod 2 : ip daddr . th dport`."""
    key = _typeof(_EXPR_NUMGEN, _number(0, 1), _number(1, 2), _number(2, 0))
    parts = (_field(description, field), _field(_DESC_TH, 2))
    data = _typeof(_EXPR_CONCAT, *(_tlv(number, part) for number, part in enumerate(parts)))
    return _tlv(3, key) + _tlv(4, data)


_AF = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
LAYOUTS = {
    Family.V4: Layout(
        Family.V4, TABLES[Family.V4], IPV4_ADDR, 12, 16, 3, _typeof_endpoints(_DESC_IP, 12)
    ),
    Family.V6: Layout(
        Family.V6, TABLES[Family.V6], IPV6_ADDR, 8, 24, 4, _typeof_endpoints(_DESC_IP6, 9)
    ),
}
