"""The data path benchmark runs end to end, small enough for a test."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from ebpf_svc.bench import path
from ebpf_svc.bench.measures import MEASURES
from ebpf_svc.bench.population import Population
from ebpf_svc.bench.serving import KubeProxy, KubeProxyError, is_settled, reason_against
from ebpf_svc.testbed.cluster import Cluster


@pytest.mark.root
def test_benchmark_measures_every_variant_in_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each variant has a sample of each round."""
    target = tmp_path / "path.json"
    words = ["--short", "--services", "3", "--rounds", "2", "--ms", "20", "--json", str(target)]
    assert path.main([*words, "--variants", "direct", "ebpf", "ebpf-tc"]) == 0
    document = json.loads(target.read_text())
    by_key = {each["key"]: each for each in document["figures"] if each["backends"] != 1_000}
    assert set(by_key["connect"]["samples"]) == {"direct", "ebpf", "ebpf-tc"}
    assert set(by_key["nodeport-far"]["samples"]) == {"direct", "ebpf"}
    assert all(len(each) == 2 for each in by_key["bulk-mtu"]["samples"].values())
    assert 0 < document["environment"]["generator_share"] < 1
    assert "eBPF, tc only" in capsys.readouterr().out


@pytest.mark.root
def test_benchmark_measures_ipv6(tmp_path: Path) -> None:
    """Every kind of traffic gets its answers there, through the Service and directly."""
    target = tmp_path / "path.json"
    words = ["--short", "--services", "3", "--rounds", "1", "--ms", "20", "--json", str(target)]
    assert path.main([*words, "--family", "6", "--variants", "direct", "ebpf"]) == 0
    document = json.loads(target.read_text())
    assert document["parameters"]["family"] == 6
    assert {each["key"] for each in document["figures"]} == {each.key for each in MEASURES}
    assert all(set(each["samples"]) == {"direct", "ebpf"} for each in document["figures"])


STAND_IN = """#!{python}
# Our own agent under kube-proxy's flags: it has the metrics the benchmark waits for.
import json, os, sys
if sys.argv[1:] == ["--version"]:
    sys.exit(print("Kubernetes v1.36.0"))
told = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
settings = {{
    "node_name": told["hostname-override"], "cluster_cidrs": told["cluster-cidr"].split(","),
    "kubernetes": {{"master": told["master"]}},
    "run_dir": "{folder}/run", "state_dir": "{folder}/state",
}}
with open("{folder}/settings.json", "w") as file:
    json.dump(settings, file)
os.execv("{python}", ["{python}", "-m", "ebpf_svc.cli", "run", "--mode", told["proxy-mode"],
                      "--config", "{folder}/settings.json"])
"""


@pytest.mark.root
def test_real_kube_proxy_is_a_variant_when_it_is_given(tmp_path: Path) -> None:
    """It is fed by an API server of its node; without a binary the variant says so."""
    binary, target = tmp_path / "kube-proxy", tmp_path / "path.json"
    binary.write_text(STAND_IN.format(python=sys.executable, folder=tmp_path))
    binary.chmod(0o755)
    words = ["--short", "--services", "3", "10", "--rounds", "1", "--ms", "20"]
    words += ["--json", str(target), "--measures", "connect", "nodeport-far"]
    words += ["--variants", "direct", "kube-proxy-nftables"]
    assert path.main([*words, "--kube-proxy", str(binary)]) == 0
    document = json.loads(target.read_text())
    assert {"connect", "nodeport-far"} == {each["key"] for each in document["figures"]}
    assert all(len(each["samples"]) == 2 for each in document["figures"])
    assert path.main([*words, "--variants", "direct", "kube-proxy-ipvs"]) == 0
    (_, skipped) = json.loads(target.read_text())["variants"]
    assert skipped["skipped"]


def test_kube_proxys_release_decides_what_it_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old one has no nftables mode, and something else is no kube-proxy."""
    old, other = tmp_path / "old", tmp_path / "other"
    old.write_text("#!/bin/sh\necho Kubernetes v1.20.2\n")
    other.write_text("#!/bin/sh\necho 3.14\n")
    for binary in (old, other):
        binary.chmod(0o755)
    assert reason_against(old, "iptables") == ""
    assert reason_against(old, "nftables") == "kube-proxy 1.20 has no nftables mode"
    assert "its version is '3.14'" in reason_against(other, "iptables")
    assert "--kube-proxy PATH" in reason_against(None, "iptables")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "apt-get install ipset" in reason_against(old, "ipvs")


FALLEN_BACK = """#!{python} -I
import http.server, sys, time
if "--version" in sys.argv:
    sys.exit(print("Kubernetes v1.20.2"))
PAGES = {{
    "/metrics": f'''
kubeproxy_sync_proxy_rules_endpoint_changes_pending 0
kubeproxy_sync_proxy_rules_last_timestamp_seconds {{time.time() + 60}}
''',
    "/proxyMode": "iptables",
}}
class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PAGES[self.path].encode())
http.server.HTTPServer(("127.0.0.1", 10249), Pages).serve_forever()
"""
"""A kube-proxy that takes another mode than it was asked for, as old ones do."""


@pytest.mark.root
def test_kube_proxy_in_another_mode_is_not_measured(tmp_path: Path) -> None:
    """Its figures would stand under the wrong name."""
    binary = tmp_path / "kube-proxy"
    binary.write_text(FALLEN_BACK.format(python=sys.executable))
    binary.chmod(0o755)
    with Cluster.create(node_count=1) as cluster:
        proxy = KubeProxy(cluster.nodes[0], binary, "ipvs", [])
        try:
            with pytest.raises(KubeProxyError, match="asked for mode ipvs and serves in mode ipta"):
                proxy.grow(Population(services=1, endpoints=1), 1)
        finally:
            proxy.close()


def test_kube_proxy_has_settled_when_nothing_is_pending() -> None:
    """Of both families, and later than what it was given."""
    name = "kubeproxy_sync_proxy_rules"
    idle = f"""{name}_endpoint_changes_pending 0
{name}_service_changes_pending 0
{name}_last_timestamp_seconds{{ip_family="IPv4"}} 1.7e+09
{name}_last_timestamp_seconds{{ip_family="IPv6"}} 1.6e+09
"""
    assert is_settled(idle, 1.69e9)
    assert not is_settled(idle, 1.71e9)
    assert not is_settled(idle.replace("service_changes_pending 0", "service_changes_pending 3"), 0)
    assert not is_settled("", 0)
