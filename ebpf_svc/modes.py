"""The dataplanes by name; each is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.errors import ConfigError

_CLASSES = {
    "ebpf": ("ebpf_svc.dataplane.ebpf.dataplane", "EbpfDataplane"),
    "nftables": ("ebpf_svc.dataplane.nftables.dataplane", "NftablesDataplane"),
    "ipvs": ("ebpf_svc.dataplane.ipvs.dataplane", "IpvsDataplane"),
    "iptables": ("ebpf_svc.dataplane.iptables.dataplane", "IptablesDataplane"),
    "userspace": ("ebpf_svc.dataplane.userspace.dataplane", "UserspaceDataplane"),
    # In memory, for tests; gone with the process.
    "fake": ("ebpf_svc.dataplane.fake", "FakeDataplane"),
}
MODES = tuple(name for name in _CLASSES if name != "fake")
"""What a user can choose, best first: `auto` takes the first that can run."""


def make_dataplane(mode: str, settings: Settings) -> Dataplane:
    """Build a dataplane, not yet open.

    Args:
        mode: one of `MODES`, or `fake`.
        settings: this node's settings.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode not in _CLASSES:
        raise ConfigError("mode", got=mode, expected=" or ".join(MODES))
    module, name = _CLASSES[mode]
    make: Callable[..., Dataplane] = getattr(import_module(module), name)
    return make() if mode == "fake" else make(settings)
