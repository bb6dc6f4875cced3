"""Our own files, and who wins when several say something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.config import LogLevel, Settings, SocketLB
from ebpf_svc.config.given import Given
from ebpf_svc.config.load import DEFAULT, load
from ebpf_svc.errors import ConfigError
from tests.unit.config.kube import kube_proxy, load_text, ours


def test_file_of_our_kind_is_spelt_as_kubernetes_spells(tmp_path: Path) -> None:
    """Camel case, durations with units, `on` and `off` as YAML reads them."""
    settings = load_text(
        tmp_path,
        "apiVersion: ebpf-svc.io/v1alpha1\nkind: EbpfSvcConfiguration\n"
        "clusterCIDRs: [10.244.1.2/16]\nresyncPeriod: 1m\nminSyncPeriod: 50ms\n"
        "log: {level: debug}\n"
        "ebpf: {socketLB: off, cgroupRoot: /sys/fs/cgroup/pods, maglev: no}\n",
    ).settings
    assert settings.cluster_cidrs == ("10.244.0.0/16",)
    assert (settings.resync_period_s, settings.min_sync_period_s) == (60, 0.05)
    assert settings.log.level is LogLevel.DEBUG
    assert settings.ebpf.socket_lb is SocketLB.OFF
    assert settings.ebpf.cgroup_root == Path("/sys/fs/cgroup/pods")
    assert not settings.ebpf.maglev


@pytest.mark.parametrize(
    ("text", "meant"),
    {"on": SocketLB.FULL, "full": SocketLB.FULL, "hostOnly": SocketLB.HOST_ONLY}.items(),
)
def test_socket_lb_is_a_switch_too(tmp_path: Path, text: str, meant: SocketLB) -> None:
    """`on` is a boolean to YAML and a word to a flag."""
    filed = load_text(tmp_path, f"ebpf: {{socket_lb: {text}}}").settings
    flagged = load(flags={"ebpf.socket_lb": Given(text, "--socket-lb")}).settings
    assert filed.ebpf.socket_lb is flagged.ebpf.socket_lb is meant


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (True, True),
        (False, False),
        ([], ()),
        (["203.0.113.7/24", "2001:DB8::/32"], ("203.0.113.0/24", "2001:db8::/32")),
    ],
)
def test_external_ips_are_allowed_wholly_or_by_prefix(
    tmp_path: Path, given: Any, meant: bool | tuple[str, ...]
) -> None:
    """A switch as kube-proxy's gate (F8), or a list."""
    assert load_text(tmp_path, ours(allowExternalIPs=given)).settings.allow_external_ips == meant


@pytest.mark.parametrize("given", ["203.0.113.0/24", ["203.0.113.7"], [7], 2, {"a": 1}, "some"])
def test_external_ips_cannot_be_allowed_by_anything_else(tmp_path: Path, given: Any) -> None:
    """One prefix is no list, an address is no prefix."""
    with pytest.raises(ConfigError, match=r"allowExternalIPs: got .* or prefixes such as \[203"):
        load_text(tmp_path, ours(allowExternalIPs=given))


def test_our_document_wins_over_kube_proxys_in_any_order(tmp_path: Path) -> None:
    """One file may hold both, or each its own."""
    theirs = kube_proxy(oomScoreAdj=1, iptables={"masqueradeAll": True})
    mine = ours(oomScoreAdj=2)
    one = load_text(tmp_path, f"{theirs}---\n{mine}")
    other = load_text(tmp_path, mine, theirs)
    assert one.settings == other.settings == Settings(oom_score_adj=2, masquerade_all=True)
    assert one.origins["masquerade_all"] == f"{tmp_path / '1.yaml'}: iptables.masqueradeAll"
    assert one.origins["resync_period_s"] == DEFAULT


def test_flag_of_ours_wins_over_everything(tmp_path: Path) -> None:
    """And says so."""
    text = f"{kube_proxy(hostnameOverride='a')}---\n{ours(nodeName='b')}"
    loaded = load_text(
        tmp_path,
        text,
        flags={"node_name": Given("d", "--node-name")},
        kube_flags={"--hostname-override": "c"},
    )
    assert loaded.settings.node_name == "d"
    assert loaded.origins["node_name"] == "--node-name"


def test_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    """A field left empty in YAML keeps its default."""
    assert load_text(tmp_path, ours(clusterCIDRs=None, ebpf=None)).settings == Settings()


def test_address_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    """YAML 1.1 reads 1:20 in base 60 and 2024-01-01 as a date; Kubernetes does neither."""
    text = "apiVersion: ebpf-svc.io/v1alpha1\nkind: EbpfSvcConfiguration\nbindAddress: 2001::1:2\n"
    assert load_text(tmp_path, text + "nodeName: 2024-01-01\n").settings.node_name == "2024-01-01"
    assert load_text(tmp_path, text).settings.bind_address == "2001::1:2"
    with pytest.raises(ConfigError, match=r"bindAddress: got '1:20:30', expected an IP address"):
        load_text(tmp_path, "bindAddress: 1:20:30\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ours(clusterCidrs=[]), "clusterCidrs: got 'unknown field clusterCidrs', expected cluster"),
        (ours(ebpf={"nope": 1}), "ebpf.nope: got 'unknown field nope', expected one of affinityEn"),
        (ours(clusterCIDRs=["10.0.0.0/99"]), "clusterCIDRs: got .*expected a prefix such as"),
        (ours(nodePortAddresses=["main"]), "nodePortAddresses.*one of primary, localhost, all"),
        (ours(resyncPeriod="soon"), "resyncPeriod: got 'soon', expected seconds, or a duration"),
        (ours(minSyncPeriod="1h"), "minSyncPeriod: got '1h', expected at most the resync period"),
        (ours(families=[4, 4]), "families: .*each once"),
        (ours(families=[]), "families: .*each once"),
        (ours(nodePortRange=[2, 1]), "nodePortRange: .*the lower first"),
        (ours(mode="fastest"), "mode: got 'fastest', expected 'auto'"),
        (ours(detectLocal={"mode": "BridgeInterface"}), "detectLocal.mode: .*a bridgeInterface"),
        (ours(healthzBindAddress="localhost:80"), "healthzBindAddress: .*an IP and port"),
        (ours(masqueradeBit=32), "masqueradeBit: got 32, expected less than or equal to 31"),
        (ours() + "mode: auto\nmode: ebpf\n", "got 'mode .line 4.', expected every field once"),
        (ours(oomScoreAdj=1, oom_score_adj=2), "oom_score_adj: got 'a second spelling'"),
        (ours(log="debug"), "log: got 'debug', expected a section of fields"),
        (f"{ours()}---\n{ours()}", "got 'a second EbpfSvcConfiguration', expected one"),
        ("kind: Pod\napiVersion: v1\n", "got 'v1 Pod', expected ebpf-svc.io/v1alpha1 EbpfSvc"),
        ("kind: EbpfSvcConfiguration\n", "got 'None EbpfSvcConfiguration'"),
        ("- a\n", "got 'list', expected a mapping of settings"),
        ("a: [", "expected YAML"),
    ],
)
def test_wrong_file_is_told_with_place_and_cure(tmp_path: Path, text: str, message: str) -> None:
    """File, field as the user spelt it, what stands there, what should."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_text(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "1.yaml"))


def test_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """A folder, a missing file."""
    with pytest.raises(ConfigError, match="Is a directory"):
        load([tmp_path])
