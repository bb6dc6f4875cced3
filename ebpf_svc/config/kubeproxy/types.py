"""KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) as kube-proxy 1.36 reads it.

Types, defaults and what a zero means are kube-proxy's; `checks` holds its cross checks, `fields`
what we make of each field.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from ebpf_svc.config.values import (
    file_name,
    format_duration,
    parse_duration,
    with_port,
    wrong,
)

HEALTHZ_PORT, METRICS_PORT = 10256, 10249


class KubeSection(BaseModel):
    """Fields that belong together, spelt in camelCase; types are JSON's, nothing is converted."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=file_name, validate_default=False
    )


class _Pointer:
    """Marks what is a pointer in Go: a zero is a value there, elsewhere it means unset."""


POINTER = _Pointer()


def _duration(value: Any) -> float:
    try:
        if isinstance(value, str):
            return parse_duration(value)
    except ValueError:
        pass
    raise wrong("a duration such as 30s or 1h0m0s, as text")


def _flush_frequency(value: Any) -> float:
    """A number is nanoseconds here, and only here."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value / 1e9
    return _duration(value)


_as_go = PlainSerializer(format_duration, return_type=str)
Duration = Annotated[float, BeforeValidator(_duration), _as_go]
"""Seconds, from Go's spelling and into it."""
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Verbosity = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ClientConnection(KubeSection):
    """How the API server is reached."""

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: Annotated[float, PlainSerializer(lambda qps: int(qps) if qps == int(qps) else qps)] = 5
    burst: Int32 = 10


class LogRouting(KubeSection):
    """Streams of one log format."""

    split_stream: bool = False
    info_buffer_size: str | int = "0"


class LogOptions(KubeSection):
    """Options of each log format."""

    text: LogRouting = LogRouting()
    json_: Annotated[LogRouting, Field(alias="json")] = LogRouting()


class ModuleVerbosity(KubeSection):
    """Verbosity of some source files."""

    model_config = ConfigDict(extra="ignore")

    file_pattern: str
    verbosity: Verbosity = 0


class Logging(KubeSection):
    """Component-base's logging options."""

    format: str = "text"
    flush_frequency: Annotated[float, BeforeValidator(_flush_frequency), _as_go] = 5.0
    verbosity: Verbosity = 0
    vmodule: list[ModuleVerbosity] = []
    options: LogOptions = LogOptions()


class Iptables(KubeSection):
    """The iptables mode; parts hold for the ipvs mode too."""

    masquerade_bit: Annotated[Int32, POINTER] = 14
    masquerade_all: bool = False
    localhost_node_ports: Annotated[bool, POINTER] = True
    snat_node_internal_ip: Annotated[bool | None, POINTER] = None
    """Younger than 1.36."""
    sync_period: Duration = 30.0
    min_sync_period: Duration = 1.0


class Ipvs(KubeSection):
    """The ipvs mode."""

    sync_period: Duration = 30.0
    min_sync_period: Duration = 0.0
    scheduler: str = ""
    exclude_cidrs: list[str] | None = None
    strict_arp: bool = False
    tcp_timeout: Duration = 0.0
    tcp_fin_timeout: Duration = 0.0
    udp_timeout: Duration = 0.0


class Nftables(KubeSection):
    """The nftables mode."""

    masquerade_bit: Annotated[Int32, POINTER] = 14
    masquerade_all: bool = False
    sync_period: Duration = 30.0
    min_sync_period: Duration = 1.0


class Winkernel(KubeSection):
    """Windows."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = False
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(KubeSection):
    """Parameters of detectLocalMode."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(KubeSection):
    """Connection tracking."""

    max_per_core: Annotated[Int32, POINTER] = 32_768
    min: Annotated[Int32, POINTER] = 131_072
    tcp_established_timeout: Annotated[Duration, POINTER] = 86_400.0
    tcp_close_wait_timeout: Annotated[Duration, POINTER] = 3_600.0
    tcp_be_liberal: bool = False
    udp_timeout: Duration = 0.0
    udp_stream_timeout: Duration = 0.0


def _name(text: str) -> str:
    return text.strip().lower()


class KubeProxyConfiguration(KubeSection):
    """Everything kube-proxy can be told, with its defaults."""

    feature_gates: dict[str, bool] = {}
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: Annotated[str, AfterValidator(_name)] = ""
    bind_address: str = "0.0.0.0"
    healthz_bind_address: str = f"0.0.0.0:{HEALTHZ_PORT}"
    metrics_bind_address: str = f"127.0.0.1:{METRICS_PORT}"
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = ""
    iptables: Iptables = Iptables()
    ipvs: Ipvs = Ipvs()
    nftables: Nftables = Nftables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: str = ""
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = ""
    node_port_addresses: list[str] | None = None
    oom_score_adj: Annotated[Int32, POINTER] = -999
    conntrack: Conntrack = Conntrack()
    config_sync_period: Duration = 900.0
    port_range: str = ""
    windows_run_as_service: bool = False

    def with_derived(self) -> KubeProxyConfiguration:
        """Fill in what follows from other fields: addresses of the servers and their ports."""
        # Go's words: what has no four-byte form is IPv6.
        ipv6 = ":" in self.bind_address and "." not in self.bind_address
        healthz = self.healthz_bind_address
        metrics = self.metrics_bind_address
        if "healthz_bind_address" not in self.model_fields_set:
            healthz = "[::]" if ipv6 else "0.0.0.0"
            healthz += f":{HEALTHZ_PORT}"
        if "metrics_bind_address" not in self.model_fields_set:
            metrics = "[::1]" if ipv6 else "127.0.0.1"
            metrics += f":{METRICS_PORT}"
        return self.model_copy(
            update={
                "healthz_bind_address": with_port(healthz, HEALTHZ_PORT),
                "metrics_bind_address": with_port(metrics, METRICS_PORT),
            }
        )

    def as_file(self) -> dict[str, Any]:
        """The public form, as kube-proxy would write it."""
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        if data["iptables"]["snatNodeInternalIP"] is None:
            del data["iptables"]["snatNodeInternalIP"]
        if not data["windowsRunAsService"]:
            del data["windowsRunAsService"]
        return data
