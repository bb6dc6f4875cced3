"""The store: what changes keeps nothing else from staying the same."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from ebpf_svc.model.endpoint import Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.model.service import Service, ServiceName, ServicePort, ServiceType
from ebpf_svc.model.snapshot import NodeFacts, Problem, Snapshot
from ebpf_svc.watch.store import Store
from tests.unit.watch.cluster import named


def make_service(name: str, port: int = 80) -> Service:
    return Service(
        named(name), ServiceType.CLUSTER_IP, (ServicePort("", Protocol.TCP, port),), ("10.96.0.1",)
    )


def make_slice(service: str, name: str, *addresses: str) -> EndpointSlice:
    return EndpointSlice(
        namespace="default",
        name=name,
        service_name=named(service),
        family=Family.V4,
        ports=(EndpointPort("", Protocol.TCP, 8080),),
        endpoints=tuple(Endpoint(address) for address in addresses),
    )


def by_name(*services: Service) -> dict[ServiceName, Service]:
    return {each.name: each for each in services}


def synced() -> tuple[Store, Snapshot]:
    store = Store("node1")
    store.replace(
        services=by_name(make_service("a"), make_service("b")),
        slices={
            named("a"): (make_slice("a", "a-1", "10.0.0.1"), make_slice("a", "a-2", "10.0.0.2")),
            named("b"): (make_slice("b", "b-1", "10.0.0.3"),),
        },
    )
    return store, latest(store)


def latest(store: Store) -> Snapshot:
    snapshot = store.snapshot()
    assert snapshot is not None
    return snapshot


def test_there_is_no_snapshot_before_services_and_slices_are_known() -> None:
    """Rule M4: a half-known world must not be written to a kernel."""
    store = Store("node1")
    store.set_local_addresses(("127.0.0.1",))
    assert store.snapshot() is None
    store.replace(services={})
    assert store.snapshot() is None
    assert not store.changed.is_set()
    store.replace(slices={})
    assert store.changed.is_set()
    assert latest(store).node.local_addresses == ("127.0.0.1",)


def test_equal_values_change_nothing() -> None:
    """Not the snapshot, not its number, and nobody is woken."""
    store, before = synced()
    store.changed.clear()
    other, _ = synced()
    again = latest(other)
    store.replace(
        services=again.services, slices=again.slices, problems=(), node=NodeFacts("node1")
    )
    assert latest(store) is before
    assert not store.changed.is_set()


def test_one_changed_service_leaves_the_others_the_same_objects() -> None:
    store, before = synced()
    store.replace(services=by_name(make_service("a"), make_service("b", 81)))
    after = latest(store)
    assert after.services[named("a")] is before.services[named("a")]
    assert after.services[named("b")] == make_service("b", 81)
    assert after.slices is before.slices
    assert after.revision == before.revision + 1


def test_one_changed_slice_leaves_the_others_the_same_objects() -> None:
    """Tuples of other Services, and the slice's own neighbours."""
    store, before = synced()
    store.replace(
        slices={
            named("a"): (make_slice("a", "a-1", "10.0.0.1"), make_slice("a", "a-2", "10.0.0.9")),
            named("b"): (make_slice("b", "b-1", "10.0.0.3"),),
        }
    )
    after = latest(store)
    assert after.slices[named("b")] is before.slices[named("b")]
    assert after.slices[named("a")][0] is before.slices[named("a")][0]
    assert after.slices[named("a")][1].endpoints[0].address == "10.0.0.9"


def test_what_is_gone_is_gone() -> None:
    store, _ = synced()
    store.replace(services=by_name(make_service("a")), slices={})
    assert list(latest(store).services) == [named("a")]
    assert latest(store).slices == {}


def test_the_nodes_facts_come_from_two_sources() -> None:
    """The API knows addresses and zone, the kernel the interfaces; neither wipes the other."""
    store, _ = synced()
    store.set_local_addresses(("::1", "127.0.0.1"))
    store.replace(node=NodeFacts("node1", addresses=("192.168.0.1",), zone="a"))
    expected = NodeFacts("node1", ("192.168.0.1",), ("127.0.0.1", "::1"), "a")
    assert latest(store).node == expected
    store.changed.clear()
    store.set_local_addresses(("127.0.0.1", "::1"))
    assert not store.changed.is_set()
    store.replace(problems=(Problem("a.yaml", "", "", "x"),))
    assert latest(store).node == expected


def test_problems_come_and_go() -> None:
    store, before = synced()
    problem = Problem("a.yaml", "Service default/a", "spec", "wrong")
    store.replace(problems=(problem,))
    assert latest(store).problems == (problem,)
    store.replace(services=before.services)
    assert latest(store).problems == (problem,)
    store.replace(problems=())
    assert latest(store).problems == ()


def test_writers_in_several_threads_lose_nothing() -> None:
    store, _ = synced()

    def write(offset: int) -> None:
        for i in range(200):
            store.set_local_addresses((f"10.{offset}.0.{i}",))
            store.replace(services=by_name(make_service(f"s{offset}", i + 1)))

    before = latest(store).revision
    threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert latest(store).revision == before + 3 * 200 * 2


_WORLDS = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 3), max_size=4)


@given(st.lists(_WORLDS, min_size=1, max_size=6))
def test_the_snapshot_is_what_was_last_put_in(worlds: list[dict[str, int]]) -> None:
    """Whatever came before, and a value that did not change is the object from before."""
    store = Store("node1")
    before: Snapshot | None = None
    for world in worlds:
        services = by_name(*(make_service(name, port) for name, port in world.items()))
        slices = {
            named(name): (make_slice(name, f"{name}-1", f"10.0.0.{n}"),)
            for name, n in world.items()
        }
        store.replace(services=services, slices=slices)
        after = latest(store)
        assert after.services == services
        assert after.slices == slices
        if before is not None:
            for name, each in before.services.items():
                assert after.services.get(name) is each or after.services.get(name) != each
            for name, items in before.slices.items():
                assert after.slices.get(name) is items or after.slices.get(name) != items
        before = after


def test_snapshot_knows_its_oldest_change() -> None:
    """The latency of a change counts from its arrival, not from the last of a burst."""
    store = Store("node1")
    store.replace(services={}, slices={})
    taken = store.snapshot()
    assert taken is not None
    before = time.monotonic()
    store.put_service(make_service("a"))
    after_first = time.monotonic()
    store.put_service(make_service("b"))
    burst = store.snapshot()
    assert burst is not None
    assert taken.since_s <= before <= burst.since_s <= after_first
    store.put_service(make_service("c"))
    last = store.snapshot()
    assert last is not None
    assert last.since_s >= after_first


def test_primary_address_stands_before_those_of_the_node() -> None:
    """bindAddress decides the node's address of its family, known from the start (N2)."""
    store = Store("node1", primary_address="192.0.2.9")
    assert store.node().addresses == ("192.0.2.9",)
    store.replace(node=NodeFacts("node1", ("192.0.2.1", "192.0.2.9", "2001:db8::1")))
    assert store.node().addresses == ("192.0.2.9", "192.0.2.1", "2001:db8::1")


def test_primary_address_does_not_end_the_wait_for_the_node() -> None:
    """The Node object is still awaited: it has more than addresses (N3)."""
    store = Store("node1", primary_address="192.0.2.9")
    store.await_node()
    store.replace(services={}, slices={}, node=NodeFacts("node1"))
    assert store.snapshot() is None
    store.replace(node=NodeFacts("node1", ("192.0.2.1",)))
    assert store.snapshot() is not None
