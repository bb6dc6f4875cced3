"""What speaks against a switch, and what is read from the kernel before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_svc.host import ipvs, kubeproxy
from ebpf_svc.host.ipvs import VirtualServer
from ebpf_svc.host.kubeproxy import IPSETS, Sign
from ebpf_svc.migrate.agent import AgentView
from ebpf_svc.migrate.inventory import Inventory, look
from ebpf_svc.migrate.takeover import obstacles, uncovered
from ebpf_svc.model.net import Protocol

PROC_IP_VS = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr
  -> C0A8640B:192B      Masq    1      3          9
  -> C0A8640C:192B      Masq    1      1          0
UDP  0A60000A:0035 rr
FWM  00000064 wlc
  -> 0A000001:0050      Route   1      5          0
TCP  [fd00:0010:0096:0000:0000:0000:0000:0001]:01BB rr persistent 10800
  -> [fd00:0010:0244:0000:0000:0000:0000:0002]:192B      Masq    1      2          0
"""
VIP = ("10.96.0.1", 443, "TCP")
AGENT = AgentView(4711, frozenset({VIP, ("", 30080, "TCP")}), ())
NFT_MAP = """\
table ip kube-proxy {
    map service-ips {
        type ipv4_addr . inet_proto . inet_service : verdict
        comment "ClusterIP, ExternalIP and LoadBalancer IP traffic"
        elements = { 10.96.0.1 . tcp . 443 : goto service-2QRHZV4L-default/kubernetes/tcp/https,
            10.96.0.10 . udp . 53 comment "x" : goto service-X }
    }
}
"""


def test_virtual_servers_are_read_with_their_connections() -> None:
    """Both families, ports in hex, connections summed; marks of a firewall are not ours to see."""
    assert ipvs.parse(PROC_IP_VS) == (
        VirtualServer("10.96.0.1", 443, Protocol.TCP, 4),
        VirtualServer("10.96.0.10", 53, Protocol.UDP, 0),
        VirtualServer("fd00:10:96::1", 443, Protocol.TCP, 2),
    )


def test_virtual_servers_of_others_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is on kube-ipvs0 or a frontend of ours is kube-proxy's: it flushes all (Z6)."""
    servers = tuple(
        VirtualServer(address, port, Protocol.TCP)
        for address, port in (("10.96.0.1", 443), ("192.0.2.1", 30080), ("192.0.2.1", 8080))
    )
    monkeypatch.setattr(ipvs, "virtual_servers", lambda: servers)
    monkeypatch.setattr(kubeproxy, "link_addresses", lambda: ("10.96.0.1",))
    monkeypatch.setattr(kubeproxy, "nft_tables", lambda: ())
    monkeypatch.setattr(kubeproxy, "ipsets", lambda: ())
    found = look((), AGENT.served)
    assert (found.virtual_servers, found.foreign_servers) == (servers[:2], servers[2:])


def test_names_of_ipsets_are_cut_as_kube_proxy_cuts_them() -> None:
    """31 characters are the kernel's limit (V13); foreign KUBE- sets are not in the list."""
    assert "KUBE-6-LOAD-BALANCER-SOURCE-CID" in IPSETS
    assert "KUBE-NODE-PORT-LOCAL-SCTP-HASH" in IPSETS
    assert all(len(name) <= 31 for name in IPSETS)
    assert "KUBE-SRC-ABCDEFGHIJKLMNOP" not in IPSETS


def test_services_are_read_from_nft_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frontends of nftables mode, comments notwithstanding (X6)."""
    maps = {
        "service-ips": NFT_MAP,
        "no-endpoint-nodeports": "elements = { tcp . 30003 : drop }",
    }
    monkeypatch.setattr(kubeproxy, "_map", lambda table, name: maps.get(name, ""))
    assert kubeproxy.nft_services("ip kube-proxy") == {
        VIP,
        ("10.96.0.10", 53, "UDP"),
        ("", 30003, "TCP"),
    }


@pytest.mark.parametrize(
    ("signs", "agent", "keeps_nat", "words"),
    [
        ((Sign("process", "pid 7"),), AGENT, True, "kube-proxy runs"),
        ((), None, True, "no agent"),
        ((), AGENT, False, "masquerade rules"),
        ((), AgentView(1, AGENT.served, ("a/b: full",)), True, "could not write"),
        ((), AgentView(1, frozenset(), ()), True, "10.96.0.1:443/TCP"),
    ],
)
def test_each_thing_in_the_way_is_named(
    signs: tuple[Sign, ...], agent: AgentView | None, keeps_nat: bool, words: str
) -> None:
    """One obstacle for one cause, with how to mend it."""
    found = Inventory(nft={"ip kube-proxy": frozenset({VIP})})
    (only,) = obstacles(found, signs, agent, keeps_nat=keeps_nat)
    assert words in only.what
    assert only.mend


def test_nothing_in_the_way_is_silent() -> None:
    """The usual case."""
    found = Inventory(nft={"ip kube-proxy": frozenset({VIP})})
    assert list(obstacles(found, (), AGENT, keeps_nat=True)) == []


def test_node_port_covers_the_addresses_ipvs_lists() -> None:
    """IPVS serves a node port once for each address; ours has one name for all (V5)."""
    servers = (
        VirtualServer("192.0.2.1", 30080, Protocol.TCP),
        VirtualServer("192.0.2.1", 30081, Protocol.TCP),
    )
    found = Inventory(virtual_servers=servers)
    assert uncovered(found, AGENT.served) == [("192.0.2.1", 30081, "TCP")]


def test_host_without_ipvs_has_no_virtual_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module is not loaded: there is no file."""
    monkeypatch.setattr(ipvs, "PROC", tmp_path / "ip_vs")
    assert ipvs.virtual_servers() == ()
