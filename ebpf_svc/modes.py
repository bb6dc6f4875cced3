"""The dataplanes by name; each is loaded when it is asked for."""

from __future__ import annotations

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.errors import ConfigError

MODES = ("ebpf",)
"""What a user can choose."""


def make_dataplane(mode: str, settings: Settings) -> Dataplane:
    """Build a dataplane, not yet open.

    Args:
        mode: one of `MODES`, or `fake` for tests: in memory, gone with the process.
        settings: this node's settings.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode == "ebpf":
        from ebpf_svc.dataplane.ebpf.dataplane import EbpfDataplane  # noqa: PLC0415

        return EbpfDataplane(settings)
    if mode == "fake":
        from ebpf_svc.dataplane.fake import FakeDataplane  # noqa: PLC0415

        return FakeDataplane()
    raise ConfigError("mode", got=mode, expected=" or ".join(MODES))
