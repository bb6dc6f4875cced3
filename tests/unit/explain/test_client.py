"""Who SRC is, and of which class (D1, D2)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ebpf_svc.config import DetectLocal, DetectLocalMode, Settings
from ebpf_svc.dataplane.ebpf.devices import DeviceRole
from ebpf_svc.errors import ConfigError
from ebpf_svc.explain.client import Client, resolve
from ebpf_svc.explain.known import Known, PodFacts
from ebpf_svc.explain.surroundings import Device, Surroundings
from ebpf_svc.model.net import Family, Sources

VETH = Device("veth1", 7, DeviceRole.POD)
NIC = Device("eth0", 2, DeviceRole.NODE)
TUNNEL = Device("flannel.1", 3, DeviceRole.NODE)
ROUTES = {"10.244.1.5": VETH, "10.244.2.5": TUNNEL, "192.0.2.9": VETH}
KNOWN = Known(None, {"shop/cart": PodFacts(("10.244.1.5", "fd00:10:244::5"), "node1")})
SETTINGS = Settings(cluster_cidrs=("10.244.0.0/16",))


def _resolve(
    word: str,
    settings: Settings = SETTINGS,
    family: Family = Family.V4,
    routes: Mapping[str, Device] = ROUTES,
) -> Client:
    around = Surroundings(
        frozenset({"172.18.0.2", "127.0.0.1"}), lambda a: routes.get(a, NIC), lambda a: "172.18.0.2"
    )
    return resolve(word, family, settings, known=KNOWN, around=around)


@pytest.mark.parametrize(
    ("word", "kind", "words"),
    [
        ("10.244.1.5", Sources.POD, "veth1"),
        ("192.0.2.9", Sources.POD, "veth1"),
        ("10.244.2.5", Sources.POD, "inside 10.244.0.0/16"),
        ("192.0.2.10", Sources.EXTERNAL, "outside 10.244.0.0/16"),
        ("outside", Sources.EXTERNAL, "outside 10.244.0.0/16"),
        ("172.18.0.2", Sources.NODE, "this node itself"),
        ("node", Sources.NODE, "a process of this node"),
        ("localhost", Sources.NODE, "loopback"),
    ],
)
def test_class_and_reason(word: str, kind: Sources, words: str) -> None:
    """A pod's device makes a pod, whatever its address; else the prefix decides."""
    client = _resolve(word)
    assert client.kind is kind
    assert words in client.why


def test_pod_by_name_and_name_by_address() -> None:
    """Either way round; in the family of what is called."""
    assert _resolve("shop/cart").address == "10.244.1.5"
    assert _resolve("10.244.1.5").name == "shop/cart"
    assert _resolve("shop/cart", family=Family.V6).address == "fd00:10:244::5"
    with pytest.raises(ConfigError, match="a pod with an IPv4 address"):
        _resolve("shop/nobody")


def test_without_a_prefix_everybody_is_outside() -> None:
    """D2, but for pods behind a pod's device."""
    assert _resolve("10.244.2.5", Settings()).kind is Sources.EXTERNAL
    assert "no prefix of pods" in _resolve("10.244.2.5", Settings()).why
    assert _resolve("10.244.1.5", Settings()).kind is Sources.POD


@pytest.mark.parametrize(
    ("detect", "kind"),
    [
        (DetectLocal(mode=DetectLocalMode.BRIDGE_INTERFACE, bridge_interface="cni0"), Sources.POD),
        (DetectLocal(mode=DetectLocalMode.BRIDGE_INTERFACE, bridge_interface="br1"),
         Sources.EXTERNAL),
        (DetectLocal(mode=DetectLocalMode.INTERFACE_NAME_PREFIX, interface_name_prefix="xyz"),
         Sources.POD),
    ],
)  # fmt: skip
def test_device_tells_pods_in_modes_by_device(detect: DetectLocal, kind: Sources) -> None:
    """BridgeInterface and InterfaceNamePrefix look at nothing else."""
    settings = Settings(detect_local=detect)
    port = Device("xyz3", 9, None, bridge="cni0")
    assert _resolve("10.0.0.9", settings, routes={"10.0.0.9": port}).kind is kind


@pytest.mark.parametrize("word", ["nobody", "10.0.0.300", "fd00::1"])
def test_nonsense_is_refused(word: str) -> None:
    """Also an address of another family than the target's."""
    with pytest.raises(ConfigError, match="SRC"):
        _resolve(word)
