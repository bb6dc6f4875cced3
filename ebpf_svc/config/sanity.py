"""Settings that are valid and yet do not fit this node (A6, A1)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from ebpf_svc.config.settings import DetectLocalMode, Settings
from ebpf_svc.config.values import split_host_port
from ebpf_svc.errors import ConfigError
from ebpf_svc.model.net import Family, family_of


def check_node(settings: Settings, families: frozenset[Family]) -> tuple[str, ...]:
    """Compare settings with the families of the node's own addresses.

    Args:
        settings: as `load` gives them; in mode NodeCIDR after `with_pod_cidrs`.
        families: those the node has an address of; none = not known yet.

    Returns:
        what should be told, a sentence each.

    Raises:
        ConfigError: every cluster CIDR is of the family a single-stack node does not have.
    """
    prefixes = settings.cluster_cidrs
    if len(families) == 1 and prefixes and not families & set(map(family_of, prefixes)):
        (family,) = families
        field = (
            "clusterCIDRs"
            if settings.detect_local.mode is DetectLocalMode.CLUSTER_CIDR
            else "spec.podCIDRs of the Node"
        )
        raise ConfigError(
            field,
            got=", ".join(prefixes),
            expected=f"a prefix of {family.label}, the node's family",
        )
    return (*_node_ports(settings), *_bind_addresses(settings, families))


def _node_ports(settings: Settings) -> Iterator[str]:
    selection = settings.node_port_addresses
    if not selection:
        yield "nodePortAddresses is unset: node ports answer on every address (see: primary)"
        return
    if {"primary", "localhost", "all"} & set(selection):
        return
    selected = set(map(family_of, selection))
    for family in settings.families:
        if family not in selected:
            yield f"nodePortAddresses names no {family.label} prefix: all its addresses answer (A2)"


def _bind_addresses(settings: Settings, families: frozenset[Family]) -> Iterator[str]:
    for name, text in (
        ("bindAddress", settings.bind_address),
        ("healthzBindAddress", settings.healthz_bind_address),
        ("metricsBindAddress", settings.metrics_bind_address),
    ):
        if not text:
            continue
        address = text if name == "bindAddress" else split_host_port(text)[0]
        parsed = ipaddress.ip_address(address)
        if parsed.is_unspecified or parsed.is_loopback or not families:
            continue
        if family_of(address) not in families:
            yield f"{name} {text} is of a family this node has no address of"
