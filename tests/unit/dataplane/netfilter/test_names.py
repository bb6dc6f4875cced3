"""Chain names are kube-proxy's to the letter: operators and tools look for them."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.netfilter.names import NFT_NAME_LENGTH, iptables_hash, nft_name
from ebpf_svc.model.desired import Backend
from ebpf_svc.model.net import Protocol
from ebpf_svc.model.service import ServicePortName

P80 = ServicePortName("ns1", "svc1", "p80", Protocol.TCP)
HTTP = ServicePortName("testing", "service", "http", Protocol.TCP)
POD = Backend("10.180.0.1", 80)


def test_iptables_hashes_are_the_known_ones() -> None:
    """I17: KUBE-SVC-… and KUBE-SEP-… carry the hashes kube-proxy's have."""
    assert iptables_hash(P80) == "XPGD46QRK7WJZT7O"
    assert iptables_hash(P80, POD) == "SXIVWICOYRO3J4NJ"


@pytest.mark.parametrize(
    ("port", "backend", "name"),
    [
        (P80, None, "ULMVA6XW-ns1/svc1/tcp/p80"),
        (HTTP, POD, "JO2XBXZR-testing/service/tcp/http__10.180.0.1/80"),
    ],
)
def test_nft_names_are_the_known_ones(
    port: ServicePortName, backend: Backend | None, name: str
) -> None:
    """X16: service-…, local-… and endpoint-… are named as kube-proxy names them."""
    assert nft_name(port, backend) == name


def test_nft_names_hold_no_colons_and_end_somewhere() -> None:
    """X16: colons of IPv6 become dots, and a name too long is cut."""
    assert nft_name(HTTP, Backend("fd00::1", 80)).endswith("/http__fd00..1/80")
    long = nft_name(ServicePortName("n" * 63, "s" * 63, "p" * 200, Protocol.SCTP))
    assert (len(long), long[-3:]) == (NFT_NAME_LENGTH, "...")
