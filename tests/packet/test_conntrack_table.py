"""The kernel's table of tracked connections, in a network namespace of the test's own."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ebpf_svc.dataplane.ipvs.flows import forget
from ebpf_svc.host import conntrack_table
from ebpf_svc.host.command import run
from ebpf_svc.host.ipvs import ServerKey
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.namespace import Namespace

pytestmark = pytest.mark.root

ENDS = {
    Family.V4: (("10.96.0.1", 53), ("10.1.0.1", 5353)),
    Family.V6: (("fd00:96::1", 53), ("fd00:1::1", 5353)),
}
LATE_PORT = 40007
"""What is sent from it leaves as an answer of the frontend's."""


@pytest.fixture(scope="module", params=list(Family), ids=lambda family: f"ipv{int(family)}")
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def node(family: Family) -> Iterator[None]:
    """This thread in a namespace that translates one address to another."""
    (vip, port), (backend, backend_port) = ENDS[family]
    space = Namespace(f"esvc-ct-{secrets.token_hex(3)}")
    ip = "ip" if family is Family.V4 else "ip6"
    to = f"{backend}:{backend_port}" if family is Family.V4 else f"[{backend}]:{backend_port}"
    length = 32 if family is Family.V4 else 128
    try:
        with space.entered():
            run(["ip", "address", "add", f"{backend}/{length}", "dev", "lo"])
            space.settle()
            run(["ip", "route", "add", "default", "dev", "lo", "src", backend])
            rule = f"{ip} daddr {vip} udp dport {port} dnat to {to}"
            hook = "type nat hook output priority -100"
            run(["nft", "-f", "-"], input=f"table {ip} t {{ chain c {{ {hook}; {rule}; }}; }}\n")
            hook = "type nat hook postrouting priority 100"
            source = f"{vip}:{port}" if family is Family.V4 else f"[{vip}]:{port}"
            rule = f"udp sport {LATE_PORT} snat to {source}"
            run(["nft", "-f", "-"], input=f"table {ip} t {{ chain d {{ {hook}; {rule}; }}; }}\n")
            yield
    finally:
        space.close()


def ask(family: Family, source_port: int) -> None:
    """Send one datagram to the frontend."""
    af = socket.AF_INET if family is Family.V4 else socket.AF_INET6
    with socket.socket(af, socket.SOCK_DGRAM) as sender:
        sender.bind((ENDS[family][1][0], source_port))
        sender.sendto(b"?", ENDS[family][0])


def flows(family: Family) -> list[conntrack_table.Entry]:
    vip = ENDS[family][0]
    return conntrack_table.entries(family, Protocol.UDP, lambda to, answers_from: to == vip)


def test_translated_flow_is_found_and_only_it_deleted(node, family):
    """C9: an entry is read with both its ends, and deleted by its exact tuple."""
    ask(family, 40001)
    ask(family, 40002)
    found = flows(family)
    assert all(one.by_rule for one in found)
    assert [(one.destination, one.answers_from) for one in found] == [ENDS[family]] * 2
    assert conntrack_table.delete(family, found[:1]) == 1
    assert [one.handle for one in flows(family)] == [found[1].handle]
    assert conntrack_table.delete(family, found) == 1
    assert flows(family) == []


def test_entry_of_another_id_is_not_meant(node, family):
    """C9: the tuple alone does not do: an entry that took the place of the one seen stays."""
    ask(family, 40003)
    (seen,) = flows(family)
    other = replace(seen, handle=seen.handle[:-1] + bytes([seen.handle[-1] ^ 1]))
    assert conntrack_table.delete(family, [other]) == 0
    assert flows(family) == [seen]


def test_other_protocols_are_not_read(node, family):
    """C4: TCP is never looked at."""
    seen = []

    def keep(to: tuple[str, int], answers_from: tuple[str, int]) -> bool:
        seen.append(to)
        return True

    ask(family, 40004)
    conntrack_table.entries(family, Protocol.TCP, keep)
    assert seen == []
    assert conntrack_table.can_be_read() == ""


def test_flow_no_rule_translates_goes_with_its_virtual_server(node, family):
    """Else its client, which goes on sending, would be served by nobody; rules' flows stay (C7)."""
    (vip, port), (backend, _) = ENDS[family]
    ask(family, 40005)
    af = socket.AF_INET if family is Family.V4 else socket.AF_INET6
    with socket.socket(af, socket.SOCK_DGRAM) as sender:
        sender.bind((backend, 40006))
        sender.sendto(b"?", (backend, port))
    translated = flows(family)
    servers = [ServerKey(address, port, Protocol.UDP) for address in (vip, backend)]
    assert forget([ServerKey(backend, port, Protocol.TCP)]) == 0
    assert forget(servers) == 1
    assert forget(servers) == 0
    assert flows(family) == translated
    conntrack_table.delete(family, translated)


def test_flow_begun_by_a_late_answer_goes_too(node, family):
    """Its client's next datagram would belong to it, whom no rule and no virtual server serves."""
    (vip, port), (backend, _) = ENDS[family]
    af = socket.AF_INET if family is Family.V4 else socket.AF_INET6
    with socket.socket(af, socket.SOCK_DGRAM) as server:
        server.bind((backend, LATE_PORT))
        server.sendto(b"!", (backend, 40008))
    assert forget([ServerKey(vip, port + 1, Protocol.UDP)]) == 0
    assert forget([ServerKey(vip, port, Protocol.UDP)]) == 1
    assert forget([ServerKey(vip, port, Protocol.UDP)]) == 0


@pytest.mark.usefixtures("node")
def test_flow_is_seen_as_its_source_unless_a_rule_translates_that(family: Family) -> None:
    """By the ends its client sent it from and to; of what is not tracked nothing is said."""
    frontend, backend = ENDS[family]
    for port, seen in ((40011, (backend[0], 40011)), (LATE_PORT, frontend)):
        ask(family, port)
        source = backend[0], port
        assert conntrack_table.seen_as(source, frontend, Protocol.UDP) == seen
        assert conntrack_table.seen_as(source, frontend, Protocol.TCP) is None
