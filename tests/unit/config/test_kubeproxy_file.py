"""A KubeProxyConfiguration file: types, defaults, checks and what it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.config import DetectLocalMode, LogLevel, Mode, Settings
from ebpf_svc.config.document import KUBE_PROXY_API_VERSION
from ebpf_svc.config.given import spelt, value_of
from ebpf_svc.config.ipvs import IpvsSettings
from ebpf_svc.config.kubeproxy.fields import FIELDS, Treatment
from ebpf_svc.config.kubeproxy.read import decode
from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration
from ebpf_svc.config.kubeproxy.view import as_kube_proxy
from ebpf_svc.config.load import DEFAULT
from ebpf_svc.errors import ConfigError
from ebpf_svc.log import LogFormat
from tests.unit.config.kube import kube_proxy, load_text, ours

KUBEADM = """
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""
"""As kubeadm puts it into the ConfigMap: every field, nearly all unset."""

DIFFERENT_DEFAULTS = {"min_sync_period_s", "log.format", "log.level"}
"""Settings whose defaults are not kube-proxy's, on purpose."""


def test_file_of_kubeadm_is_taken_without_a_warning(tmp_path: Path) -> None:
    """Three fields say something, the zeros mean unset."""
    loaded = load_text(tmp_path, KUBEADM)
    given = {path for path, origin in loaded.origins.items() if origin != DEFAULT}
    assert given == {"bind_address", "cluster_cidrs", "kubernetes.kubeconfig"}
    assert loaded.settings.cluster_cidrs == ("10.244.0.0/16", "fd00:10:244::/56")
    assert loaded.warnings == ()


def test_defaults_are_kube_proxys() -> None:
    """The table of defaults of kube-proxy 1.36, as its own --write-config-to prints them."""
    config = KubeProxyConfiguration()
    assert config.as_file() == decode({}).config.as_file()
    assert config.as_file() | {"logging": None, "winkernel": None} == {
        "featureGates": {},
        "clientConnection": {
            "kubeconfig": "",
            "acceptContentTypes": "",
            "contentType": "application/vnd.kubernetes.protobuf",
            "qps": 5,
            "burst": 10,
        },
        "logging": None,
        "hostnameOverride": "",
        "bindAddress": "0.0.0.0",
        "healthzBindAddress": "0.0.0.0:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "bindAddressHardFail": False,
        "enableProfiling": False,
        "showHiddenMetricsForVersion": "",
        "mode": "",
        "iptables": {
            "masqueradeBit": 14,
            "masqueradeAll": False,
            "localhostNodePorts": True,
            "syncPeriod": "30s",
            "minSyncPeriod": "1s",
        },
        "ipvs": {
            "syncPeriod": "30s",
            "minSyncPeriod": "0s",
            "scheduler": "",
            "excludeCIDRs": None,
            "strictARP": False,
            "tcpTimeout": "0s",
            "tcpFinTimeout": "0s",
            "udpTimeout": "0s",
        },
        "nftables": {
            "masqueradeBit": 14,
            "masqueradeAll": False,
            "syncPeriod": "30s",
            "minSyncPeriod": "1s",
        },
        "winkernel": None,
        "detectLocalMode": "",
        "detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""},
        "clusterCIDR": "",
        "nodePortAddresses": None,
        "oomScoreAdj": -999,
        "conntrack": {
            "maxPerCore": 32768,
            "min": 131072,
            "tcpEstablishedTimeout": "24h0m0s",
            "tcpCloseWaitTimeout": "1h0m0s",
            "tcpBeLiberal": False,
            "udpTimeout": "0s",
            "udpStreamTimeout": "0s",
        },
        "configSyncPeriod": "15m0s",
        "portRange": "",
    }


def test_our_defaults_are_kube_proxys_but_for_a_few(tmp_path: Path) -> None:
    """Taking kube-proxy's place changes nothing nobody asked for."""
    shown = KubeProxyConfiguration().as_file()
    assert shown.pop("detectLocalMode") == ""  # its name for ClusterCIDR
    said = load_text(tmp_path, kube_proxy(**shown)).settings
    for field in FIELDS:
        if field.setting and field.setting not in DIFFERENT_DEFAULTS:
            assert value_of(said, field.setting) == value_of(Settings(), field.setting), field.path


@pytest.mark.parametrize(
    ("fields", "setting", "value"),
    [
        ({"clientConnection": {"qps": 20, "burst": 40}}, "kubernetes.qps", 20),
        ({"hostnameOverride": " Node-1 "}, "node_name", "node-1"),
        ({"bindAddress": "192.0.2.1"}, "bind_address", "192.0.2.1"),
        ({"healthzBindAddress": "127.0.0.1"}, "healthz_bind_address", "127.0.0.1:10256"),
        ({"metricsBindAddress": "0.0.0.0:9"}, "metrics_bind_address", "0.0.0.0:9"),
        ({"bindAddressHardFail": True}, "bind_address_hard_fail", True),
        ({"detectLocalMode": "NodeCIDR"}, "detect_local.mode", DetectLocalMode.NODE_CIDR),
        ({"nodePortAddresses": ["primary"]}, "node_port_addresses", ("primary",)),
        ({"oomScoreAdj": 0}, "oom_score_adj", 0),
        ({"conntrack": {"maxPerCore": 0}}, "conntrack.max_per_core", 0),
        ({"conntrack": {"tcpCloseWaitTimeout": "0s"}}, "conntrack.tcp_close_wait_timeout_s", 0),
        ({"conntrack": {"udpTimeout": "1m30s"}}, "conntrack.udp_timeout_s", 90),
        ({"logging": {"verbosity": 4}}, "log.level", LogLevel.DEBUG),
        ({"logging": {"verbosity": 2}}, "log.level", LogLevel.INFO),
        ({"logging": {"format": "json"}}, "log.format", LogFormat.JSON),
        ({"featureGates": {"AllowServiceExternalIPs": False}}, "allow_external_ips", False),
        ({"iptables": {"localhostNodePorts": False}}, "localhost_node_ports", False),
        ({"iptables": {"masqueradeBit": 0}}, "masquerade_bit", 0),
        ({"iptables": {"minSyncPeriod": "1s"}}, "min_sync_period_s", 1),
    ],
)
def test_field_becomes_the_setting(
    tmp_path: Path, fields: dict[str, Any], setting: str, value: Any
) -> None:
    """Honoured fields, among them zeros that are values because Go holds a pointer there."""
    loaded = load_text(tmp_path, kube_proxy(**fields))
    assert value_of(loaded.settings, setting) == value
    assert loaded.origins[setting].startswith(f"{tmp_path / '1.yaml'}: ")


SYNC, MASQUERADE = ("syncPeriod", "45s"), ("masqueradeAll", True)


@pytest.mark.parametrize(
    ("mode", "section", "said", "counts"),
    [
        ("", "iptables", SYNC, True),
        ("iptables", "iptables", SYNC, True),
        ("ipvs", "iptables", SYNC, False),
        ("nftables", "iptables", SYNC, False),
        ("ipvs", "ipvs", SYNC, True),
        ("iptables", "ipvs", SYNC, False),
        ("nftables", "nftables", SYNC, True),
        ("", "nftables", SYNC, False),
        ("ipvs", "iptables", MASQUERADE, True),
        ("nftables", "iptables", MASQUERADE, False),
        ("nftables", "nftables", MASQUERADE, True),
        ("iptables", "nftables", MASQUERADE, False),
    ],
)
def test_section_of_the_mode_supplies_the_value(
    tmp_path: Path, mode: str, section: str, said: tuple[str, Any], counts: bool
) -> None:
    """K1: ipvs takes masquerading from the iptables section; empty mode is iptables."""
    settings = load_text(tmp_path, kube_proxy(mode=mode, **{section: dict([said])})).settings
    assert (settings.resync_period_s == 45 or settings.masquerade_all) is counts


@pytest.mark.parametrize("mode", ["iptables", "ipvs", "nftables"])
def test_mode_kube_proxy_was_asked_for_serves_or_the_next_one(tmp_path: Path, mode: str) -> None:
    """Its file knows no `fallback`: a node must not stop serving for want of its mode."""
    loaded = load_text(tmp_path, kube_proxy(mode=mode))
    settings = loaded.settings
    assert (settings.mode, settings.kube_proxy_mode) == (mode, mode)
    assert settings.fallback
    assert loaded.origins["fallback"] == f"{tmp_path / '1.yaml'}: mode"


def test_kube_proxy_without_a_mode_is_auto(tmp_path: Path) -> None:
    """Nobody asked for iptables there."""
    settings = load_text(tmp_path, kube_proxy(mode="")).settings
    assert (settings.mode, settings.fallback) == (Mode.AUTO, False)


def test_our_file_may_forbid_the_fallback(tmp_path: Path) -> None:
    """The mode stays the one kube-proxy was asked for."""
    text = kube_proxy(mode="iptables") + "---\n" + ours(fallback=False)
    settings = load_text(tmp_path, text).settings
    assert (settings.mode, settings.fallback) == (Mode.IPTABLES, False)


@pytest.mark.parametrize("mode", [Mode.EBPF, Mode.AUTO])
def test_our_file_decides_the_mode(tmp_path: Path, mode: Mode) -> None:
    """A mode of kube-proxy's gives way to what we were told, with all that follows from it."""
    text = kube_proxy(mode="nftables") + "---\n" + ours(mode=mode.value)
    flagged = load_text(tmp_path, ours(mode=mode.value), kube_flags={"--proxy-mode": "nftables"})
    for settings in (load_text(tmp_path, text).settings, flagged.settings):
        assert (settings.mode, settings.fallback) == (mode, False)
        assert settings.node_port_addresses == ()


@pytest.mark.parametrize("mode", ["userspace", "kernelspace", "ebpf", "auto"])
def test_mode_kube_proxy_does_not_have_is_refused(tmp_path: Path, mode: str) -> None:
    """Its file is checked as it checks it (K2)."""
    with pytest.raises(ConfigError, match=f'mode: got {mode!r}, expected one of "", iptables'):
        load_text(tmp_path, kube_proxy(mode=mode))


def test_nftables_mode_serves_node_ports_at_primary_addresses(tmp_path: Path) -> None:
    """X15: its default is primary; every other mode's is all."""
    asked = load_text(tmp_path, kube_proxy(mode="nftables")).settings
    told = load_text(tmp_path, kube_proxy(mode="nftables", nodePortAddresses=["all"])).settings
    other = load_text(tmp_path, kube_proxy(mode="ipvs")).settings
    selections = [each.node_port_addresses for each in (asked, told, other)]
    assert selections == [("primary",), ("all",), ()]


def test_ipv6_bind_address_moves_the_servers(tmp_path: Path) -> None:
    """healthz and metrics follow unless they are given; our own file has the last word."""
    settings = load_text(tmp_path, kube_proxy(bindAddress="::")).settings
    assert settings.healthz_bind_address == "[::]:10256"
    assert settings.metrics_bind_address == "[::1]:10249"
    text = kube_proxy(bindAddress="fd00::1", metricsBindAddress="::")
    settings = load_text(tmp_path, text, ours(healthzBindAddress="")).settings
    assert settings.healthz_bind_address == ""
    assert settings.metrics_bind_address == "[::]:10249"


WRONG = [
    ({"mode": "foo"}, "mode"),
    ({"bindAddress": "localhost"}, "bindAddress"),
    ({"healthzBindAddress": "0.0.0.0:0"}, "healthzBindAddress"),
    ({"healthzBindAddress": "host:80"}, "healthzBindAddress"),
    ({"metricsBindAddress": "1.2.3.4:65536"}, "metricsBindAddress"),
    ({"clientConnection": {"burst": -1}}, "clientConnection.burst"),
    ({"oomScoreAdj": 1001}, "oomScoreAdj"),
    ({"oomScoreAdj": -1001}, "oomScoreAdj"),
    ({"configSyncPeriod": "-1s"}, "configSyncPeriod"),
    ({"clusterCIDR": "10.244.0.0"}, "clusterCIDR"),
    ({"clusterCIDR": "10.244.0.0/16,10.245.0.0/16"}, "clusterCIDR"),
    ({"clusterCIDR": "10.244.0.0/16,fd00::/64,fd01::/64"}, "clusterCIDR"),
    ({"nodePortAddresses": ["10.0.0.0/8", "10.0.0.1"]}, "nodePortAddresses[1]"),
    ({"detectLocalMode": "Bridge"}, "detectLocalMode"),
    ({"detectLocalMode": "BridgeInterface"}, "detectLocal.bridgeInterface"),
    ({"detectLocalMode": "InterfaceNamePrefix"}, "detectLocal.interfaceNamePrefix"),
    ({"iptables": {"masqueradeBit": 32}}, "iptables.masqueradeBit"),
    ({"iptables": {"syncPeriod": "-1s"}}, "iptables.syncPeriod"),
    ({"iptables": {"minSyncPeriod": "31s"}}, "iptables.minSyncPeriod"),
    ({"mode": "nftables", "iptables": {"minSyncPeriod": "31s"}}, "iptables.minSyncPeriod"),
    ({"mode": "nftables", "nftables": {"masqueradeBit": -1}}, "nftables.masqueradeBit"),
    ({"mode": "nftables", "nftables": {"minSyncPeriod": "31s"}}, "nftables.minSyncPeriod"),
    ({"mode": "ipvs", "ipvs": {"minSyncPeriod": "-1s"}}, "ipvs.minSyncPeriod"),
    ({"mode": "ipvs", "ipvs": {"tcpTimeout": "-1s"}}, "ipvs.tcpTimeout"),
    ({"mode": "ipvs", "ipvs": {"excludeCIDRs": ["10.0.0.0"]}}, "ipvs.excludeCIDRs[0]"),
    ({"conntrack": {"maxPerCore": -1}}, "conntrack.maxPerCore"),
    ({"conntrack": {"tcpEstablishedTimeout": "-5s"}}, "conntrack.tcpEstablishedTimeout"),
    ({"conntrack": {"udpStreamTimeout": "-5s"}}, "conntrack.udpStreamTimeout"),
    ({"logging": {"format": "xml"}}, "logging.format"),
    ({"showHiddenMetricsForVersion": "v1"}, "showHiddenMetricsForVersion"),
    ({"featureGates": {"AllowServiceExternalIP": False}}, "featureGates.AllowServiceExternalIP"),
    # Types: nothing is converted, as in Go.
    ({"oomScoreAdj": "5"}, "oomScoreAdj"),
    ({"bindAddressHardFail": "true"}, "bindAddressHardFail"),
    ({"iptables": {"syncPeriod": 30}}, "iptables.syncPeriod"),
    ({"iptables": {"syncPeriod": "30"}}, "iptables.syncPeriod"),
    ({"iptables": "fast"}, "iptables"),
    ({"nodePortAddresses": "primary"}, "nodePortAddresses"),
    ({"clusterCIDR": ["10.0.0.0/8"]}, "clusterCIDR"),
    ({"featureGates": {"A": "true"}}, "featureGates.A"),
    ({"conntrack": {"min": 2**31}}, "conntrack.min"),
    ({"clientConnection": {"qps": False}}, "clientConnection.qps"),
]


@pytest.mark.parametrize(("fields", "path"), WRONG)
def test_what_kube_proxy_refuses_is_refused(
    tmp_path: Path, fields: dict[str, Any], path: str
) -> None:
    """K2 and types; the message says file, field, what stands there and what should."""
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, kube_proxy(**fields))
    assert caught.value.path == f"{tmp_path / '1.yaml'}: {path}"
    assert caught.value.expected


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "iptables", "ipvs": {"minSyncPeriod": "31s", "excludeCIDRs": ["nonsense"]}},
        {"nftables": {"masqueradeBit": 99}},
        {"clusterCIDR": "fd00::/64,10.244.0.0/16"},
        {"nodePortAddresses": ["primary", "10.0.0.0/8", "localhost"]},
        {"featureGates": {"GracefulNodeShutdown": True}},
        {"clientConnection": {"qps": -1}},
        {"logging": {"flushFrequency": 5000000000}},
        {"portRange": "1-2"},
    ],
)
def test_what_kube_proxy_takes_is_taken(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Sections of modes not in use are not checked, but for iptables (K2)."""
    load_text(tmp_path, kube_proxy(**fields))


def test_every_wrong_field_is_told(tmp_path: Path) -> None:
    """One run, all findings."""
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, kube_proxy(bindAddress="x", oomScoreAdj=2000, mode="y"))
    text = " ".join([str(caught.value), *caught.value.__notes__])
    assert all(name in text for name in ("bindAddress", "oomScoreAdj", "mode"))


def test_unknown_field_is_ignored_with_a_warning(tmp_path: Path) -> None:
    """Z9: strict decoding fails, lenient decoding goes on; the right spelling is suggested."""
    loaded = load_text(
        tmp_path,
        kube_proxy(clusterCidr="10.0.0.0/8", iptables={"syncperiod": "5s"}, udpIdleTimeout="1s"),
    )
    assert loaded.settings == Settings()
    first, second, third = sorted(loaded.warnings)
    assert "clusterCidr" in first and "clusterCIDR?" in first
    assert "iptables.syncperiod" in second and "syncPeriod?" in second
    assert "udpIdleTimeout" in third


def test_field_given_twice_is_a_warning(tmp_path: Path) -> None:
    """Z9: a duplicate fails strict decoding too; the last one counts, as in Go."""
    loaded = load_text(tmp_path, kube_proxy(mode="ipvs") + "mode: nftables\n")
    assert loaded.settings.kube_proxy_mode == "nftables"
    assert "mode (line 4): given twice" in loaded.warnings[0]


def test_ignored_field_that_says_something_is_a_warning(tmp_path: Path) -> None:
    """Its default says nothing, so that a file of defaults is silent."""
    loud = load_text(tmp_path, kube_proxy(mode="ipvs", configSyncPeriod="9m"))
    quiet = load_text(tmp_path, kube_proxy(logging={"flushFrequency": "5s"}))
    (warning,) = loud.warnings
    assert "configSyncPeriod: ignored: " in warning
    assert quiet.warnings == ()


def test_section_of_ipvs_becomes_settings_of_ipvs(tmp_path: Path) -> None:
    """V2, V3, V5, V12: each of its fields has a setting; nothing said is round robin."""
    section = {
        "scheduler": "lc",
        "excludeCIDRs": ["10.9.0.0/24"],
        "strictARP": True,
        "tcpTimeout": "15m",
        "tcpFinTimeout": "2m",
        "udpTimeout": "5m",
    }
    loaded = load_text(tmp_path, kube_proxy(mode="ipvs", ipvs=section))
    assert loaded.warnings == ()
    assert loaded.settings.ipvs == IpvsSettings(
        scheduler="lc",
        exclude_cidrs=("10.9.0.0/24",),
        strict_arp=True,
        tcp_timeout_s=900,
        tcp_fin_timeout_s=120,
        udp_timeout_s=300,
    )
    empty = load_text(tmp_path, kube_proxy(ipvs={"scheduler": "", "excludeCIDRs": None}))
    assert empty.settings.ipvs == IpvsSettings()


def test_other_version_is_refused(tmp_path: Path) -> None:
    """Only v1alpha1 exists."""
    text = kube_proxy().replace(KUBE_PROXY_API_VERSION, "kubeproxy.config.k8s.io/v1")
    with pytest.raises(ConfigError, match=r"got 'kubeproxy.config.k8s.io/v1 KubeProxyConf"):
        load_text(tmp_path, text)


def test_config_map_stands_for_what_it_holds(tmp_path: Path) -> None:
    """`kubectl get configmap kube-proxy -o yaml` can be looked at as it is; its kubeconfig is left
    out.
    """
    indented = KUBEADM.replace("\n", "\n    ")
    text = (
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kube-proxy}\ndata:\n"
        f"  config.conf: |{indented}\n"
        "  kubeconfig.conf: |\n    apiVersion: v1\n    kind: Config\n"
    )
    loaded = load_text(tmp_path, text)
    assert loaded.settings == load_text(tmp_path, KUBEADM).settings
    assert "1.yaml: data.config.conf: clusterCIDR" in loaded.origins["cluster_cidrs"]


def test_every_field_is_accounted_for() -> None:
    """The table names each field of the type once, and settings that exist."""

    def paths(model: Any, prefix: str = "") -> list[str]:
        found = []
        for field in model.model_fields.values():
            kind = field.annotation
            nested = hasattr(kind, "model_fields")
            found += (
                paths(kind, f"{prefix}{field.alias}.") if nested else [f"{prefix}{field.alias}"]
            )
        return found

    assert sorted(field.path for field in FIELDS) == sorted(paths(KubeProxyConfiguration))
    for field in FIELDS:
        assert bool(field.setting) is (field.treatment is not Treatment.IGNORED)
        assert bool(field.why) is (field.treatment is not Treatment.HONOURED)
        if field.setting:
            assert spelt(field.setting)
            value_of(Settings(), field.setting)


@pytest.mark.parametrize("mode", ["", "ipvs", "nftables"])
def test_view_of_kube_proxy_reads_back(tmp_path: Path, mode: str) -> None:
    """HS7: /configz shows settings in force; as a file they give the same again."""
    text = kube_proxy(
        mode=mode,
        clusterCIDR="10.244.0.0/16,fd00::/56",
        hostnameOverride="node1",
        nodePortAddresses=["10.0.0.0/8"],
        logging={"verbosity": 6, "format": "json"},
        featureGates={"AllowServiceExternalIPs": False},
        conntrack={"maxPerCore": 0, "udpTimeout": "30s"},
        iptables={"masqueradeAll": True},
        nftables={"masqueradeAll": True},
    )
    settings = load_text(tmp_path, text).settings
    view = as_kube_proxy(settings)
    assert view["clusterCIDR"] == "10.244.0.0/16,fd00::/56"
    assert view["conntrack"]["udpTimeout"] == "30s"
    del view["apiVersion"], view["kind"]
    again = load_text(tmp_path, kube_proxy(**view)).settings
    assert again == settings
