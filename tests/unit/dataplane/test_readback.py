"""Read-back: what entries in the maps mean, whoever wrote them."""

from __future__ import annotations

import pytest

from ebpf_svc.dataplane.ebpf.codec import Codec
from ebpf_svc.dataplane.ebpf.entries import FrontendValue
from ebpf_svc.dataplane.ebpf.readback import read_family
from ebpf_svc.dataplane.ebpf.tables import FamilyTables
from ebpf_svc.model.desired import Backend, FrontendKey, FrontendKind, FrontendView
from ebpf_svc.model.net import Family, Protocol, Sources
from tests.lib.memory_maps import memory_tables
from tests.lib.plans import make_frontend

TCP = Protocol.TCP.number
VIP = {Family.V4: "203.0.113.7", Family.V6: "2001:db8::7"}
POD = {Family.V4: "10.1.0.1", Family.V6: "fd00:1::1"}
NETWORK = {Family.V4: "10.0.0.0/8", Family.V6: "fd00::/8"}
OTHER_NETWORK = {Family.V4: "11.0.0.0/8", Family.V6: "fc00::/8"}


@pytest.fixture(params=list(Family), ids=lambda family: f"ipv{int(family)}")
def family(request: pytest.FixtureRequest) -> Family:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def tables(family: Family) -> FamilyTables:
    return memory_tables().family[family]


def put_backend(tables: FamilyTables, codec: Codec, backend: int, at: bytes, tail: bytes) -> None:
    """Write a backend and make it the head of its chain."""
    tables.backends.write(backend, at + tail)
    tables.backend_index.update([(at, codec.word(backend))])


def test_frontend_is_read_with_its_flags_ranges_and_backends(
    family: Family, tables: FamilyTables
) -> None:
    """Kind and traffic matrix come from the flags, prefixes from the set the value names."""
    codec = Codec(family, tables)
    value = FrontendValue(5, 3 << 12 | 1 << 8 | 1 << 7 | 5 << 3 | 4, 0, 1, 1, 1, 300, 9)
    tables.frontends.update([(codec.at(VIP[family], 443, TCP), codec.frontend(value))])
    word = codec.word(1)
    tables.source_ranges.update([(codec.range_key(9, NETWORK[family]), word)])
    tables.source_ranges.update([(codec.range_key(8, OTHER_NETWORK[family]), word)])
    put_backend(tables, codec, 2, codec.at(POD[family], 8443, TCP), codec.tail(5, 0, 5))
    assert read_family(codec, tables) == {
        FrontendKey(VIP[family], 443, Protocol.TCP): FrontendView(
            make_frontend(
                VIP[family],
                443,
                kind=FrontendKind.LOAD_BALANCER,
                local_for=Sources.EXTERNAL,
                masquerade_for=Sources.POD | Sources.EXTERNAL,
                source_ranges=[NETWORK[family]],
            ),
            (Backend(POD[family], 8443, in_cluster=False, in_local=True),),
            has_endpoints=True,
            affinity_s=300,
        )
    }


def test_chain_is_told_apart_by_service_and_tombstones_are_not_backends(
    family: Family, tables: FamilyTables
) -> None:
    """Of three service ports with one endpoint each sees its own; one that left it, none."""
    codec = Codec(family, tables)
    at = codec.at(POD[family], 80, TCP)
    for service, flags in ((1, 3), (2, 0), (3, 1)):
        key = codec.at(VIP[family], 80 + service, TCP)
        value = codec.frontend(FrontendValue(service, 0, 0, 0, 0, 0, 0, 0))
        tables.frontends.update([(key, value)])
        put_backend(tables, codec, service, at, codec.tail(service, service - 1, flags))
    views = read_family(codec, tables)
    assert {key.port: view.backends for key, view in views.items()} == {
        81: (Backend(POD[family], 80),),
        82: (),
        83: (Backend(POD[family], 80, in_cluster=False),),
    }


def test_draining_frontend_is_not_read(family: Family, tables: FamilyTables) -> None:
    """It takes no new connection, so for the model it is gone."""
    codec = Codec(family, tables)
    value = codec.frontend(FrontendValue(1, 1 << 9, 0, 0, 0, 0, 0, 0))
    tables.frontends.update([(codec.at(VIP[family], 80, TCP), value)])
    assert read_family(codec, tables) == {}


def test_reading_ends_where_a_chain_bites_its_tail(family: Family, tables: FamilyTables) -> None:
    """Maps somebody else damaged are read, not followed forever."""
    codec = Codec(family, tables)
    put_backend(tables, codec, 1, codec.at(POD[family], 80, TCP), codec.tail(1, 1, 3))
    value = codec.frontend(FrontendValue(1, 0, 0, 0, 0, 0, 0, 0))
    tables.frontends.update([(codec.at(VIP[family], 80, TCP), value)])
    (view,) = read_family(codec, tables).values()
    assert set(view.backends) == {Backend(POD[family], 80)}
