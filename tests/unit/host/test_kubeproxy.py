"""How a kube-proxy is told from our agent, where no process can be seen."""

from __future__ import annotations

import pytest

from ebpf_svc.host import kubeproxy


@pytest.mark.parametrize(
    ("mode", "metrics", "found"),
    [
        ("iptables", "kubeproxy_sync_proxy_rules_iptables_total 7\n", ["port 10256"]),
        ("iptables", "ebpf_svc_build_info 1.0\n", []),
        ("ebpf", "ebpf_svc_build_info 1.0\n", []),
    ],
)
def test_our_agent_in_a_container_of_its_own_is_no_kube_proxy(
    monkeypatch: pytest.MonkeyPatch, mode: str, metrics: str, found: list[str]
) -> None:
    """Its netfilter modes have kube-proxy's names (HS7), but it has metrics of its own."""
    answers = {
        "/healthz": '{"lastUpdated": "", "currentTime": ""}',
        "/proxyMode": mode,
        "/metrics": metrics,
    }
    monkeypatch.setattr(kubeproxy, "_processes", lambda: iter(()))
    monkeypatch.setattr(kubeproxy, "_listeners", lambda _: set())
    monkeypatch.setattr(kubeproxy, "_get", lambda _, path: answers[path])
    assert [sign.what for sign in kubeproxy.running()] == found
