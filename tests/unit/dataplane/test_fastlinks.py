"""Which devices the fast path may send through."""

from __future__ import annotations

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.constants import LinkKind
from ebpf_svc.dataplane.ebpf.fastlinks import link_values
from ebpf_svc.host.links import DeviceAddress, Link
from ebpf_svc.model.net import Family

SETTINGS = EbpfSettings()
ADDRESSES = [
    DeviceAddress(2, "192.168.0.11"),
    DeviceAddress(2, "fd00:192::11"),
    DeviceAddress(3, "10.244.1.1"),
    DeviceAddress(2, "192.168.0.99"),
]


def link(index: int, name: str, kind: str = "", **options: object) -> Link:
    return Link(index, name, kind, "", 1, 0, **options)  # type: ignore[arg-type]


NIC, BRIDGE = link(2, "eth0"), link(3, "cni0", "bridge")
POD = link(4, "veth1", "veth", master=3, has_far_peer=True)


def test_pods_their_bridge_and_nics_are_used() -> None:
    """A device has its own first address, and one without the first NIC's."""
    values = link_values([NIC, BRIDGE, POD], ADDRESSES, SETTINGS, Family.V4)
    assert values == {
        2: (LinkKind.NIC, "192.168.0.11"),
        3: (LinkKind.BRIDGE, "10.244.1.1"),
        4: (LinkKind.PEER, "192.168.0.11"),
    }
    assert link_values([BRIDGE, POD], ADDRESSES, SETTINGS, Family.V6)[3][1] == ""


def test_nic_whose_driver_runs_a_program_takes_frames_of_other_drivers() -> None:
    """One without, and one that has none, as a VLAN, would lose them."""
    driven = link(2, "eth0", xdp_program=7, xdp_in_driver=True)
    vlan = link(5, "eth0.7", "vlan")
    generic = link(6, "eth1", xdp_program=8)
    values = link_values([driven, vlan, generic], ADDRESSES, SETTINGS, Family.V4)
    assert {index: kind for index, (kind, _) in values.items()} == {
        2: LinkKind.DRIVER,
        5: LinkKind.NIC,
        6: LinkKind.NIC,
    }


@pytest.mark.parametrize(
    "other",
    [
        link(5, "docker0", "bridge"),
        link(5, "flannel.1", "vxlan"),
        # Both ends here: there is no other namespace to put a packet into.
        link(5, "veth9", "veth"),
        Link(5, "wg0", "wireguard", "", 0xFFFE, 0),
        Link(5, "lo", "", "", 772, 0x8),
    ],
    ids=lambda each: each.name,
)
def test_others_are_left_to_the_stack(other: Link) -> None:
    """Bridges without pods, tunnels, and pairs that do not lead to a pod."""
    assert 5 not in link_values([NIC, BRIDGE, POD, other], ADDRESSES, SETTINGS, Family.V4)
