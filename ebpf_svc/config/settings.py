"""The agent's settings: each field says unit, default and why.

A file spells them in camelCase without the unit (`resync_period_s` is `resyncPeriod: 30s`), or as
they are named here.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from ebpf_svc.config.ebpf import EbpfSettings
from ebpf_svc.config.ipvs import IpvsSettings
from ebpf_svc.config.kubernetes import KubernetesSettings
from ebpf_svc.config.userspace import UserspaceSettings
from ebpf_svc.config.values import (
    Address,
    AllOrInside,
    NodePortAddress,
    Prefix,
    Seconds,
    Section,
    listen_at,
    wrong,
)
from ebpf_svc.log import LogFormat
from ebpf_svc.model.net import Family

HEALTHZ_PORT, METRICS_PORT = 10256, 10249
"""Kube-proxy's ports: load balancers and monitoring already look there."""


class Mode(StrEnum):
    """Which dataplane serves."""

    AUTO = "auto"
    """The best this machine can run."""
    EBPF = "ebpf"
    NFTABLES = "nftables"
    IPVS = "ipvs"
    IPTABLES = "iptables"
    USERSPACE = "userspace"
    """Sockets of the agent relay; for kernels without any of the others."""
    FAKE = "fake"
    """In memory, for tests."""


class DetectLocalMode(StrEnum):
    """How the source of a packet is known to be a pod (D1); spelt as kube-proxy spells them."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class LogLevel(StrEnum):
    """The least severe line printed."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class DetectLocal(Section):
    """How the source of a packet is known to be a pod (D1).

    What enters through a pod device is a pod's in every mode; the mode decides about the rest.
    """

    mode: DetectLocalMode = DetectLocalMode.CLUSTER_CIDR
    """ClusterCIDR: sources inside `cluster_cidrs`; NodeCIDR: inside the Node's spec.podCIDRs;
    BridgeInterface, InterfaceNamePrefix: only what enters through a pod device.
    """
    bridge_interface: str = ""
    """The pods' bridge, needed by BridgeInterface; its ports are matched by `ebpf.pod_devices`."""
    interface_name_prefix: str = ""
    """What names of pod devices start with, needed by InterfaceNamePrefix; it joins
    `ebpf.pod_devices`.
    """

    @model_validator(mode="after")
    def _parameter_of_mode(self) -> DetectLocal:
        needed = {
            DetectLocalMode.BRIDGE_INTERFACE: ("bridgeInterface", self.bridge_interface),
            DetectLocalMode.INTERFACE_NAME_PREFIX: (
                "interfaceNamePrefix",
                self.interface_name_prefix,
            ),
        }
        name, value = needed.get(self.mode, ("", "none"))
        if not value:
            raise wrong(f"a {name} for mode {self.mode.value}")
        return self


class ConntrackSettings(Section):
    """The kernel's connection tracking, which masquerading still needs (S1-S6)."""

    max_per_core: int = Field(default=32_768, ge=0)
    """Entries for each CPU; 0 = leave nf_conntrack_max alone."""
    min: int = Field(default=131_072, ge=0)
    """Entries at least, however few CPUs; not used when `max_per_core` is 0."""
    tcp_established_timeout_s: Seconds = Field(default=86_400.0, ge=0)
    """How long an idle TCP connection is kept, 1 day; 0 = leave the kernel's 5 days."""
    tcp_close_wait_timeout_s: Seconds = Field(default=3_600.0, ge=0)
    """How long a half-closed TCP connection is kept, 1 h as servers do; 0 = leave the kernel's 1
    min.
    """
    tcp_be_liberal: bool = False
    """Do not call segments outside the window invalid, for networks with asymmetric routes."""
    udp_timeout_s: Seconds = Field(default=0.0, ge=0)
    """How long an unanswered UDP flow is kept; 0 = leave the kernel's."""
    udp_stream_timeout_s: Seconds = Field(default=0.0, ge=0)
    """How long an answered UDP flow is kept; 0 = leave the kernel's."""


class LogSettings(Section):
    """Log lines, on stderr."""

    level: LogLevel = LogLevel.INFO
    """Least severe lines printed; debug has one for every entry written."""
    format: LogFormat = LogFormat.AUTO
    """auto: console on a terminal, else JSON."""


class Settings(Section):
    """Everything `ebpf-svc run` can be told."""

    mode: Mode = Mode.AUTO
    """Which dataplane serves: auto takes the first this machine can run of ebpf, nftables, ipvs,
    iptables and userspace.
    """
    fallback: bool = False
    """When the mode asked for by name cannot run here, take the next that can; off = say what is
    missing and end.
    """
    drain_s: Seconds = Field(default=300.0, ge=0)
    """After a switch of modes, how long connections that were open may go on through the mode that
    served before; longer ones are cut then. Most modes need no time.
    """
    kube_proxy_mode: str = ""
    """What a KubeProxyConfiguration asked for, for messages; decides nothing."""
    node_name: str = ""
    """Name of this node as Nodes and endpoints spell it; empty = the host name, lower case (W7)."""
    bind_address: Address = "0.0.0.0"
    """The node's primary address if it is not to be taken from the Node object (N2); nothing
    listens there. 0.0.0.0 or :: = take it from there.
    """
    manifests: Path | None = None
    """Folder of manifests to serve."""
    state_dir: Path = Path("/var/lib/ebpf-svc")
    """Allocated cluster IPs and node ports, so that they survive a restart."""
    run_dir: Path = Path("/run/ebpf-svc")
    """Lock and status of the running agent; `show` reads it."""
    families: tuple[Family, ...] = (Family.V4, Family.V6)
    """IP families served."""
    cluster_cidrs: tuple[Prefix, ...] = ()
    """Pod addresses of the cluster: a source inside is a pod (D1 ClusterCIDR), else an outside
    client; the first of each family counts. Empty = no detector: off-cluster traffic to cluster IPs
    is not masqueraded (D2).
    """
    detect_local: DetectLocal = DetectLocal()
    service_cidrs: tuple[Prefix, ...] = ("10.96.0.0/16", "fd00:10:96::/112")
    """Ranges cluster IPs are allocated from in standalone mode, one a family."""
    node_port_range: tuple[int, int] = (30000, 32767)
    """Node ports allocated or accepted in standalone mode, both ends included."""
    node_port_addresses: tuple[NodePortAddress, ...] = ()
    """CIDRs or the words primary, localhost, all (A1-A5, Q3); empty = all local addresses."""
    localhost_node_ports: bool = True
    """Serve node ports on 127.0.0.1 and ::1 where `node_port_addresses` selects them."""
    masquerade_all: bool = False
    """Masquerade all traffic to cluster IPs (D3)."""
    masquerade_bit: int = Field(default=14, ge=0, le=31)
    """Bit of the packet mark that asks for masquerading; another if the CNI uses kube-proxy's 14
    for its own ends.
    """
    allow_external_ips: AllOrInside = True
    """Honour spec.externalIPs (F8): all of them, none, or those inside a list of prefixes of both
    families, where tenants must not draw traffic to themselves (CVE-2020-8554).
    """
    resync_period_s: Seconds = Field(default=30.0, gt=0)
    """How often the kernel is read back and drift repaired; less often where that would take more
    than a tenth of the time, as with a hundred thousand services in ipvs mode."""
    min_sync_period_s: Seconds = Field(default=0.002, ge=0)
    """Shortest pause between the end of one apply and the start of the next (R2): a rollout becomes
    few writes. At most `resync_period_s`.
    """
    retry_max_s: Seconds = Field(default=30.0, gt=0)
    """Longest pause before a failed apply is tried again; the first is 0.1 s and each doubles."""
    healthz_bind_address: Annotated[str, AfterValidator(listen_at(HEALTHZ_PORT))] = (
        f"0.0.0.0:{HEALTHZ_PORT}"
    )
    """Where /healthz and /livez answer (HS1); 0.0.0.0 and :: mean both families; empty = nowhere.
    The default is where load balancers look for kube-proxy.
    """
    metrics_bind_address: Annotated[str, AfterValidator(listen_at(METRICS_PORT))] = (
        f"127.0.0.1:{METRICS_PORT}"
    )
    """Where /metrics, /proxyMode and /configz answer (HS7); empty = nowhere. The default is for
    collectors on the node alone: metrics tell what a cluster runs.
    """
    bind_address_hard_fail: bool = False
    """End the agent when one of these addresses cannot be had; off = try again every 5 s (HS8)."""
    enable_profiling: bool = False
    """Serve /debug on the metrics address."""
    oom_score_adj: int = Field(default=-999, ge=-1000, le=1000)
    """The kernel's score of this process when memory ends: -999 spares it like kube-proxy (S9)."""
    kubernetes: KubernetesSettings = KubernetesSettings()
    conntrack: ConntrackSettings = ConntrackSettings()
    log: LogSettings = LogSettings()
    ebpf: EbpfSettings = EbpfSettings()
    ipvs: IpvsSettings = IpvsSettings()
    userspace: UserspaceSettings = UserspaceSettings()

    @field_validator("node_name")
    @classmethod
    def _canonical_name(cls, name: str) -> str:
        return name.strip().lower()

    @field_validator("families")
    @classmethod
    def _some_family(cls, families: tuple[Family, ...]) -> tuple[Family, ...]:
        if not families or len(set(families)) != len(families):
            raise wrong("4, 6 or both, each once")
        return families

    @field_validator("node_port_range")
    @classmethod
    def _range(cls, ports: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= ports[0] <= ports[1] <= 65535:
            raise wrong("two ports, the lower first, such as [30000, 32767]")
        return ports

    @field_validator("min_sync_period_s")
    @classmethod
    def _within_resync(cls, pause_s: float, info: ValidationInfo) -> float:
        resync_s = info.data.get("resync_period_s", pause_s)
        if pause_s > resync_s:
            raise wrong(f"at most the resync period, {resync_s:g} s")
        return pause_s
