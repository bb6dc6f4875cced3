"""Every way a node's settings can have the programs compiled, as the defines they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebpf_svc.dataplane.ebpf import constants
from ebpf_svc.model.net import Family
from ebpf_svc.testbed import addressing
from tests.lib.packets import CLUSTER_CIDRS

OPTION_SETS: Mapping[str, Mapping[str, Any]] = {
    "testbed": {"cluster_cidrs": addressing.CLUSTER_CIDRS, "translate_pods": True},
    "packet": {"cluster_cidrs": CLUSTER_CIDRS, "translate_pods": True},
    "host-only": {"cluster_cidrs": addressing.CLUSTER_CIDRS, "translate_pods": False},
    "no-cidr": {"cluster_cidrs": (), "translate_pods": True},
    "no-cidr-host-only": {"cluster_cidrs": (), "translate_pods": False},
    # With the fast path the hooks leave pods to tc.
    "fast": {
        "cluster_cidrs": addressing.CLUSTER_CIDRS,
        "translate_pods": False,
        "fast_path": True,
    },
    "fast-xdp": {
        "cluster_cidrs": addressing.CLUSTER_CIDRS,
        "translate_pods": False,
        "fast_path": True,
        "xdp": True,
    },
    "no-sockets": {
        "cluster_cidrs": addressing.CLUSTER_CIDRS,
        "translate_pods": False,
        "host_packets": True,
    },
    "mark": {
        "cluster_cidrs": addressing.CLUSTER_CIDRS,
        "translate_pods": True,
        "masquerade_mark": 1 << 31,
    },
}

COVERING = ("fast-xdp", "no-sockets")
"""Those that together with `packet`, which other tests load, hold every part of the programs."""


def defines(name: str, kernel: tuple[int, int]) -> dict[Family, dict[str, str]]:
    """What `compiler.obtain` takes for an option set on that kernel."""
    options = OPTION_SETS[name]
    return {family: constants.node_defines(family, kernel=kernel, **options) for family in Family}
