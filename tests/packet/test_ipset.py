"""Sets and addresses in the kernel, in a network namespace of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from ebpf_svc.dataplane.ipvs import ruleset, sets
from ebpf_svc.dataplane.ipvs.render import Options, render
from ebpf_svc.dataplane.ipvs.rules import RuleOptions
from ebpf_svc.dataplane.ipvs.ruleset import difference, removal
from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.host import dummy, ipset, rtnetlink
from ebpf_svc.host.ipset import ERR_BUSY, Entry, Sets, Spec
from ebpf_svc.host.iptables import variants
from ebpf_svc.host.netlink import CREATE, EXCL, attribute
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.testbed.namespace import Namespace
from tests.lib.plans import make_frontend, make_plan

SPEC = Spec("TEST", "hash:ip,port", Family.V4, 1 << 20)
HERE = Entry("10.96.0.1", 6, 80)


@pytest.fixture
def held() -> Iterator[Sets]:
    if not ipset.is_there():
        pytest.skip("this kernel has no ipsets")
    namespace = Namespace("esvc-test-ipset")
    try:
        with namespace.entered(), Sets() as made:
            yield made
    finally:
        namespace.close()


def test_every_set_takes_and_gives_back_what_services_put_in(held: Sets) -> None:
    """V13: types, families and elements, SCTP's included; put twice is put once."""
    plans = [
        make_plan(
            f"{protocol}-{family}",
            make_frontend(vip, protocol=protocol),
            make_frontend(
                vip, 81, protocol, kind=FrontendKind.LOAD_BALANCER, masquerade_for=Sources.NODE,
                source_ranges=[f"{vip}/{bits}", half],
            ),
            make_frontend(vip, 82, protocol, kind=FrontendKind.EXTERNAL_IP),
            make_frontend(vip, 83, protocol, kind=FrontendKind.NODE_PORT),
            backends=[backend],
        )
        for protocol in Protocol
        for family, vip, bits, half, backend in (
            (4, "10.96.0.1", 32, "128.0.0.0/1", "10.1.0.1"),
            (6, "fd00::1", 128, "8000::/1", "fd00::2"),
        )
    ]  # fmt: skip
    specs = [spec for family in Family for spec in sets.specs_of(family)]
    assert held.create(specs) == [None] * len(specs)
    assert held.create(specs) == [None] * len(specs)
    wanted = {each for plan in plans for each in render(plan, Options()).entries}
    elements = [(sets.SPECS[name], entry) for name, entry in sorted(wanted)]
    for _ in range(2):
        assert held.add(elements) == [None] * len(elements)
    read = {spec.name: held.read(spec.name) for spec in specs}
    assert {
        (name, entry) for name, each in read.items() if each for entry in each.entries
    } == wanted
    for spec in specs:
        one = read[spec.name]
        assert one is not None
        assert (one.spec.type, one.spec.maxelem) == (spec.type, spec.maxelem)
    for _ in range(2):
        assert held.remove(elements) == [None] * len(elements)
    assert held.destroy(spec.name for spec in specs) == [None] * len(specs)
    assert held.names() == ()


def test_set_of_another_size_is_told_and_can_be_swapped(held: Sets) -> None:
    """kube-proxy's sets are smaller; rules that use one go on with the other's elements."""
    held.create([SPEC])
    (failure,) = held.create([Spec("TEST", SPEC.type, SPEC.family, 65536)])
    assert failure is not None
    other = Spec("OTHER", SPEC.type, SPEC.family, 65536)
    held.create([other])
    held.add([(other, HERE)])
    assert held.swap("OTHER", "TEST") is None
    read = held.read("TEST")
    assert read is not None
    assert (read.entries, read.spec.maxelem) == ({HERE}, 65536)


def test_missing_set_is_none(held: Sets) -> None:
    """Nothing is there of that name; removing it again is no error."""
    assert held.read("TEST") is None
    assert held.destroy(["TEST"]) == [None]


@pytest.mark.parametrize("pods", ["10.244.0.0/16", ""])
def test_rules_come_back_as_they_were_written(held: Sets, pods: str) -> None:
    """Else each resync would write them again: every iptables of this host, both families."""
    for family in Family:
        held.create(sets.specs_of(family))
    for variant in variants(tuple(Family)):
        prefix = pods if variant.family is Family.V4 else pods and "fd00:10:244::/48"
        options = RuleOptions(variant.family, PodMatch(prefix=prefix) if prefix else None)
        variant.restore(difference(options, variant.save()).text)
        assert difference(options, variant.save()).text == ""
        assert ruleset.is_ours(variant.save())
        used = held.destroy([sets.name_of(sets.CLUSTER_IP, variant.family)])
        assert [one.errno for one in used if one] == [ERR_BUSY]
        for marker in (False, True):
            variant.restore(removal(variant.save(), marker=marker))
        assert not ruleset.is_ours(variant.save())
        assert not any(
            chain.startswith("KUBE-") for table in variant.save().values() for chain in table.chains
        )


def test_addresses_come_and_go_in_bulk(held: Sets) -> None:
    """Both families on one device; what is there, and what is gone, is no error."""
    wanted = [f"10.96.{number >> 8}.{number & 255}" for number in range(300)] + ["fd00:10:96::1"]
    # This kernel may have no dummy device: a bridge holds addresses as well.
    name = "services0"
    with closing(rtnetlink.Socket()) as link:
        info = rtnetlink_link(name)
        assert link.requests([info]) == [None]
        index = dummy.index_of(name)
        for _ in range(2):
            assert dummy.add_addresses(link, index, wanted) == [None] * len(wanted)
        there = {one.address for one in dummy.addresses(link) if one.device == index}
        assert there == set(wanted)
        for _ in range(2):
            assert dummy.remove_addresses(link, index, wanted) == [None] * len(wanted)
        dummy.remove(link, name)
        dummy.remove(link, name)
        assert dummy.index_of(name) == 0


def rtnetlink_link(name: str) -> tuple[int, int, bytes]:
    """The request that makes a bridge."""
    body = bytes(16) + attribute(3, name.encode() + b"\0")
    body += attribute(18, attribute(1, b"bridge\0"))
    return rtnetlink.NEWLINK, CREATE | EXCL, body
