"""Kube-proxy's figures stand beside ours."""

from __future__ import annotations

import pytest

from ebpf_svc.bench import kubeproxy


@pytest.mark.parametrize(
    ("mode", "beside"),
    [
        ("nftables", "nftables 4"),
        ("iptables", "iptables-legacy 3.4, iptables-nft 299"),
        ("ipvs", "iptables-legacy 3.4, iptables-nft 299, nftables 4"),
    ],
)
def test_a_mode_stands_beside_its_own_else_beside_all(mode: str, beside: str) -> None:
    """With both variants of the tool; what it has not stands beside everything."""
    assert kubeproxy.beside(mode, 5_000, kubeproxy.ENDPOINTS, "cold_s") == beside


def test_other_sizes_have_nothing_beside_them() -> None:
    """No figure is made up."""
    assert kubeproxy.beside("nftables", 5_000, 1, "cold_s") == ""
    assert kubeproxy.beside("iptables", 100_000, kubeproxy.ENDPOINTS, "cold_s") == ""
