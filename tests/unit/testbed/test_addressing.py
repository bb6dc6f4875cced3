from __future__ import annotations

from ipaddress import ip_address, ip_network

from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing


def test_every_pod_address_lies_in_the_cluster() -> None:
    """An agent told the cluster's prefixes takes every pod for a pod."""
    for family, cluster in zip(Family, addressing.CLUSTER_CIDRS, strict=True):
        for number in (1, 2):
            address = ip_address(addressing.pod_addresses(number, addressing.FIRST_POD).of(family))
            prefix = ip_network(addressing.pod_cidrs(number).of(family))
            assert address in prefix
            assert prefix.network_address in ip_network(cluster)


def test_ranges_do_not_overlap() -> None:
    """Pods, services, VIPs, nodes and the outside are told apart by address alone."""
    networks = [
        ip_network(text)
        for text in (*addressing.CLUSTER_CIDRS, *addressing.SERVICE_CIDRS, *addressing.VIP_CIDRS)
    ]
    for host in (addressing.LAN_ROUTER, addressing.OUTSIDE_ROUTER):
        for family in Family:
            length = addressing.PREFIX_LENGTH[family]
            networks.append(ip_network(f"{host.of(family)}/{length}", strict=False))
    overlapping = [
        (one, other)
        for one in networks
        for other in networks
        if one is not other and one.version == other.version and one.overlaps(other)
    ]
    assert overlapping == []


def test_mac_is_made_from_the_address() -> None:
    """Both ends of a link can name the MAC before the device exists."""
    assert addressing.mac_of("10.244.1.10") == "0a:58:0a:f4:01:0a"
