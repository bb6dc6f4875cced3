"""Which settings a running agent can take on, and which it must be started with."""

from __future__ import annotations

from typing import NamedTuple

from ebpf_svc.config.given import FieldPath, leaves, value_of
from ebpf_svc.config.settings import Settings

LIVE_FIELDS = frozenset(
    {
        "mode",
        "fallback",
        "drain_s",
        "log.level",
        "log.format",
        "node_port_addresses",
        "localhost_node_ports",
        "masquerade_all",
        "allow_external_ips",
        "resync_period_s",
        "min_sync_period_s",
        "retry_max_s",
    }
)
"""Which mode serves, decisions of the plan, the pace of the loop and log lines. The rest is
compiled in, sizes what is in the kernel, or names what is open."""


class Changes(NamedTuple):
    """Fields that differ, in the order of definition."""

    live: tuple[FieldPath, ...]
    restart_needed: tuple[FieldPath, ...]


def changes(old: Settings, new: Settings) -> Changes:
    """Compare two configurations, both as `load` gives them."""
    differing = [path for path in leaves() if value_of(old, path) != value_of(new, path)]
    return Changes(
        tuple(path for path in differing if path in LIVE_FIELDS),
        tuple(path for path in differing if path not in LIVE_FIELDS),
    )


def take_live(old: Settings, new: Settings) -> Settings:
    """The old settings with the live fields of the new ones."""
    update = {path: value_of(new, path) for path in LIVE_FIELDS if "." not in path}
    return old.model_copy(update={**update, "log": new.log})
