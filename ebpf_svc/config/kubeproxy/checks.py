"""What kube-proxy checks before it starts (K2), so that a file it refuses is refused here too."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from ebpf_svc.config.kubeproxy.types import (
    Conntrack,
    Iptables,
    Ipvs,
    KubeProxyConfiguration,
    Nftables,
)
from ebpf_svc.config.problems import Problem
from ebpf_svc.config.values import NODE_PORT_WORDS, format_duration, split_host_port
from ebpf_svc.model.net import canonical_prefix, family_of

MODES = ("", "iptables", "ipvs", "nftables")
DETECT_LOCAL_MODES = ("", "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix")
LOG_FORMATS = ("text", "json")


def problems(config: KubeProxyConfiguration) -> Iterator[Problem]:
    """Find what kube-proxy would refuse; paths are the file's."""
    yield from _choices(config)
    yield from _addresses(config)
    yield from _prefixes(config)
    yield from _sections(config)
    for name, value in config.conntrack:
        if value < 0:
            yield _problem(_path(Conntrack, "conntrack", name), value, "at least 0")
    if config.client_connection.burst < 0:
        yield _problem("clientConnection.burst", config.client_connection.burst, "at least 0")
    if not -1000 <= config.oom_score_adj <= 1000:
        yield _problem("oomScoreAdj", config.oom_score_adj, "-1000..1000")
    if config.config_sync_period <= 0:
        yield _problem("configSyncPeriod", config.config_sync_period, "more than 0")


def _problem(path: str, got: object, expected: str) -> Problem:
    # Durations are the only fractions among the checked fields.
    got = format_duration(got) if isinstance(got, float) else got
    return Problem(tuple(path.split(".")), got, expected)


def _path(section: type[Conntrack] | type[Ipvs], prefix: str, name: str) -> str:
    return f"{prefix}.{section.model_fields[name].alias}"


def _choices(config: KubeProxyConfiguration) -> Iterator[Problem]:
    for path, value, choices in (
        ("mode", config.mode, MODES),
        ("detectLocalMode", config.detect_local_mode, DETECT_LOCAL_MODES),
        ("logging.format", config.logging.format, LOG_FORMATS),
    ):
        if value not in choices:
            yield _problem(path, value, "one of " + ", ".join(choice or '""' for choice in choices))
    for mode, path, value in (
        ("BridgeInterface", "detectLocal.bridgeInterface", config.detect_local.bridge_interface),
        (
            "InterfaceNamePrefix",
            "detectLocal.interfaceNamePrefix",
            config.detect_local.interface_name_prefix,
        ),
    ):
        if config.detect_local_mode == mode and not value:
            yield _problem(path, value, f"a name, since detectLocalMode is {mode}")
    version = config.show_hidden_metrics_for_version
    if version and not re.fullmatch(r"\d+\.\d+", version):
        yield _problem("showHiddenMetricsForVersion", version, "<major>.<minor>, e.g. 1.35")


def _addresses(config: KubeProxyConfiguration) -> Iterator[Problem]:
    if not _is(ipaddress.ip_address, config.bind_address):
        yield _problem("bindAddress", config.bind_address, "an IP address")
    healthz, metrics = config.healthz_bind_address, config.metrics_bind_address
    if healthz and not _is(split_host_port, healthz):
        yield _problem("healthzBindAddress", healthz, "IP:port, port 1..65535")
    if not _is(split_host_port, metrics):
        yield _problem("metricsBindAddress", metrics, "IP:port, port 1..65535")


def _prefixes(config: KubeProxyConfiguration) -> Iterator[Problem]:
    prefixes = config.cluster_cidr.split(",") if config.cluster_cidr else []
    families = {family_of(prefix) for prefix in prefixes}
    if not all(_is(canonical_prefix, prefix) for prefix in prefixes) or len(families) < len(
        prefixes
    ):
        yield _problem(
            "clusterCIDR", config.cluster_cidr, "a CIDR, or one of each family with a comma between"
        )
    for number, text in enumerate(config.node_port_addresses or ()):
        if text not in NODE_PORT_WORDS and not _is(canonical_prefix, text):
            yield _problem(f"nodePortAddresses[{number}]", text, "a CIDR, or the word primary")


def _sections(config: KubeProxyConfiguration) -> Iterator[Problem]:
    """The iptables section is always checked, the others in their mode."""
    periods: tuple[tuple[str, Iptables | Ipvs | Nftables], ...] = (
        ("iptables", config.iptables),
        ("ipvs", config.ipvs),
        ("nftables", config.nftables),
    )
    for name, section in periods:
        if name not in ("iptables", config.mode):
            continue
        if section.sync_period <= 0:
            yield _problem(f"{name}.syncPeriod", section.sync_period, "more than 0")
        if not 0 <= section.min_sync_period <= section.sync_period:
            yield _problem(
                f"{name}.minSyncPeriod", section.min_sync_period, f"0 to {name}.syncPeriod"
            )
    for name, bit in (
        ("iptables", config.iptables.masquerade_bit),
        ("nftables", config.nftables.masquerade_bit),
    ):
        if name in ("iptables", config.mode) and not 0 <= bit <= 31:
            yield _problem(f"{name}.masqueradeBit", bit, "0..31")
    if config.mode != "ipvs":
        return
    for field in ("tcp_timeout", "tcp_fin_timeout", "udp_timeout"):
        if (value := getattr(config.ipvs, field)) < 0:
            yield _problem(_path(Ipvs, "ipvs", field), value, "at least 0")
    for number, text in enumerate(config.ipvs.exclude_cidrs or ()):
        if not _is(canonical_prefix, text):
            yield _problem(f"ipvs.excludeCIDRs[{number}]", text, "a CIDR")


def _is(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True
