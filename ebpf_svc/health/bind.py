"""Where `host:port` of a setting listens: both families where it names no particular address."""

from __future__ import annotations

from collections.abc import Callable

from ebpf_svc.health.http import Handler
from ebpf_svc.health.server import Site
from ebpf_svc.model.net import canonical_address

_TWINS = {"0.0.0.0": "::", "::": "0.0.0.0", "127.0.0.1": "::1", "::1": "127.0.0.1"}
"""Everywhere and this machine alone mean so in either family; kube-proxy listens in one."""


def sites_of(
    name: str,
    address: str,
    handler: Handler,
    on_failure: Callable[[Site, OSError], None],
) -> tuple[Site, ...]:
    """Expand a setting into sites.

    The twin of an address in the other family is an extra: that a machine has no such family is no
    failure.

    Args:
        name: what is served, for messages.
        address: `host:port`, IPv6 in brackets, validated; empty = nowhere.
        handler: answers.
        on_failure: told when the address given cannot be had.
    """
    if not address:
        return ()
    host, _, port = address.rpartition(":")
    host = canonical_address(host.strip("[]"))
    site = Site(name, host, int(port), handler, on_failure)
    twin = _TWINS.get(host)
    return (site,) if twin is None else (site, Site(name, twin, int(port), handler))
