"""A setting nobody reads is a promise nobody keeps."""

from __future__ import annotations

import re
from pathlib import Path

from ebpf_svc.config.given import leaves

PACKAGE = Path(__file__).parents[3] / "ebpf_svc"
UNREAD = {
    "kube_proxy_mode",  # read by the /configz view, in config itself
    *(path for path in leaves() if path.startswith("userspace.")),
    "detect_local.bridge_interface",  # decides nothing: its presence is checked
    "detect_local.interface_name_prefix",  # joins ebpf.pod_devices, in config itself
}
"""Settings no part of the agent outside config reads: take out what gets its reader."""


def test_every_setting_has_a_reader() -> None:
    """Else it would be accepted, shown, documented, and change nothing."""
    texts = [
        path.read_text()
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "config"
    ]
    source = "\n".join(texts)
    unread = {
        path
        for path in leaves()
        if not re.search(rf"settings\.([a-z_]+\.)?{path.rpartition('.')[2]}\b", source)
    }
    assert unread <= UNREAD
