"""This node's addresses, in a network namespace of the test's own."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable

import pytest
from pyroute2 import IPRoute

from ebpf_svc.watch.addresses import AddressWatch, local_addresses
from ebpf_svc.watch.store import Store

CLONE_NEWNET = 0x40000000


def in_new_network(run: Callable[[], None]) -> None:
    """Run in a thread that has its own network namespace, as an agent of the testbed does."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def eventually(store: Store, expected: set[str]) -> None:
    ends_s = time.monotonic() + 5
    while (found := set(addresses(store))) != expected:
        assert time.monotonic() < ends_s, found
        store.changed.wait(0.02)
        store.changed.clear()


def addresses(store: Store) -> tuple[str, ...]:
    snapshot = store.snapshot()
    return snapshot.node.local_addresses if snapshot else ()


def make_link(netlink: IPRoute, name: str) -> int:
    netlink.link("add", ifname=name, kind="veth", peer=f"{name}-peer")
    (index,) = netlink.link_lookup(ifname=name)
    netlink.link("set", index=index, state="up")
    return int(index)


@pytest.mark.root
def test_addresses_follow_the_interfaces() -> None:
    """What comes and goes is known at once, loopback included, link-local IPv6 left out."""

    def run() -> None:
        store = Store("node1")
        store.replace(services={}, slices={})
        watch = AddressWatch(store)
        with IPRoute() as netlink:
            watch.start()
            assert addresses(store) == ()
            netlink.link("set", index=1, state="up")
            eventually(store, {"127.0.0.1", "::1"})
            index = make_link(netlink, "d0")
            netlink.addr("add", index=index, address="192.0.2.1", prefixlen=24)
            for address in ("2001:db8::1", "fe80::1:2"):
                # Without duplicate address detection, so that it is there at once.
                netlink.addr("add", index=index, address=address, prefixlen=64, flags=0x02)
            eventually(store, {"127.0.0.1", "192.0.2.1", "2001:db8::1", "::1"})
            netlink.addr("del", index=index, address="192.0.2.1", prefixlen=24)
            eventually(store, {"127.0.0.1", "2001:db8::1", "::1"})
            netlink.link("del", index=index)
            eventually(store, {"127.0.0.1", "::1"})
        watch.stop()

    in_new_network(run)


@pytest.mark.root
def test_on_a_point_to_point_link_the_own_end_counts() -> None:
    def run() -> None:
        with IPRoute() as netlink:
            index = make_link(netlink, "d0")
            netlink.addr("add", index=index, local="192.0.2.1", address="192.0.2.2", prefixlen=32)
            assert "192.0.2.1" in local_addresses()
            assert "192.0.2.2" not in local_addresses()

    in_new_network(run)


@pytest.mark.root
def test_lost_messages_lose_no_address() -> None:
    """More changes at once than the kernel keeps messages of."""

    def run() -> None:
        store = Store("node1")
        store.replace(services={}, slices={})
        watch = AddressWatch(store)
        watch._socket.setsockopt(1, 8, 2048)  # SO_RCVBUF, the smallest
        with IPRoute() as netlink:
            index = make_link(netlink, "d0")
            watch.start()
            expected = {f"192.0.2.{i}" for i in range(1, 120)}
            for address in sorted(expected):
                netlink.addr("add", index=index, address=address, prefixlen=24)
            eventually(store, expected)
        watch.stop()

    in_new_network(run)
