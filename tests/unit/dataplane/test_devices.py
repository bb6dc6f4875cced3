"""Which devices carry which programs."""

from __future__ import annotations

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.devices import DeviceRole, role_of
from ebpf_svc.host.links import Link, Side

ETHERNET, LOOPBACK, IPIP, BARE, INFINIBAND = 1, 772, 768, 0xFFFE, 32


def link(name: str, kind: str = "", *, type: int = ETHERNET, slave: str = "") -> Link:
    flags = 0x8 if type == LOOPBACK else 0x1
    return Link(index=2, name=name, kind=kind, slave_kind=slave, type=type, flags=flags)


@pytest.mark.parametrize(
    ("device", "role"),
    [
        (link("eth0"), DeviceRole.NODE),
        (link("enp3s0f1"), DeviceRole.NODE),
        (link("eth0.100", "vlan"), DeviceRole.NODE),
        (link("bond0", "bond"), DeviceRole.NODE),
        (link("flannel.1", "vxlan"), DeviceRole.NODE),
        (link("veth12ab34cd", "veth"), DeviceRole.POD),
        (link("cali0123456789a", "veth"), DeviceRole.POD),
        (link("tunl0", "ipip", type=IPIP), DeviceRole.NODE_L3),
        (link("wg0", "wireguard", type=BARE), DeviceRole.NODE_L3),
    ],
    ids=lambda value: value.name,
)
def test_device_of_a_usual_node_has_its_role(device, role):
    """NICs, tunnels and pod interfaces of the CNIs the default patterns name."""
    assert role_of(device, EbpfSettings()) is role


@pytest.mark.parametrize(
    "device",
    [
        link("lo", type=LOOPBACK),
        link("cni0", "bridge"),
        link("docker0", "bridge"),
        link("enbr0", "bridge"),
        link("ethifb0", "ifb"),
        link("veth0", "tun"),
        link("tailscale0", "tun", type=BARE),
        link("eth1", slave="bond"),
        link("ib0", type=INFINIBAND),
    ],
    ids=lambda device: f"{device.name} {device.kind} {device.slave_kind}".strip(),
)
def test_device_that_is_none_of_ours_has_no_role(device):
    """Loopback, bridges, mirrors, ports of a bond and unknown headers stay untouched."""
    assert role_of(device, EbpfSettings()) is None


def test_node_pattern_wins_over_pod_pattern():
    """A node that is a container has a veth as its NIC."""
    settings = EbpfSettings(pod_devices=("*",), node_devices=("eth*",))

    assert role_of(link("eth0", "veth"), settings) is DeviceRole.NODE
    assert role_of(link("veth0", "veth"), settings) is DeviceRole.POD


def test_patterns_are_case_sensitive_as_device_names_are():
    """ETH0 and eth0 are two devices."""
    assert role_of(link("ETH0"), EbpfSettings()) is None


def test_devices_without_ethernet_get_programs_that_expect_none():
    """A program that skipped 14 bytes of an IP header would misread every packet."""
    assert DeviceRole.NODE_L3.program(Side.INGRESS) == "node_ingress_l3"
    assert DeviceRole.NODE_L3.program(Side.EGRESS) == "egress_l3"
    assert DeviceRole.POD.program(Side.INGRESS) == "pod_ingress"
