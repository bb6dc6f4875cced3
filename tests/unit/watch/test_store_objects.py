"""The store, one object at a time: what a watch does to it."""

from __future__ import annotations

import random
from dataclasses import replace

from ebpf_svc.model.endpoint import EndpointSlice
from ebpf_svc.model.service import Service
from ebpf_svc.model.snapshot import NodeFacts, Snapshot
from ebpf_svc.watch.store import Store
from tests.lib.builders import make_endpoints, make_name, make_port, make_service, ready

WEB = make_service("shop/web")
WEB_SLICE = make_endpoints("shop/web", ready("10.1.0.1"), name="web-a")


def synced(*objects: Service | EndpointSlice) -> Store:
    store = Store("node1")
    store.replace(services={}, slices={})
    for each in objects:
        if isinstance(each, Service):
            store.put_service(each)
        else:
            store.put_slice(each)
    store.changed.clear()
    return store


def taken(store: Store) -> Snapshot:
    snapshot = store.snapshot()
    assert snapshot is not None
    return snapshot


def test_objects_put_before_the_lists_give_no_snapshot() -> None:
    """M4: events only accumulate until services and slices were listed."""
    store = Store("node1")
    store.put_service(WEB)
    store.put_slice(WEB_SLICE)
    store.replace(services={WEB.name: WEB})
    assert (store.snapshot(), store.changed.is_set()) == (None, False)
    store.replace(slices={WEB.name: (WEB_SLICE,)})
    assert store.changed.is_set()
    assert taken(store).services == {WEB.name: WEB}


def test_service_put_again_unchanged_is_no_change() -> None:
    """M5, M6: an update that changes nothing wakes nobody and keeps the snapshot."""
    store = synced(WEB, WEB_SLICE)
    before = taken(store)
    store.put_service(make_service("shop/web"))
    store.put_slice(replace(WEB_SLICE))
    store.delete_slice("shop", "unknown")
    store.delete_service(make_name("shop/unknown"))
    assert not store.changed.is_set()
    assert taken(store) is before


def test_snapshot_taken_before_a_change_stays_as_it_was() -> None:
    """A snapshot is immutable although the store changes collections in place."""
    store = synced(WEB, WEB_SLICE)
    before = taken(store)
    other = make_service("shop/other", cluster_ip="10.96.0.11")
    store.put_service(other)
    store.put_service(make_service("shop/third", cluster_ip="10.96.0.12"))
    store.delete_service(WEB.name)
    store.delete_slice("shop", "web-a")
    after = taken(store)
    assert (set(before.services), set(before.slices)) == ({WEB.name}, {WEB.name})
    assert (set(after.services), set(after.slices)) == (
        {other.name, make_name("shop/third")},
        set(),
    )
    assert after.revision > before.revision
    assert store.changed.is_set()


def test_untouched_collection_keeps_its_identity() -> None:
    """What did not change is the same object in the next snapshot."""
    store = synced(WEB, WEB_SLICE)
    before = taken(store)
    store.put_service(make_service("shop/web", make_port(81)))
    after = taken(store)
    assert after.slices is before.slices
    assert after.services is not before.services


def test_slices_of_a_service_stay_sorted_by_name() -> None:
    """E1: several slices of one Service are one tuple, in an order that events do not change."""
    slices = [make_endpoints("shop/web", ready(f"10.1.0.{i}"), name=f"web-{i}") for i in range(5)]
    stores = [synced(*order) for order in (slices, slices[::-1])]
    assert taken(stores[0]).slices == taken(stores[1]).slices == {WEB.name: tuple(slices)}
    stores[0].delete_slice("shop", "web-2")
    assert taken(stores[0]).slices[WEB.name] == tuple(slices[:2] + slices[3:])


def test_slice_relabelled_moves_to_its_new_service() -> None:
    """E1: the label decides whose endpoints they are; the old Service loses them."""
    store = synced(WEB_SLICE)
    moved = replace(WEB_SLICE, service_name=make_name("shop/api"))
    store.put_slice(moved)
    assert taken(store).slices == {make_name("shop/api"): (moved,)}
    store.delete_slice("shop", "web-a")
    assert taken(store).slices == {}


def test_slices_replaced_wholesale_are_found_by_later_events() -> None:
    """A relist between two events does not make the store forget which slice is whose."""
    store = synced(WEB_SLICE)
    other = make_endpoints("shop/web", ready("10.1.0.9"), name="web-b")
    store.replace(slices={WEB.name: (other,)})
    assert store.find_slice("shop", "web-a") is None
    assert store.find_slice("shop", "web-b") is other
    store.delete_slice("shop", "web-b")
    assert taken(store).slices == {}


def test_events_in_any_order_end_where_a_list_ends() -> None:
    """M5: whatever the events on the way, the last state of each object is what counts."""
    rng = random.Random(7)
    store, services = synced(), {}
    for _ in range(300):
        name = make_name(f"shop/s{rng.randrange(12)}")
        if rng.random() < 0.3:
            store.delete_service(name)
            services.pop(name, None)
        else:
            service = make_service(str(name), make_port(rng.randrange(1, 4)))
            store.put_service(service)
            services[name] = service
        if rng.random() < 0.2:
            assert taken(store).services == services
    assert taken(store).services == services


def test_node_awaited_holds_the_first_snapshot_back() -> None:
    """N3: nothing is planned before the node's addresses are known ..."""
    store = Store("node1")
    store.await_node()
    store.replace(services={}, slices={}, node=NodeFacts("node1"))
    assert store.snapshot() is None
    store.replace(node=NodeFacts("node1", addresses=("192.168.0.11",)))
    assert taken(store).node.addresses == ("192.168.0.11",)
    assert not store.give_up_on_node()


def test_node_given_up_lets_the_first_snapshot_go() -> None:
    """N3: ... or until nobody waits for them any more."""
    store = Store("node1")
    store.await_node()
    store.replace(services={}, slices={})
    assert store.give_up_on_node()
    assert store.changed.is_set()
    assert taken(store).node == NodeFacts("node1")
