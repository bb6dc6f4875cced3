"""The masquerade rules in a real kernel: a router, a client's namespace and a server's."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpf_svc.host.command import run
from ebpf_svc.host.nft import CHAIN, TABLE, IptablesRules, MasqueradeRules, NftRules
from ebpf_svc.host.sockets import in_namespace

pytestmark = pytest.mark.root

MARK = 0x4000
SO_MARK = 36


class Router:
    """A namespace with addresses on loopback and one neighbour, `server`, across a veth.

    The router's own sockets set the mark, as a tc program would on forwarded packets.
    """

    def __init__(self, name: str) -> None:
        self.name, self.server = name, f"{name}s"

    def build(self) -> None:
        name = self.name
        for netns in (self.name, self.server):
            run(["ip", "netns", "add", netns])
        commands = (
            f"-n {name} link add wire type veth peer name wire netns {self.server}",
            f"-n {name} link set lo up",
            f"-n {name} link set wire up",
            f"-n {self.server} link set wire up",
            f"-n {name} addr add 192.0.2.1/24 dev wire",
            f"-n {name} addr add fd00:2::1/64 dev wire nodad",
            f"-n {name} addr add 10.244.0.5/32 dev lo",
            f"-n {name} addr add fd00:10:244::5/128 dev lo nodad",
            f"-n {self.server} addr add 192.0.2.2/24 dev wire",
            f"-n {self.server} addr add fd00:2::2/64 dev wire nodad",
            f"-n {self.server} route add 10.244.0.0/16 via 192.0.2.1",
            f"-n {self.server} route add fd00:10:244::/48 via fd00:2::1",
        )
        for command in commands:
            run(["ip", *command.split()])

    def remove(self) -> None:
        for netns in (self.name, self.server):
            if Path("/run/netns", netns).exists():
                run(["ip", "netns", "del", netns])

    def inside(self, work: Callable[[], object]) -> object:
        return in_namespace(Path("/run/netns", self.name), work)

    def seen_source(self, source: str, server: str, *, mark: int) -> str:
        """The address the server sees when `source` sends it a datagram with that mark."""
        family = socket.AF_INET6 if ":" in server else socket.AF_INET

        def listen() -> socket.socket:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.bind((server, 7777))
            sock.settimeout(5)
            return sock

        def send() -> None:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
                sock.bind((source, 0))
                sock.sendto(b"hello", (server, 7777))

        listening = in_namespace(Path("/run/netns", self.server), listen)
        assert listening
        with listening:
            self.inside(send)
            _, address = listening.recvfrom(100)
        return str(address[0])


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    router = Router(f"esvc-masq{os.getpid()}")
    try:
        router.build()
        yield router
    finally:
        router.remove()


@pytest.fixture(params=[NftRules, IptablesRules], ids=["nft", "iptables"])
def rules(request: pytest.FixtureRequest, router: Router) -> Iterator[MasqueradeRules]:
    tool = "nft" if request.param is NftRules else "iptables"
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    made: MasqueradeRules = request.param(MARK)
    yield made
    router.inside(made.remove)


FAMILIES = pytest.mark.parametrize(
    ("pod", "server", "node"),
    [("10.244.0.5", "192.0.2.2", "192.0.2.1"), ("fd00:10:244::5", "fd00:2::2", "fd00:2::1")],
    ids=["v4", "v6"],
)


@FAMILIES
def test_marked_packets_get_the_node_address_and_others_keep_theirs(
    router: Router, rules: MasqueradeRules, pod: str, server: str, node: str
) -> None:
    """Only our bit counts, whatever else the mark says (P6, I16)."""
    router.inside(rules.apply)
    assert router.seen_source(pod, server, mark=MARK) == node
    assert router.seen_source(pod, server, mark=MARK | 0x8) == node
    assert router.seen_source(pod, server, mark=0) == pod
    assert router.seen_source(pod, server, mark=0x8) == pod


def test_mark_ends_with_source_nat(router: Router) -> None:
    """No packet of a flow, first or later, carries the mark on to the outer packet of a tunnel.

    A rule behind ours counts marked packets; the later ones are not seen by NAT chains.
    """
    rules = NftRules(MARK)
    watch = f"""
    table inet watch {{
        chain postrouting {{
            type filter hook postrouting priority 200;
            meta mark & {MARK} == {MARK} counter
            meta mark 0x8 counter
        }}
    }}"""

    def send_three() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK | 0x8)
            sock.bind(("10.244.0.5", 0))
            for _ in range(3):
                sock.sendto(b"hello", ("192.0.2.2", 7777))

    router.inside(rules.apply)
    router.inside(lambda: run(["nft", "-f", "-"], input=watch))
    router.inside(send_three)
    counted = str(router.inside(lambda: run(["nft", "list", "table", "inet", "watch"])))
    router.inside(lambda: run(["nft", "delete", "table", "inet", "watch"]))
    router.inside(rules.remove)
    packets = [
        line.split("packets ")[1].split()[0] for line in counted.splitlines() if "packets" in line
    ]
    assert packets == ["0", "3"]


def test_applying_twice_leaves_one_set_of_rules(router: Router, rules: MasqueradeRules) -> None:
    """A restarted agent applies again over what stands."""
    router.inside(rules.apply)
    once = listing(router)
    router.inside(rules.apply)
    assert listing(router) == once
    assert router.inside(rules.read) is True


def test_changed_rules_are_noticed_and_put_right(router: Router, rules: MasqueradeRules) -> None:
    """Somebody flushes our chain: `read` says so, `apply` repairs it."""
    router.inside(rules.apply)
    flush = (
        ["nft", "flush", "chain", *TABLE.split(), "postrouting"]
        if isinstance(rules, NftRules)
        else ["iptables", "-t", "nat", "-F", CHAIN]
    )
    router.inside(lambda: run(flush))
    assert router.inside(rules.read) is False
    router.inside(rules.apply)
    assert router.inside(rules.read) is True
    assert router.seen_source("10.244.0.5", "192.0.2.2", mark=MARK) == "192.0.2.1"


def test_chain_of_our_name_with_another_hook_is_replaced(router: Router) -> None:
    """An older version, or a person, may have left one: the table becomes as rendered."""
    rules = NftRules(MARK)
    foreign = f"""
    table {TABLE} {{
        chain postrouting {{ type filter hook forward priority 0; }}
        chain other {{ }}
    }}"""
    router.inside(lambda: run(["nft", "-f", "-"], input=foreign))
    router.inside(rules.apply)
    assert router.seen_source("10.244.0.5", "192.0.2.2", mark=MARK) == "192.0.2.1"
    assert router.inside(rules.remove) is True


def test_removal_leaves_nothing_and_may_be_repeated(router: Router, rules: MasqueradeRules) -> None:
    """Cleanup without rules present is a success (Z4)."""
    router.inside(rules.apply)
    assert router.inside(rules.remove) is True
    assert "ebpf-svc" not in listing(router).lower()
    assert router.inside(rules.remove) is False
    assert router.inside(rules.read) is False


def listing(router: Router) -> str:
    """Every rule of the router, ours and others."""
    return str(router.inside(lambda: run(["nft", "--stateless", "list", "ruleset"])))
