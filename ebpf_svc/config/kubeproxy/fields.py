"""What becomes of each field of a KubeProxyConfiguration, and of kube-proxy's flags.

The one table: files and flags are converted by it, `ebpf-svc config show` and
docs/configuration.md print it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Treatment(StrEnum):
    """What a field of kube-proxy's means here."""

    HONOURED = "honoured"
    DIFFERENT = "different"
    """Honoured, but not in every detail; the reason says in which."""
    IGNORED = "ignored"


class KubeField(NamedTuple):
    """One field of a KubeProxyConfiguration."""

    path: str
    treatment: Treatment
    setting: str = ""
    """Path of the setting of ours it becomes."""
    why: str = ""
    flags: tuple[str, ...] = ()
    modes: frozenset[str] | None = None
    """Kube-proxy modes in which its section supplies the value (K1); None = all."""


class KubeFlag(NamedTuple):
    """One of kube-proxy's flags."""

    name: str
    paths: tuple[str, ...]
    """Fields it sets; empty = it is no field."""
    beside_file: bool = False
    """Counts beside a file too (K3)."""

    @property
    def is_switch(self) -> bool:
        """Whether it may stand without a value, for true."""
        return self.name in SWITCHES

    @property
    def is_list(self) -> bool:
        """Whether it may be repeated, and its values hold commas."""
        return self.name in LISTS


_IPTABLES = frozenset({"", "iptables"})
_LIKE_IPTABLES = frozenset({"", "iptables", "ipvs"})
"""Modes that take masquerading from the iptables section (K1)."""
_IPVS, _NFTABLES = frozenset({"ipvs"}), frozenset({"nftables"})


def _honoured(
    path: str,
    setting: str,
    *flags: str,
    why: str = "",
    modes: frozenset[str] | None = None,
) -> KubeField:
    treatment = Treatment.DIFFERENT if why else Treatment.HONOURED
    return KubeField(path, treatment, setting, why, flags, modes)


def _ignored(path: str, why: str, *flags: str) -> KubeField:
    return KubeField(path, Treatment.IGNORED, "", why, flags)


_PAUSE = "absent or 0 is our default: an apply writes differences only, so a second is not needed"
_WINDOWS = "Windows"
_JSON = "objects are read as JSON"
_LINES = "lines are not buffered"

FIELDS = (
    KubeField(
        "featureGates",
        Treatment.DIFFERENT,
        "allow_external_ips",
        "AllowServiceExternalIPs is honoured; other gates have nothing to switch here, each is "
        "named in a warning, and a name much like ours is an error",
        ("--feature-gates",),
    ),
    _honoured("clientConnection.kubeconfig", "kubernetes.kubeconfig", "--kubeconfig"),
    _ignored("clientConnection.acceptContentTypes", _JSON),
    _ignored("clientConnection.contentType", _JSON, "--kube-api-content-type"),
    _honoured("clientConnection.qps", "kubernetes.qps", "--kube-api-qps"),
    _honoured("clientConnection.burst", "kubernetes.burst", "--kube-api-burst"),
    _honoured(
        "logging.format",
        "log.format",
        "--logging-format",
        why="text is our default: console on a terminal, else JSON",
    ),
    _ignored("logging.flushFrequency", _LINES, "--log-flush-frequency"),
    _honoured("logging.verbosity", "log.level", "--v", why="4 and more is debug, less is info"),
    _ignored("logging.vmodule", "it names files of kube-proxy's source", "--vmodule"),
    _ignored("logging.options.text.splitStream", _LINES, "--log-text-split-stream"),
    _ignored("logging.options.text.infoBufferSize", _LINES, "--log-text-info-buffer-size"),
    _ignored("logging.options.json.splitStream", _LINES, "--log-json-split-stream"),
    _ignored("logging.options.json.infoBufferSize", _LINES, "--log-json-info-buffer-size"),
    _honoured("hostnameOverride", "node_name", "--hostname-override"),
    _honoured("bindAddress", "bind_address", "--bind-address"),
    _honoured("healthzBindAddress", "healthz_bind_address", "--healthz-bind-address"),
    _honoured("metricsBindAddress", "metrics_bind_address", "--metrics-bind-address"),
    _honoured("bindAddressHardFail", "bind_address_hard_fail", "--bind-address-hard-fail"),
    _honoured(
        "enableProfiling",
        "enable_profiling",
        "--profiling",
        why="what /debug holds is Python's, not pprof's",
    ),
    _ignored(
        "showHiddenMetricsForVersion",
        "no metric is hidden",
        "--show-hidden-metrics-for-version",
    ),
    _honoured(
        "mode",
        "kube_proxy_mode",
        "--proxy-mode",
        why="the mode that serves, and the next one where it cannot run, unless `mode` or "
        "`fallback` says otherwise; absent is auto, the best this machine can run",
    ),
    _honoured(
        "iptables.masqueradeBit",
        "masquerade_bit",
        "--iptables-masquerade-bit",
        modes=_LIKE_IPTABLES,
    ),
    _honoured("iptables.masqueradeAll", "masquerade_all", "--masquerade-all", modes=_LIKE_IPTABLES),
    _honoured(
        "iptables.localhostNodePorts",
        "localhost_node_ports",
        "--iptables-localhost-nodeports",
        why="for both families: ::1 serves node ports too",
        modes=_IPTABLES,
    ),
    _ignored(
        "iptables.snatNodeInternalIP",
        "younger than Kubernetes 1.36; masquerading takes the address of the way out",
    ),
    _honoured("iptables.syncPeriod", "resync_period_s", "--iptables-sync-period", modes=_IPTABLES),
    _honoured(
        "iptables.minSyncPeriod",
        "min_sync_period_s",
        "--iptables-min-sync-period",
        why=_PAUSE,
        modes=_IPTABLES,
    ),
    _honoured("ipvs.syncPeriod", "resync_period_s", "--ipvs-sync-period", modes=_IPVS),
    _honoured(
        "ipvs.minSyncPeriod", "min_sync_period_s", "--ipvs-min-sync-period", why=_PAUSE, modes=_IPVS
    ),
    _honoured("ipvs.scheduler", "ipvs.scheduler", "--ipvs-scheduler"),
    _honoured("ipvs.excludeCIDRs", "ipvs.exclude_cidrs", "--ipvs-exclude-cidrs", modes=_IPVS),
    _honoured("ipvs.strictARP", "ipvs.strict_arp", "--ipvs-strict-arp"),
    _honoured("ipvs.tcpTimeout", "ipvs.tcp_timeout_s", "--ipvs-tcp-timeout"),
    _honoured("ipvs.tcpFinTimeout", "ipvs.tcp_fin_timeout_s", "--ipvs-tcpfin-timeout"),
    _honoured("ipvs.udpTimeout", "ipvs.udp_timeout_s", "--ipvs-udp-timeout"),
    _honoured("nftables.masqueradeBit", "masquerade_bit", modes=_NFTABLES),
    _honoured("nftables.masqueradeAll", "masquerade_all", "--masquerade-all", modes=_NFTABLES),
    _honoured("nftables.syncPeriod", "resync_period_s", "--iptables-sync-period", modes=_NFTABLES),
    _honoured(
        "nftables.minSyncPeriod",
        "min_sync_period_s",
        "--iptables-min-sync-period",
        why=_PAUSE,
        modes=_NFTABLES,
    ),
    _ignored("winkernel.networkName", _WINDOWS),
    _ignored("winkernel.sourceVip", _WINDOWS),
    _ignored("winkernel.enableDSR", _WINDOWS),
    _ignored("winkernel.rootHnsEndpointName", _WINDOWS),
    _ignored("winkernel.forwardHealthCheckVip", _WINDOWS),
    _honoured("detectLocalMode", "detect_local.mode", "--detect-local-mode"),
    _honoured(
        "detectLocal.bridgeInterface",
        "detect_local.bridge_interface",
        "--pod-bridge-interface",
        why="the bridge's ports are known as pod devices by `ebpf.pod_devices`, not by the bridge",
    ),
    _honoured(
        "detectLocal.interfaceNamePrefix",
        "detect_local.interface_name_prefix",
        "--pod-interface-name-prefix",
        why="a device that matches `ebpf.node_devices` is a node device all the same",
    ),
    _honoured("clusterCIDR", "cluster_cidrs", "--cluster-cidr"),
    _honoured(
        "nodePortAddresses",
        "node_port_addresses",
        "--nodeport-addresses",
        why="followed as addresses come and go; primary, localhost, all and CIDRs may be mixed",
    ),
    _honoured("oomScoreAdj", "oom_score_adj", "--oom-score-adj"),
    _honoured("conntrack.maxPerCore", "conntrack.max_per_core", "--conntrack-max-per-core"),
    _honoured("conntrack.min", "conntrack.min", "--conntrack-min"),
    _honoured(
        "conntrack.tcpEstablishedTimeout",
        "conntrack.tcp_established_timeout_s",
        "--conntrack-tcp-timeout-established",
    ),
    _honoured(
        "conntrack.tcpCloseWaitTimeout",
        "conntrack.tcp_close_wait_timeout_s",
        "--conntrack-tcp-timeout-close-wait",
    ),
    _honoured("conntrack.tcpBeLiberal", "conntrack.tcp_be_liberal", "--conntrack-tcp-be-liberal"),
    _honoured("conntrack.udpTimeout", "conntrack.udp_timeout_s", "--conntrack-udp-timeout"),
    _honoured(
        "conntrack.udpStreamTimeout",
        "conntrack.udp_stream_timeout_s",
        "--conntrack-udp-timeout-stream",
    ),
    _ignored(
        "configSyncPeriod",
        "every plan starts from the whole state, so there is nothing to deliver again",
        "--config-sync-period",
    ),
    _ignored("portRange", "kube-proxy ignores it too"),
    _ignored("windowsRunAsService", _WINDOWS),
)
"""Every field of kube-proxy 1.36."""

LOGGING_FLAGS = frozenset(
    {
        *("--v", "--vmodule", "--logging-format", "--log-flush-frequency"),
        *("--log-text-split-stream", "--log-text-info-buffer-size"),
        *("--log-json-split-stream", "--log-json-info-buffer-size"),
    }
)
SWITCHES = frozenset(
    {
        *("--bind-address-hard-fail", "--profiling", "--masquerade-all", "--ipvs-strict-arp"),
        *("--iptables-localhost-nodeports", "--conntrack-tcp-be-liberal"),
        *("--log-text-split-stream", "--log-json-split-stream"),
    }
)
LISTS = frozenset({"--feature-gates", "--nodeport-addresses", "--ipvs-exclude-cidrs", "--vmodule"})
DEPRECATED_PORTS = {"--healthz-port": "healthzBindAddress", "--metrics-port": "metricsBindAddress"}
"""Flags that give a port to an address without one; 0 = no server."""


def kube_flags() -> tuple[KubeFlag, ...]:
    """Kube-proxy's flags that set something, in the order of the fields they set."""
    paths: dict[str, list[str]] = {}
    for field in FIELDS:
        for name in field.flags:
            paths.setdefault(name, []).append(field.path)
    beside_file = LOGGING_FLAGS | {"--hostname-override"}
    return (
        *(KubeFlag(name, tuple(of), name in beside_file) for name, of in paths.items()),
        KubeFlag("--master", (), beside_file=True),
        *(KubeFlag(name, ()) for name in DEPRECATED_PORTS),
    )
