"""Following an API server that behaves: rules W1-W4, W7, M2, M4-M6, N1-N6."""

from __future__ import annotations

import time

import pytest

from ebpf_svc.bench.apiserver import MockApiServer
from tests.lib import apiserver as api
from tests.lib.apiserver import watching
from tests.lib.waiting import eventually, wait_out


def test_first_state_is_all_there_is(server: MockApiServer, streaming_lists: bool) -> None:
    """M4, W1-W4: one snapshot holds services, slices, the node and its zone."""
    server.put("ServiceCIDR", {"metadata": {"name": "k"}, "spec": {"cidrs": ["10.96.0.0/16"]}})
    with watching(server, streaming_lists=streaming_lists) as seen:
        snapshot = seen.becomes(lambda s: s.service_cidrs)
    assert [str(name) for name in snapshot.services] == ["shop/web"]
    assert [str(name) for name in snapshot.slices] == ["shop/web"]
    assert snapshot.service_cidrs == ("10.96.0.0/16",)
    assert snapshot.node.addresses == ("192.168.0.11",)
    assert (snapshot.node.zone, snapshot.node.pod_cidrs) == ("zone-a", ("10.244.1.0/24",))
    assert snapshot.problems == ()


def test_empty_cluster_is_in_sync(streaming_lists: bool) -> None:
    """M4: nothing listed is something known."""
    server = MockApiServer().start()
    try:
        server.put("Node", api.node())
        with watching(server, streaming_lists=streaming_lists) as seen:
            snapshot = seen.becomes(bool)
            assert (dict(snapshot.services), dict(snapshot.slices)) == ({}, {})
            assert seen.store.changed.is_set()
    finally:
        server.close()


def test_server_is_asked_for_what_is_ours_alone(
    server: MockApiServer, streaming_lists: bool
) -> None:
    """W1-W3: the server filters, so what is not ours costs nothing."""
    with watching(server, streaming_lists=streaming_lists) as seen:
        seen.serves("shop/web")
        eventually(lambda: server.watchers("ServiceCIDR"))
    kinds = {"/services", "/endpointslices", "/nodes", "/servicecidrs"}
    selectors = {
        (request.path[request.path.rindex("/") :], key): value
        for request in server.requests
        for key, value in request.query.items()
        if key.endswith("Selector")
    }
    assert {request.path[request.path.rindex("/") :] for request in server.requests} == kinds
    assert selectors == {
        ("/services", "labelSelector"): "!service.kubernetes.io/service-proxy-name",
        ("/services", "fieldSelector"): "spec.clusterIP!=None",
        ("/endpointslices", "labelSelector"): "!service.kubernetes.io/headless",
        ("/nodes", "fieldSelector"): "metadata.name=node1",
    }


@pytest.mark.parametrize("selects_cluster_ips", [True, False])
def test_foreign_headless_and_other_nodes_objects_stay_unseen(
    server: MockApiServer, selects_cluster_ips: bool
) -> None:
    """W1-W3, F16: also when they become so while they are watched, and by a server that cannot
    select Services by address.
    """
    server.selects_cluster_ips = selects_cluster_ips
    label = {"service.kubernetes.io/service-proxy-name": "other"}
    server.put("Service", api.service("shop/foreign", labels=label))
    server.put("Service", api.service("shop/headless", "None"))
    server.put("Node", api.node("node2", "192.168.0.12"))
    with watching(server) as seen:
        seen.serves("shop/web")
        server.put("Service", api.service("shop/web", labels=label))
        seen.serves()
        server.put("Service", api.service("shop/web"), api.service("shop/foreign"))
        seen.serves("shop/web", "shop/foreign")
        server.put("Service", api.service("shop/web", "None"))
        seen.serves("shop/foreign")
        server.put("Node", api.node("node2", "192.168.0.99"))
        headless = {"kubernetes.io/service-name": "web", "service.kubernetes.io/headless": ""}
        server.put("EndpointSlice", api.endpoint_slice("shop/web-a", "10.1.1.1", labels=headless))
        seen.reaches()
        assert seen.becomes(bool).node.addresses == ("192.168.0.11",)


def test_proxy_of_a_name_serves_what_carries_it(server: MockApiServer) -> None:
    """W1 the other way: beside kube-proxy, for chosen Services."""
    mine = {"service.kubernetes.io/service-proxy-name": "ebpf-svc"}
    server.put("Service", api.service("shop/mine", labels=mine))
    with watching(server, service_proxy_name="ebpf-svc") as seen:
        seen.serves("shop/mine")
        server.put("Service", api.service("shop/web", labels=mine))
        seen.serves("shop/mine", "shop/web")


def test_events_reach_the_store(server: MockApiServer, streaming_lists: bool) -> None:
    """M5, M6: added, modified, deleted; slices of a Service are merged."""
    with watching(server, streaming_lists=streaming_lists) as seen:
        seen.serves("shop/web")
        server.put("Service", api.service("shop/api", "10.96.0.11"))
        server.put("EndpointSlice", api.endpoint_slice("shop/web-b", "10.244.3.1"))
        seen.serves("shop/web", "shop/api")
        seen.reaches("10.244.2.1", "10.244.3.1")
        server.put("EndpointSlice", api.endpoint_slice("shop/web-a", "10.244.2.2"))
        seen.reaches("10.244.2.2", "10.244.3.1")
        server.delete("EndpointSlice", "shop", "web-a")
        server.delete("Service", "shop", "web")
        seen.reaches("10.244.3.1")
        seen.serves("shop/api")


def test_both_families_go_their_ways(server: MockApiServer) -> None:
    """M2: slices by address type; FQDN is reported and serves nobody."""
    server.put("EndpointSlice", api.endpoint_slice("shop/web-6", "fd00:244::1"))
    server.put("EndpointSlice", api.endpoint_slice("shop/web-n", addressType="FQDN"))
    with watching(server) as seen:
        seen.reaches("10.244.2.1", "fd00:244::1")
        eventually(lambda: seen.problems)
        assert seen.problems == [
            'EndpointSlice shop/web-n: addressType: Unsupported value: "FQDN":'
            ' supported values: "IPv4", "IPv6"'
        ]


def test_update_that_changes_nothing_wakes_nobody(server: MockApiServer) -> None:
    """M5, M6: new resource versions and labels are no change."""
    with watching(server) as seen:
        before = seen.becomes(bool)
        wait_out(0.1)
        seen.store.changed.clear()
        server.put("Service", api.service("shop/web", labels={"new": "label"}))
        server.put("EndpointSlice", api.endpoint_slice("shop/web-a", "10.244.2.1"))
        eventually(lambda: seen.source.progress["EndpointSlice"].events)
        eventually(lambda: seen.source.progress["Service"].events)
        assert not seen.store.changed.is_set()
        assert seen.now is before


def test_list_of_many_pages_is_whole(server: MockApiServer) -> None:
    """W1: every page is asked for with the token of the one before, and none is lost."""
    server.put("Service", *(api.service(f"many/s{i}", f"10.97.0.{i}") for i in range(25)))
    with watching(server, streaming_lists=False, page_size=10) as seen:
        seen.serves("shop/web", *(f"many/s{i}" for i in range(25)))
    lists = [r.query for r in server.requests if "services" in r.path and "watch" not in r.query]
    assert [(q["limit"], "continue" in q) for q in lists] == [
        ("10", False),
        ("10", True),
        ("10", True),
    ]


def test_bookmark_moves_the_version_watched_from(server: MockApiServer) -> None:
    """7.15: after a quiet hour a broken watch resumes; it does not list."""
    with watching(server) as seen:
        seen.serves("shop/web")
        eventually(lambda: server.watchers("Service"))
        server.bookmark()
        wait_out(0.1)
        server.requests.clear()
        server.kill_connections()
        resumed = eventually(lambda: [r for r in server.requests if "services" in r.path])
        assert [r.query.get("resourceVersion") for r in resumed] == [str(server.version)]
        assert seen.source.progress["Service"].lists == 1


def test_initial_stream_goes_to_the_store_at_its_end(server: MockApiServer) -> None:
    """M4: half a stream is nothing; the bookmark that ends it makes it count."""
    server.piece_bytes, server.piece_pause_s = 200, 0.005
    server.put("Service", *(api.service(f"many/s{i}", f"10.97.0.{i}") for i in range(20)))
    with watching(server) as seen:
        whole = {"shop/web", *(f"many/s{i}" for i in range(20))}
        states = set()
        eventually(lambda: states.add(frozenset(seen.services)) or seen.services == whole)
        assert states <= {frozenset(), frozenset(whole)}


def test_server_without_streamed_lists_is_asked_for_pages(server: MockApiServer) -> None:
    """Servers before 1.34 refuse sendInitialEvents; nobody waits for it."""
    server.streams_lists = False
    with watching(server) as seen:
        seen.serves("shop/web", within_s=2)
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")


def test_node_without_address_is_waited_for(server: MockApiServer) -> None:
    """N3: the first plan waits for the node's addresses ..."""
    server.put("Node", {"metadata": {"name": "node1"}, "status": {}})
    with watching(server) as seen:
        eventually(lambda: seen.source.progress["EndpointSlice"].is_listed)
        wait_out(0.1)
        assert seen.now is None
        server.put("Node", api.node())
        seen.serves("shop/web")


@pytest.mark.parametrize("there", [True, False])
def test_node_that_stays_unknown_is_given_up(server: MockApiServer, there: bool) -> None:
    """N3: ... but not for ever; a Node that does not exist is no reason to serve nobody."""
    server.put("Node", {"metadata": {"name": "node1"}, "status": {}})
    if not there:
        server.delete("Node", "", "node1")
    with watching(server, node_wait_s=0.2) as seen:
        started_s = time.monotonic()
        seen.serves("shop/web")
        assert time.monotonic() - started_s >= 0.15


def test_node_that_changes_is_followed(server: MockApiServer) -> None:
    """N4-N6: a new zone and new addresses count; a deleted Node stays, but not eligible."""
    with watching(server) as seen:
        seen.becomes(lambda s: s.node.zone == "zone-a")
        server.put("Node", api.node("node1", "192.168.0.99", zone="zone-b"))
        seen.becomes(lambda s: s.node.zone == "zone-b")
        server.delete("Node", "", "node1")
        node = seen.becomes(lambda s: not s.node.eligible).node
        assert (node.addresses, node.zone) == (("192.168.0.99",), "zone-b")
        server.put("Node", api.node("node1"))
        seen.becomes(lambda s: s.node.eligible and s.node.zone == "zone-a")


def test_server_without_service_cidrs_is_served_all_the_same(server: MockApiServer) -> None:
    """W4: the API is from 1.33 on, and reading it may be forbidden."""
    server.faults.append(MockApiServer.Fault("servicecidrs", status=404, times=99))
    with watching(server) as seen:
        seen.serves("shop/web")
        eventually(lambda: seen.source.progress["ServiceCIDR"].is_listed)
        assert seen.becomes(bool).service_cidrs == ()


def test_stopping_is_prompt_and_leaves_the_store(server: MockApiServer) -> None:
    """Z2: whatever the threads wait for, they end; what was known stays."""
    with watching(server) as seen:
        seen.serves("shop/web")
        eventually(lambda: server.watchers("Service"))
        started_s = time.monotonic()
        seen.source.stop()
        assert time.monotonic() - started_s < 0.5
        assert seen.services == {"shop/web"}
    eventually(lambda: server.watchers("Service") == 0)
