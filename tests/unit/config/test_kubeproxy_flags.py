"""Kube-proxy's flags: all taken, mapped to its file's fields, beside a file mostly ignored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ebpf_svc.cli.settings import AS_GO, PLACE, SERVING, load_options, settings_options
from ebpf_svc.config import DetectLocalMode, LogLevel, Mode, Settings
from ebpf_svc.config.given import value_of
from ebpf_svc.config.kubeproxy.fields import LISTS, SWITCHES, kube_flags
from ebpf_svc.config.kubeproxy.read import fields_of, section_of
from ebpf_svc.config.kubeproxy.types import KubeProxyConfiguration
from ebpf_svc.config.load import Loaded
from ebpf_svc.errors import ConfigError
from ebpf_svc.log import LogFormat
from tests.unit.config.kube import kube_proxy, ours

FLAGS = frozenset(
    re.findall(
        r"--\S+",
        """
        --feature-gates --kubeconfig --master --kube-api-content-type --kube-api-burst
        --kube-api-qps --hostname-override --bind-address --healthz-bind-address
        --metrics-bind-address --bind-address-hard-fail --profiling
        --show-hidden-metrics-for-version --proxy-mode --iptables-masquerade-bit --masquerade-all
        --iptables-localhost-nodeports --iptables-sync-period --iptables-min-sync-period
        --ipvs-sync-period --ipvs-min-sync-period --ipvs-scheduler --ipvs-exclude-cidrs
        --ipvs-strict-arp --ipvs-tcp-timeout --ipvs-tcpfin-timeout --ipvs-udp-timeout
        --detect-local-mode --pod-bridge-interface --pod-interface-name-prefix --cluster-cidr
        --nodeport-addresses --oom-score-adj --conntrack-max-per-core --conntrack-min
        --conntrack-tcp-timeout-established --conntrack-tcp-timeout-close-wait
        --conntrack-tcp-be-liberal --conntrack-udp-timeout --conntrack-udp-timeout-stream
        --config-sync-period --healthz-port --metrics-port --v --vmodule --logging-format
        --log-flush-frequency
        """,
    )
)
"""Kube-proxy 1.36's (K4) that set something, with the logging flags it shares."""


def run(*words: str) -> Loaded:
    """What `ebpf-svc run` would be told with these words."""
    seen: list[Loaded] = []

    @click.command(context_settings=AS_GO)
    @settings_options(*SERVING, *PLACE, kube_proxy=True)
    def command(**options: Any) -> None:
        seen.append(load_options(options))

    result = CliRunner().invoke(command, words)
    if result.exception is not None:
        raise result.exception
    return seen[0]


def test_every_flag_of_kube_proxy_is_known() -> None:
    """A command line that started kube-proxy starts this."""
    assert {flag.name for flag in kube_flags()} >= FLAGS


def test_flags_have_the_types_of_their_fields() -> None:
    """What may stand alone is a boolean, what may be repeated a list."""
    for flag in kube_flags():
        for path in flag.paths:
            section: Any = KubeProxyConfiguration
            for name in path.split("."):
                field = fields_of(section)[name]
                section = section_of(field)
            kind = str(field.annotation)
            assert ("bool" in kind and "dict" not in kind) is (flag.name in SWITCHES), flag.name
            assert ("list" in kind or "dict" in kind) is (flag.name in LISTS), flag.name


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("--hostname-override=Node-1", {"node_name": "node-1"}),
        ("--hostname_override Node-1", {"node_name": "node-1"}),
        ("--bind-address=192.0.2.1", {"bind_address": "192.0.2.1"}),
        ("--healthz-bind-address=127.0.0.1", {"healthz_bind_address": "127.0.0.1:10256"}),
        ("--bind-address-hard-fail", {"bind_address_hard_fail": True}),
        ("--bind-address-hard-fail=false", {}),
        ("--profiling=1", {"enable_profiling": True}),
        ("--masquerade-all", {"masquerade_all": True}),
        ("--masquerade-all=T", {"masquerade_all": True}),
        ("--iptables-localhost-nodeports=false", {"localhost_node_ports": False}),
        ("--iptables-masquerade-bit=15", {"masquerade_bit": 15}),
        ("--cluster-cidr=10.0.0.0/8,fd00::/8", {"cluster_cidrs": ("10.0.0.0/8", "fd00::/8")}),
        ("--nodeport-addresses=primary", {"node_port_addresses": ("primary",)}),
        (
            "--nodeport-addresses=10.0.0.0/8,fd00::/8 --nodeport-addresses=192.0.2.0/24",
            {"node_port_addresses": ("10.0.0.0/8", "fd00::/8", "192.0.2.0/24")},
        ),
        ("--oom-score-adj=-5", {"oom_score_adj": -5}),
        ("--conntrack-max-per-core=0", {"conntrack.max_per_core": 0}),
        (
            "--conntrack-tcp-timeout-close-wait=10m",
            {"conntrack.tcp_close_wait_timeout_s": 600},
        ),
        ("--conntrack-tcp-be-liberal", {"conntrack.tcp_be_liberal": True}),
        ("--kubeconfig=/etc/k", {"kubernetes.kubeconfig": Path("/etc/k")}),
        ("--master=https://m", {"kubernetes.master": "https://m"}),
        ("--kube-api-qps=2.5 --kube-api-burst=3", {"kubernetes.qps": 2.5, "kubernetes.burst": 3}),
        ("-v=5", {"log.level": LogLevel.DEBUG}),
        ("-v 5", {"log.level": LogLevel.DEBUG}),
        ("--v=2", {"log.level": LogLevel.INFO}),
        ("--logging-format=json", {"log.format": LogFormat.JSON}),
        ("--feature-gates=AllowServiceExternalIPs=false", {"allow_external_ips": False}),
        (
            "--detect-local-mode=InterfaceNamePrefix --pod-interface-name-prefix=pod",
            {
                "detect_local.mode": DetectLocalMode.INTERFACE_NAME_PREFIX,
                "detect_local.interface_name_prefix": "pod",
            },
        ),
        ("--iptables-sync-period=1m", {"resync_period_s": 60}),
        ("--proxy-mode=nftables --nodeport-addresses=all", {"kube_proxy_mode": "nftables"}),
    ],
)
def test_flag_sets_its_setting(words: str, changed: Mapping[str, Any]) -> None:
    """K4, in Go's spellings: = or a space, - or _, switches with and without a value."""
    settings = run(*words.split()).settings
    assert {path: value_of(settings, path) for path in changed} == changed


@pytest.mark.parametrize(
    ("words", "resync_s", "pause_s"),
    [
        ("--iptables-sync-period=1m --iptables-min-sync-period=0", 60, 0),
        ("--proxy-mode=nftables --iptables-sync-period=1m --iptables-min-sync-period=2s", 60, 2),
        ("--proxy-mode=ipvs --iptables-sync-period=1m --iptables-min-sync-period=2s", 30, 0.002),
        ("--proxy-mode=ipvs --ipvs-sync-period=1m --ipvs-min-sync-period=2s", 60, 2),
        ("--ipvs-sync-period=1m", 30, 0.002),
    ],
)
def test_periods_follow_the_mode(words: str, resync_s: float, pause_s: float) -> None:
    """K5: the iptables flags count in every mode but ipvs; a flag can say 0, a file cannot (K1)."""
    settings = run(*words.split()).settings
    assert (settings.resync_period_s, settings.min_sync_period_s) == (resync_s, pause_s)


def test_flags_alone_in_ipvs_mode_keep_the_pause_of_iptables() -> None:
    """K5: seen where kube-proxy's own configuration is shown."""
    config = run("--proxy-mode=ipvs").kube_proxy
    assert config is not None
    assert config.ipvs.min_sync_period == 1


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--oom-score-adj=2000", "--oom-score-adj"),
        ("--oom-score-adj=much", "--oom-score-adj"),
        ("--bind-address=host", "--bind-address"),
        ("--proxy-mode=userspace", "--proxy-mode"),
        ("--iptables-sync-period=0", "--iptables-sync-period"),
        ("--iptables-sync-period=5", "--iptables-sync-period"),
        ("--conntrack-min=-1", "--conntrack-min"),
        ("--profiling=yes", "--profiling"),
        ("--feature-gates=AllowServiceExternalIPs=maybe", "--feature-gates"),
        ("--nodeport-addresses=10.0.0.1", "--nodeport-addresses"),
        ("--detect-local-mode=Bridge", "--detect-local-mode"),
        ("--healthz-port=70000", "--healthz-port"),
        ("--metrics-port=0", "--metrics-port"),
        ("--cluster-cidr=10.0.0.0", "--cluster-cidr"),
    ],
)
def test_wrong_flag_is_named(words: str, flag: str) -> None:
    """K2, in the words the user typed."""
    with pytest.raises(ConfigError) as caught:
        run(*words.split())
    assert caught.value.path.startswith(flag)


def test_blank_hostname_override_is_refused() -> None:
    """W7: an unset variable in a manifest must not name the node after nothing."""
    with pytest.raises(ConfigError, match="--hostname-override"):
        run("--hostname-override= ")


def test_deprecated_ports_join_addresses_without_one() -> None:
    """K4: 0 switches the health server off; beside an address with a port they do nothing."""
    joined = run("--healthz-bind-address=127.0.0.1", "--healthz-port=1").settings
    off = run("--healthz-port=0").settings
    vain = run("--healthz-port=1")
    assert joined.healthz_bind_address == "127.0.0.1:1"
    assert off.healthz_bind_address == ""
    assert vain.settings.healthz_bind_address == "0.0.0.0:10256"
    assert "--healthz-port: no effect" in vain.warnings[0]


def test_flags_beside_kube_proxys_file_are_ignored_but_for_a_few(tmp_path: Path) -> None:
    """K3: logging flags, --hostname-override and --master count; the others are named."""
    path = tmp_path / "config.conf"
    path.write_text(kube_proxy(mode="ipvs", hostnameOverride="a", logging={"format": "json"}))
    loaded = run(
        f"--config={path}",
        *("--proxy-mode=iptables", "--masquerade-all", "--cluster-cidr=10.0.0.0/8"),
        *("--hostname-override=b", "--master=https://m", "-v=6", "--oom-score-adj=1"),
    )
    assert loaded.settings == Settings(
        mode="ipvs",
        fallback=True,
        kube_proxy_mode="ipvs",
        node_name="b",
        log={"level": "debug", "format": "json"},
        kubernetes={"master": "https://m"},
    )
    ignored = {warning.partition(":")[0] for warning in loaded.warnings}
    assert ignored == {"--proxy-mode", "--masquerade-all", "--cluster-cidr", "--oom-score-adj"}


def test_our_own_flags_count_beside_kube_proxys_file(tmp_path: Path) -> None:
    """Kube-proxy has none of these, so its rule says nothing about them."""
    path = tmp_path / "config.conf"
    path.write_text(kube_proxy(nodePortAddresses=["primary"]))
    loaded = run(f"--config={path}", "--node-port-address=all", "--mode=ebpf", "--node-name=c")
    assert loaded.settings.node_port_addresses == ("all",)
    assert (loaded.settings.mode, loaded.settings.node_name) == (Mode.EBPF, "c")
    assert loaded.warnings == ()


def test_kube_proxys_flags_override_our_file(tmp_path: Path) -> None:
    """What is typed beats what is written; what merely follows from it does not."""
    path = tmp_path / "ours.yaml"
    path.write_text(ours(oomScoreAdj=1, healthzBindAddress="127.0.0.1:1"))
    settings = run(f"--config={path}", "--oom-score-adj=2", "--bind-address=::").settings
    assert settings.oom_score_adj == 2
    assert settings.healthz_bind_address == "127.0.0.1:1"
    assert settings.metrics_bind_address == "[::1]:10249"


def test_short_help_leaves_kube_proxys_flags_out() -> None:
    """A newcomer meets ours alone; `--help-kube-proxy` lists the others."""
    from ebpf_svc.cli.run import command

    short = CliRunner().invoke(command, ["--help"]).output
    full = CliRunner().invoke(command, ["--help-kube-proxy"]).output
    assert "--ipvs-scheduler" not in short
    assert "--help-kube-proxy" in short
    assert all(flag in full for flag in FLAGS)
