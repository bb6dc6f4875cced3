"""Who asks: an address, or a name for one, and the class of clients it belongs to (D1)."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ebpf_svc.config import DetectLocalMode, Settings
from ebpf_svc.config.detect import BY_DEVICE
from ebpf_svc.dataplane.ebpf.devices import DeviceRole
from ebpf_svc.errors import ConfigError
from ebpf_svc.explain.known import Known
from ebpf_svc.explain.surroundings import Device, Surroundings
from ebpf_svc.model.net import Family, Sources, canonical_address, family_of

OUTSIDE = {Family.V4: "203.0.113.99", Family.V6: "2001:db8:203::99"}
"""An address for `outside`: reserved for documents, so nobody has it."""
LOOPBACK = {Family.V4: "127.0.0.1", Family.V6: "::1"}
WORDS = ("node", "localhost", "outside")


@dataclass(frozen=True, slots=True)
class Client:
    """A source of packets, as this node sees it."""

    address: str
    """Empty: a process of the node, whose address routing chooses."""
    kind: Sources
    why: str
    """Why it is of that class: a sentence."""
    device: Device | None = None
    """Where its packets come in; None = they are this node's own, or come by no known way."""
    name: str = ""

    @property
    def is_pod_here(self) -> bool:
        """Its packets come in by a device of a pod."""
        return self.device is not None and self.device.role is DeviceRole.POD


def resolve(
    word: str, family: Family, settings: Settings, *, known: Known, around: Surroundings
) -> Client:
    """Find out who a word of the command line is.

    Args:
        word: an address, `ns/pod`, `node`, `localhost` or `outside`.
        family: of what it calls.
        settings: the agent's.
        known: pods by name.
        around: this node.

    Raises:
        ConfigError: it is nobody, or has no address of that family.
    """
    if word == "node":
        why = "a process of this node"
        return Client("", Sources.NODE, why, name="node")
    if word == "localhost":
        why = "a process of this node that calls from its loopback address"
        return Client(LOOPBACK[family], Sources.NODE, why, name="localhost")
    if word == "outside":
        return _classified(OUTSIDE[family], settings, around, name="outside")
    if "/" in word:
        pod = known.pods.get(word)
        address = next((a for a in pod.addresses if family_of(a) is family), "") if pod else ""
        if not address:
            lacks = f"a pod with an {family.label} address"
            raise ConfigError("SRC", got=word, expected=f"{lacks}, or the address itself")
        return _classified(address, settings, around, name=word)
    try:
        address = canonical_address(word)
    except ValueError as error:
        raise ConfigError(
            "SRC", got=word, expected=f"an address, namespace/pod, {', '.join(WORDS)}"
        ) from error
    if family_of(address) is not family:
        raise ConfigError("SRC", got=word, expected=f"an {family.label} address, as DST is one")
    return _classified(address, settings, around, name=known.pod_at(address))


def _classified(address: str, settings: Settings, around: Surroundings, *, name: str) -> Client:
    if address in around.local_addresses:
        return Client(address, Sources.NODE, "an address of this node itself", name=name)
    device = around.device_of(address)
    if settings.detect_local.mode in BY_DEVICE:
        is_pod, why = _by_device(device, settings)
    else:
        prefix = pod_prefix(settings, family_of(address))
        is_pod = bool(prefix) and ipaddress.ip_address(address) in ipaddress.ip_network(prefix)
        why = f"inside {prefix}, where pods are" if is_pod else _not_inside(prefix)
    if device is not None and device.role is DeviceRole.POD:
        kind, why = Sources.POD, f"its packets come in by {_by(device)}, a pod's device"
    else:
        kind = Sources.POD if is_pod else Sources.EXTERNAL
    return Client(address, kind, why, device, name)


def _by(device: Device) -> str:
    if device.is_guess:
        return f"a port of {device.bridge}"
    return device.name + (f" (of {device.bridge})" if device.bridge else "")


def _by_device(device: Device | None, settings: Settings) -> tuple[bool, str]:
    """Modes in which the device alone tells pods."""
    detect = settings.detect_local
    name = device.name if device else ""
    if detect.mode is DetectLocalMode.BRIDGE_INTERFACE:
        is_pod = bool(device) and detect.bridge_interface in (name, device.bridge if device else "")
    else:
        is_pod = name.startswith(detect.interface_name_prefix)
    is_not = "is" if is_pod else "is not"
    return is_pod, f"{name or 'no device'} {is_not} a pod's by {detect.mode.value}"


def _not_inside(prefix: str) -> str:
    if not prefix:
        return "no prefix of pods is configured, so it counts as a client outside (D2)"
    return f"outside {prefix}, where pods are"


def pod_prefix(settings: Settings, family: Family) -> str:
    """The prefix that tells pods of a family: the first counts (D1); empty = none."""
    prefixes = (prefix for prefix in settings.cluster_cidrs if family_of(prefix) is family)
    return next(prefixes, "")
