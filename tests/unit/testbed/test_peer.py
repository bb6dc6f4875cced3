"""The peer program on this machine's loopback: no root, no namespaces."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

from ebpf_svc.testbed.control import Peer, PeerError
from ebpf_svc.testbed.namespace import python_argv
from ebpf_svc.testbed.peer import client
from ebpf_svc.testbed.peer.load import Load
from tests.lib.waiting import eventually

PORT = 28_080


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    pipe = subprocess.PIPE
    argv = python_argv("ebpf_svc.testbed.peer", site_packages=False)
    made = Peer(subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True), "self")
    made.call("serve", name="one", ports=[["TCP", PORT], ["UDP", PORT]], address="127.0.0.1")
    yield made
    made.close()


def _target(protocol: str, port: int = PORT, **options: object) -> dict[str, object]:
    return {"address": "127.0.0.1", "port": port, "protocol": protocol, "timeout_s": 1.0, **options}


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_answer_says_who_answered_and_whom_it_saw(peer: Peer, protocol: str) -> None:
    """An answer names the server, the client it saw and the address the client talked to."""
    ((answer,),) = peer.call("ask", probes=[_target(protocol, request_bytes=3000)])
    del answer["latency_ms"], answer["client_port"], answer["reply_bytes"]
    assert answer == {
        "outcome": "ok",
        "server": "one",
        "client": "127.0.0.1",
        "peer": "127.0.0.1",
        "peer_port": PORT,
        "request_bytes": 3000,
    }


def test_closed_port_counts_as_refused(peer: Peer) -> None:
    """Nobody listening is told apart from nobody answering."""
    ((tcp,), (udp,)) = peer.call("ask", probes=[_target("TCP", 9), _target("UDP", 9)])
    assert (tcp["outcome"], udp["outcome"]) == ("refused", "refused")


def test_mapped_address_reaches_the_ipv4_server(peer: Peer) -> None:
    """A dual-stack socket asks an IPv4 service by its v4-mapped address."""
    ((answer,),) = peer.call("ask", probes=[_target("TCP", mapped=True)])
    assert (answer["server"], answer["peer"]) == ("one", "127.0.0.1")


@pytest.mark.usefixtures("peer")
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_port_of_its_own_is_not_used_again(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """A request has a port of those that are left, and spends it."""
    spent = {port for port in range(1 << 16) if port % 50 > 1}
    monkeypatch.setattr(client, "SPENT_PORTS", 1 << 16)
    monkeypatch.setitem(client.SPENT, (False, protocol), spent)
    target = _target(protocol, own_port=True)
    first, second = (client.ask(target)["client_port"] for _ in range(2))
    assert first != second
    assert {first % 50, second % 50} <= {0, 1}
    assert {first, second} < spent


@pytest.mark.usefixtures("peer")
def test_ports_of_hosts_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that leave with one address do not meet at a server with one port."""
    shares = []
    for share in range(client.SHARES):
        monkeypatch.setattr(client.Channel, "share", share)
        answers = [client.ask(_target("UDP", own_port=True)) for _ in range(20)]
        shares.append({answer["client_port"] for answer in answers})
    assert all(len(share) == 20 for share in shares)
    assert len(set.union(*shares)) == 20 * client.SHARES


@pytest.mark.usefixtures("peer")
def test_load_tells_when_every_worker_has_ended_a_request() -> None:
    """One that still waits for its answer is not hidden by others that had theirs."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        waits = _target("UDP", silent.getsockname()[1])
        running = Load([_target("UDP"), waits], workers=2, pause_s=0.0)
        eventually(lambda: running.account()["ok"], within_s=0.5)
        assert running.account()["least"] == 0
        assert running.stop()["least"] > 0
    assert running.account(reset=True)["least"] > 0
    assert running.account()["least"] == 0


def test_wrong_command_is_an_error_of_the_peer(peer: Peer) -> None:
    """A mistake in a test shows as PeerError, not as an outcome."""
    with pytest.raises(PeerError, match="AttributeError"):
        peer.call("fly")


def test_ended_peer_fails_what_waits_for_it() -> None:
    """Nobody waits for a peer that is gone."""
    pipe = subprocess.PIPE
    argv = python_argv("ebpf_svc.testbed.peer", site_packages=False)
    gone = Peer(subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True), "gone")
    gone.close()
    with pytest.raises(PeerError, match="ended"):
        gone.call("ask", probes=[])
