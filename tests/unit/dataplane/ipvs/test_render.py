"""What one service port wants of the kernel."""

from __future__ import annotations

from typing import Any

import pytest

from ebpf_svc.dataplane.ipvs import sets
from ebpf_svc.dataplane.ipvs.render import Options, Share, health_entries, render
from ebpf_svc.host import kubeproxy
from ebpf_svc.host.ipset import Entry
from ebpf_svc.host.ipvs import HASH_PORT, PERSISTENT, Dest, ServerKey, Shape
from ebpf_svc.model.desired import Frontend, FrontendKind, HealthCheck, ServicePlan
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.model.service import ServiceName
from tests.lib.plans import make_backend, make_frontend, make_plan

OPTIONS = Options()
TCP, UDP, SCTP = 6, 17, 132


def entries(share: Share, short: str, family: Family = Family.V4) -> set[Entry]:
    """What a service port puts into one set."""
    return {entry for name, entry in share.entries if name == sets.name_of(short, family)}


def of(*frontends: Frontend, **options: Any) -> Share:
    return render(make_plan("web", *frontends, **options), OPTIONS)


def dests(share: Share) -> list[str]:
    (server,) = share.servers.values()
    return [dest.address for dest, weight in server.dests.items() if weight]


def test_names_are_those_kube_proxy_has() -> None:
    """V13: every set of kube-proxy's by its very name, cut to 31 characters; one is ours alone."""
    assert set(sets.SPECS) - set(kubeproxy.IPSETS) == {"KUBE-NO-ENDPOINTS", "KUBE-6-NO-ENDPOINTS"}
    assert set(kubeproxy.IPSETS) <= set(sets.SPECS)
    assert "KUBE-6-NODE-PORT-LOCAL-SCTP-HAS" in sets.SPECS
    assert max(map(len, sets.SPECS)) <= 31


def test_elements_fit_the_type_of_their_set() -> None:
    """Row 62: an element has what its set's type has place for, and its family's addresses."""
    plans = [
        make_plan(
            f"{protocol}-{address}",
            make_frontend(address, protocol=protocol),
            make_frontend(
                address, 81, protocol, kind=FrontendKind.LOAD_BALANCER,
                source_ranges=[f"{address}/{bits}", wide], masquerade_for=Sources.NODE,
            ),
            make_frontend(address, 82, protocol, kind=FrontendKind.EXTERNAL_IP),
            make_frontend(address, 83, protocol, kind=FrontendKind.NODE_PORT),
            backends=[backend],
        )
        for protocol in Protocol
        for address, bits, wide, backend in (
            ("10.96.0.1", 32, "10.0.0.0/8", "10.1.0.1"),
            ("fd00::1", 128, "fd00::/8", "fd00::2"),
        )
    ]  # fmt: skip
    places = {
        "hash:ip,port": {"address", "protocol", "port"},
        "hash:ip,port,ip": {"address", "protocol", "port", "other"},
        "hash:ip,port,net": {"address", "protocol", "port", "other"},
        "bitmap:port": {"port"},
        "hash:ip": {"address"},
    }
    seen = set()
    for plan in plans:
        for name, entry in render(plan, OPTIONS).entries:
            spec = sets.SPECS[name]
            seen.add(spec.type)
            assert {field for field in entry._fields if getattr(entry, field)} == places[spec.type]
            assert spec.family is plan.key.family
            assert ("/" in entry.other) == (spec.type == "hash:ip,port,net")
    assert seen == places.keys()


@pytest.mark.parametrize(
    ("local_for", "backends", "expected"),
    [
        (Sources.NONE, {"a": (True, False), "b": (False, True)}, ["10.1.0.1"]),
        (Sources.ALL, {"a": (True, False), "b": (False, True)}, ["10.1.0.2"]),
        (Sources.EXTERNAL, {"a": (True, False), "b": (True, True)}, ["10.1.0.2"]),
        (Sources.EXTERNAL, {"a": (True, False), "b": (True, False)}, ["10.1.0.1", "10.1.0.2"]),
        (Sources.ALL, {"a": (False, False), "b": (False, False)}, []),
    ],
)
def test_one_list_for_all_sources(
    local_for: Sources, backends: dict[str, tuple[bool, bool]], expected: list[str]
) -> None:
    """V8: the Local list where the policy says so; when it is empty, the Cluster list."""
    made = [
        make_backend(f"10.1.0.{number}", in_cluster=cluster, in_local=local)
        for number, (cluster, local) in enumerate(backends.values(), start=1)
    ]
    share = of(make_frontend(local_for=local_for), backends=made, has_endpoints=True)
    assert dests(share) == expected
    assert bool(entries(share, sets.NO_ENDPOINTS)) == (not expected)


def test_draining_endpoint_gets_no_new_flow() -> None:
    """C5: in neither list it is there with weight 0, so its UDP flows go on."""
    rests = make_backend("10.1.0.9", in_cluster=False)
    (server,) = of(make_frontend(protocol="UDP"), backends=["10.1.0.1", rests]).servers.values()
    assert server.dests == {Dest("10.1.0.1", 8080): 1, Dest("10.1.0.9", 8080): 0}
    (server,) = of(backends=["10.1.0.1", rests]).servers.values()
    assert server.dests == {Dest("10.1.0.1", 8080): 1}


def test_loopback_is_left_out() -> None:
    """V7: node ports never answer on 127.0.0.1."""
    loopback = make_frontend("127.0.0.1", 30080, kind=FrontendKind.NODE_PORT)
    share = of(loopback)
    assert (share.servers, list(share.addresses), list(share.entries)) == ({}, [], [])


def test_node_ports_are_ports_but_for_sctp() -> None:
    """Row 61: SCTP's need the address as well; with policy Local they are in both sets."""
    elements = {"TCP": Entry(port=30080), "SCTP": Entry("192.0.2.1", SCTP, 30080)}
    for protocol, element in elements.items():
        for masquerade, is_local in ((Sources.ALL, False), (Sources.NODE, True)):
            share = of(
                make_frontend(
                    "192.0.2.1", 30080, protocol, kind=FrontendKind.NODE_PORT,
                    masquerade_for=masquerade,
                )
            )  # fmt: skip
            word = Protocol(protocol)
            assert entries(share, sets.NODE_PORT[word]) == {element}
            assert entries(share, sets.NODE_PORT_LOCAL[word]) == ({element} if is_local else set())
            assert list(share.addresses) == []


def test_policy_decides_the_set_of_external_frontends() -> None:
    """V13: external IPs are in one of two sets; VIPs in the first, by policy in both."""
    for kind, cluster, local, both in (
        (FrontendKind.EXTERNAL_IP, sets.EXTERNAL_IP, sets.EXTERNAL_IP_LOCAL, False),
        (FrontendKind.LOAD_BALANCER, sets.LOAD_BALANCER, sets.LOAD_BALANCER_LOCAL, True),
    ):
        for masquerade, is_local in ((Sources.ALL, False), (Sources.NODE, True)):
            share = of(make_frontend("198.51.100.1", kind=kind, masquerade_for=masquerade))
            assert bool(entries(share, cluster)) == (both or not is_local)
            assert bool(entries(share, local)) == is_local


def test_ranges_and_the_address_itself_are_in_sets_of_their_own() -> None:
    """P10, V13: prefixes in one, the VIP as its own source in another."""
    share = of(
        make_frontend(
            "198.51.100.1", kind=FrontendKind.LOAD_BALANCER, masquerade_for=Sources.ALL,
            source_ranges=["198.51.100.1/32", "203.0.113.0/24"],
        )
    )  # fmt: skip
    here = ("198.51.100.1", TCP, 80)
    assert entries(share, sets.LOAD_BALANCER_FW) == {Entry(*here)}
    assert entries(share, sets.SOURCE_CIDR) == {Entry(*here, "203.0.113.0/24")}
    assert entries(share, sets.SOURCE_IP) == {Entry(*here, "198.51.100.1")}


def test_every_endpoint_may_reach_itself() -> None:
    """V10: address, port, and the address again; those that are not ready as well."""
    share = of(backends=["10.1.0.1", make_backend("10.1.0.9", in_cluster=False)])
    assert entries(share, sets.LOOP_BACK) == {
        Entry("10.1.0.1", TCP, 8080, "10.1.0.1"),
        Entry("10.1.0.9", TCP, 8080, "10.1.0.9"),
    }


@pytest.mark.parametrize(
    ("scheduler", "affinity_s", "shape"),
    [
        ("rr", 0, Shape("rr")),
        ("rr", 600, Shape("rr", PERSISTENT, 600)),
        ("mh", 0, Shape("mh", HASH_PORT)),
        ("mh", 600, Shape("mh", HASH_PORT | PERSISTENT, 600)),
    ],
)
def test_scheduler_and_persistence(scheduler: str, affinity_s: int, shape: Shape) -> None:
    """V5, V6: mh takes the port into account; affinity is persistence."""
    plan: ServicePlan = make_plan(affinity_s=affinity_s)
    share = render(plan, Options(scheduler))
    assert share.servers[ServerKey("10.96.0.1", 80, Protocol.TCP)].shape == shape


def test_ports_of_health_checks() -> None:
    """H2: each family has its own set."""
    checks = [HealthCheck(ServiceName("default", "web"), family, 32000, (), 0) for family in Family]
    assert health_entries(checks) == {
        ("KUBE-HEALTH-CHECK-NODE-PORT", Entry(port=32000)),
        ("KUBE-6-HEALTH-CHECK-NODE-PORT", Entry(port=32000)),
    }
