"""Where a service port can be called and how each class of clients is treated there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ebpf_svc.model.desired import DesiredState, Frontend, FrontendKind
from ebpf_svc.model.net import Family, Sources
from ebpf_svc.model.service import Service, ServiceType
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from tests.lib.builders import (
    CLUSTER,
    LOCAL,
    NODE,
    make_endpoint_port,
    make_endpoints,
    make_port,
    make_service,
    make_snapshot,
    ready,
)
from tests.lib.plantext import cell

BOTH = frozenset(Family)
V4_ONLY = PlanOptions(families=(Family.V4,))


def plan(*objects, options: PlanOptions = V4_ONLY, node=NODE) -> DesiredState:
    return Planner(options).plan(make_snapshot(*objects, node=node))


def keys(state: DesiredState) -> list[str]:
    return [str(key) for key in sorted(state.view())]


def frontend(state: DesiredState, kind: FrontendKind) -> Frontend:
    return next(view.frontend for view in state.view().values() if view.frontend.kind is kind)


# -- the matrix of rules P1-P8 ---------------------------------------------------------------------

MATRIX = """
from      to         both   eTP    iTP
pod       clusterIP  C      C      L
pod       nodePort   C m    C      C m
pod       vip        C m    C      C m
node      clusterIP  C m    C m    L m
node      nodePort   C m    C m    C m
node      vip        C m    C m    C m
external  clusterIP  C m    C m    L m
external  nodePort   C m    L      C m
external  vip        C m    L      C m
"""
NO_DETECTOR = """
from      to         both   eTP    iTP
pod       clusterIP  C      C      L
pod       nodePort   C m    L      C m
pod       vip        C m    L      C m
node      clusterIP  C      C      L
node      nodePort   C m    C m    C m
node      vip        C m    C m    C m
external  clusterIP  C      C      L
external  nodePort   C m    L      C m
external  vip        C m    L      C m
"""
MASQUERADE_ALL = MATRIX.replace(
    "pod       clusterIP  C      C      L", "pod       clusterIP  C m    C m    L m"
)
NEITHER_BUT_ALL = """
from      to         both   eTP    iTP
pod       clusterIP  C m    C m    L m
pod       nodePort   C m    L      C m
pod       vip        C m    L      C m
node      clusterIP  C m    C m    L m
node      nodePort   C m    C m    C m
node      vip        C m    C m    C m
external  clusterIP  C m    C m    L m
external  nodePort   C m    L      C m
external  vip        C m    L      C m
"""
TABLES = {
    "detector": (MATRIX, PlanOptions(local_detector=BOTH)),
    "no detector": (NO_DETECTOR, PlanOptions()),
    "masqueradeAll": (MASQUERADE_ALL, PlanOptions(local_detector=BOTH, masquerade_all=True)),
    "no detector, masqueradeAll": (NEITHER_BUT_ALL, PlanOptions(masquerade_all=True)),
}
POLICIES = {
    "both": {},
    "eTP": {"external_policy": LOCAL},
    "iTP": {"internal_policy": LOCAL},
}
KINDS = {
    "clusterIP": (FrontendKind.CLUSTER_IP,),
    "nodePort": (FrontendKind.NODE_PORT,),
    "vip": (FrontendKind.LOAD_BALANCER, FrontendKind.EXTERNAL_IP),
}


def rows(table: str):
    for line in table.strip().splitlines()[1:]:
        cells = [line[21:28], line[28:35], line[35:]]
        source, kind = line[:10].strip(), line[10:21].strip()
        for policy, text in zip(POLICIES, cells, strict=True):
            yield source, kind, policy, text.strip()


@pytest.mark.parametrize(
    ("setting", "source", "kind", "policy", "expected"),
    [(setting, *row) for setting, (table, _) in TABLES.items() for row in rows(table)],
)
@pytest.mark.parametrize("family", Family)
def test_matrix(*, setting, source, kind, policy, expected, family):
    """Every class of clients gets the list and the source address of rules P1, P5-P8, D2, D3.

    Digest row 3 (TestInternalExternalMasquerade), row 1 and 2.
    """
    state = plan(
        make_service(
            "web",
            make_port(80, node_port=30080),
            cluster_ip=["10.96.0.10", "fd00:10:96::10"],
            load_balancer_ips=["203.0.113.1", "2001:db8::1"],
            external_ips=["203.0.113.2", "2001:db8::2"],
            **POLICIES[policy],
        ),
        options=replace(TABLES[setting][1], families=(family,)),
    )
    found = {
        cell(view.frontend, Sources[source.upper()])
        for view in state.view().values()
        if view.frontend.kind in KINDS[kind]
    }

    assert found == {expected}


def test_detector_of_one_family_leaves_the_other_without():
    """Cluster prefixes of IPv4 alone tell nothing about IPv6 clients (D1, D2)."""
    state = plan(
        make_service("web", cluster_ip=["10.96.0.10", "fd00:10:96::10"]),
        options=PlanOptions(local_detector=frozenset({Family.V4})),
    )
    cells = {str(key): cell(view.frontend, Sources.EXTERNAL) for key, view in state.view().items()}

    assert cells == {"10.96.0.10:80/TCP": "C m", "[fd00:10:96::10]:80/TCP": "C"}


@pytest.mark.parametrize(
    ("type", "external_ips", "counts"),
    [
        (ServiceType.LOAD_BALANCER, [], True),
        (ServiceType.NODE_PORT, [], True),
        (ServiceType.CLUSTER_IP, ["203.0.113.2"], True),
        (ServiceType.CLUSTER_IP, [], False),
    ],
)
def test_external_policy_counts_only_where_the_api_means_it(type, external_ips, counts):
    """ExternalTrafficPolicy Local on a plain ClusterIP service is ignored (F14, digest row 31)."""
    state = plan(
        make_service(
            "web",
            make_port(80, node_port=30080),
            type=type,
            external_ips=external_ips,
            external_policy=LOCAL,
        ),
        options=replace(V4_ONLY, local_detector=BOTH),
    )

    node_port = frontend(state, FrontendKind.NODE_PORT)
    assert cell(node_port, Sources.EXTERNAL) == ("L" if counts else "C m")


# -- which frontends there are ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "service",
    [
        make_service("web", cluster_ip=[]),
        make_service("web", type=ServiceType.EXTERNAL_NAME),
        make_service("web", make_port(80, node_port=30080), cluster_ip="fd00:10:96::10"),
    ],
    ids=["headless", "ExternalName", "other family"],
)
def test_service_that_has_no_cluster_ip_here_gets_nothing(service):
    """Headless and ExternalName services are DNS alone; a missing family is ignored wholly.

    Rules F1-F4, F19; digest rows 15 and 18.
    """
    loaded = replace(service, load_balancer_ips=("203.0.113.1",), external_ips=("203.0.113.2",))

    assert plan(loaded).plans == {}


def test_every_address_of_a_family_is_a_frontend():
    """Several VIPs and external IPs: one entry each, whatever the type (F7-F9, digest row 15)."""
    service = make_service(
        "web",
        make_port(80, node_port=30080),
        type=ServiceType.CLUSTER_IP,
        cluster_ip=["10.96.0.10", "fd00:10:96::10"],
        load_balancer_ips=["203.0.113.1", "203.0.113.2", "2001:db8::1"],
        external_ips=["203.0.113.3", "203.0.113.4", "2001:db8::3"],
    )

    assert keys(plan(service)) == [
        "10.96.0.10:80/TCP",
        "127.0.0.1:30080/TCP",
        "192.168.0.11:30080/TCP",
        "203.0.113.1:80/TCP",
        "203.0.113.2:80/TCP",
        "203.0.113.3:80/TCP",
        "203.0.113.4:80/TCP",
    ]


def test_each_family_gets_its_own_plan():
    """A dual-stack service is two independent plans (M2, F3)."""
    service = make_service("web", cluster_ip=["fd00:10:96::10", "10.96.0.10"])
    state = plan(service, options=PlanOptions())

    assert {key.family: keys(DesiredState({key: item})) for key, item in state.plans.items()} == {
        Family.V4: ["10.96.0.10:80/TCP"],
        Family.V6: ["[fd00:10:96::10]:80/TCP"],
    }


def test_protocols_on_one_port_are_apart():
    """TCP, UDP and SCTP may share address and port, each with its own targets (F5, digest 5, 6)."""
    service = make_service(
        "dns",
        make_port(53, "tcp"),
        make_port(53, "udp", protocol="UDP"),
        make_port(53, "sctp", protocol="SCTP"),
    )
    targets = make_endpoints(
        "dns",
        ready("10.1.0.1"),
        ports=[
            make_endpoint_port(1053, "tcp"),
            make_endpoint_port(2053, "udp", protocol="UDP"),
            make_endpoint_port(3053, "sctp", protocol="SCTP"),
        ],
    )
    found = {
        str(key): [backend.port for backend in view.backends]
        for key, view in plan(service, targets).view().items()
    }

    assert found == {
        "10.96.0.10:53/TCP": [1053],
        "10.96.0.10:53/UDP": [2053],
        "10.96.0.10:53/SCTP": [3053],
    }


def test_external_ips_can_be_forbidden_but_still_count():
    """Without permission an external IP is no frontend, yet keeps the Cluster list (F8, F21)."""
    state = plan(
        make_service("web", external_ips=["203.0.113.2"], internal_policy=LOCAL),
        make_endpoints("web", ready("10.1.0.1", on="node2")),
        options=replace(V4_ONLY, external_ip_ranges=()),
    )

    assert keys(state) == ["10.96.0.10:80/TCP"]
    assert [item.in_cluster for view in state.view().values() for item in view.backends] == [True]


def test_external_ips_outside_the_list_are_no_frontends():
    """Each family by its own prefixes; a family without any has none (F8)."""
    service = make_service(
        "web",
        cluster_ip=["10.96.0.10", "fd00:10:96::10"],
        external_ips=["203.0.113.2", "198.51.100.2", "2001:db8::2"],
        load_balancer_ips=["198.51.100.3"],
    )
    listed = {
        ("203.0.113.0/24", "192.0.2.0/24"): ["203.0.113.2"],
        ("2001:db8::/32",): ["2001:db8::2"],
        ("203.0.113.2/32", "198.51.0.0/16", "2001:db8::2/128"): list(service.external_ips),
    }

    for ranges, served in listed.items():
        views = plan(service, options=PlanOptions(external_ip_ranges=ranges)).view().values()
        found = {view.frontend.key.address for view in views}
        assert found == {"10.96.0.10", "fd00:10:96::10", "198.51.100.3", *served}


def test_address_that_is_vip_and_external_ip_keeps_its_source_ranges():
    """Naming a VIP among the external IPs does not open it (P10)."""
    state = plan(
        make_service(
            "web",
            load_balancer_ips=["203.0.113.1"],
            external_ips=["203.0.113.1"],
            source_ranges=["198.51.100.0/24"],
        )
    )

    assert frontend(state, FrontendKind.LOAD_BALANCER).source_ranges == ("198.51.100.0/24",)
    assert len(state.view()) == 2


def test_affinity_is_carried():
    """Seconds of ClientIP affinity reach every frontend of the service port (F12, P13)."""
    state = plan(make_service("web", make_port(80, node_port=30080), affinity_s=10800))

    assert {view.affinity_s for view in state.view().values()} == {10800}


# -- source ranges ---------------------------------------------------------------------------------


def ranges(*texts: str, vips=("203.0.113.1",), **more) -> tuple[str, ...] | None:
    service = make_service("web", load_balancer_ips=vips, source_ranges=texts, **more)
    return frontend(plan(service), FrontendKind.LOAD_BALANCER).source_ranges


def test_source_ranges_filter_vips_alone():
    """NodePorts, external IPs and the cluster IP stay open (F10, P10, digest row 11)."""
    state = plan(
        make_service(
            "web",
            make_port(80, node_port=30080),
            load_balancer_ips=["203.0.113.1"],
            external_ips=["203.0.113.2"],
            source_ranges=["198.51.100.0/24"],
        )
    )
    filtered = {view.frontend.kind: view.frontend.source_ranges for view in state.view().values()}

    assert filtered == {
        FrontendKind.CLUSTER_IP: None,
        FrontendKind.NODE_PORT: None,
        FrontendKind.EXTERNAL_IP: None,
        FrontendKind.LOAD_BALANCER: ("198.51.100.0/24",),
    }


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), None),
        (("198.51.100.0/24", "0.0.0.0/0"), None),
        (("2001:db8::/32",), None),
        (("198.51.100.0/24", "2001:db8::/32"), ("198.51.100.0/24",)),
        (("198.51.100.0/24", "::/0"), ("198.51.100.0/24",)),
        ((" 198.051.100.0/24 ",), ("198.51.100.0/24",)),
        (("198.51.100.0/24", "198.51.100.0/24"), ("198.51.100.0/24",)),
    ],
)
def test_source_ranges_of_this_family_count(texts, expected):
    """A zero prefix means no filter, and so does a list for the other family alone.

    Rules F10, F11, F17; digest rows 13 and 14.
    """
    assert ranges(*texts) == expected


def test_vips_may_connect_where_the_node_may():
    """With the node's IP in a range all VIPs of the family are in (P10, N1, digest row 12)."""
    assert ranges("192.168.0.0/24", vips=["203.0.113.1", "203.0.113.2", "2001:db8::1"]) == (
        "192.168.0.0/24",
        "203.0.113.1/32",
        "203.0.113.2/32",
    )


def test_vips_may_not_connect_where_only_another_address_of_the_node_may():
    """Only the node's first address of the family decides the self-allow (N1)."""
    node = replace(NODE, addresses=("192.168.0.11", "172.16.0.1"))
    service = make_service(
        "web", load_balancer_ips=["203.0.113.1"], source_ranges=["172.16.0.0/16"]
    )

    vip = frontend(plan(service, node=node), FrontendKind.LOAD_BALANCER)
    assert vip.source_ranges == ("172.16.0.0/16",)


# -- node ports ------------------------------------------------------------------------------------

LOOPBACKS = ["127.0.0.1", "::1"]
ALL = ["127.0.0.1", "172.16.0.1", "192.168.0.11", "::1", "fd00:172::1", "fd00:192::11"]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ((), ALL),
        (("all",), ALL),
        (("0.0.0.0/0", "::/0"), ALL),
        (("0.0.0.0/0", "172.16.0.0/16", "::/0"), ALL),
        (("localhost",), LOOPBACKS),
        (("127.0.0.0/8", "::1/128"), LOOPBACKS),
        (("primary",), ["192.168.0.11", "fd00:192::11"]),
        (("primary", "localhost"), ["127.0.0.1", "192.168.0.11", "::1", "fd00:192::11"]),
        (("172.16.0.0/16", "fd00:172::/64"), ["172.16.0.1", "fd00:172::1"]),
        (("172.16.0.0/16",), ["172.16.0.1", "::1", "fd00:172::1", "fd00:192::11"]),
        (("fd00:172::/64",), ["127.0.0.1", "172.16.0.1", "192.168.0.11", "fd00:172::1"]),
        (("10.0.0.0/8", "fd00:172::/64"), ["fd00:172::1"]),
    ],
)
def test_node_ports_answer_on_selected_addresses(selection, expected):
    """Prefixes and words select among the node's addresses, each family for itself.

    Rules P15, A1-A5, Q3; digest rows 19, 21 and 22. IPv6 link-local addresses and other loopback
    ones are never selected.
    """
    node = replace(
        NODE,
        local_addresses=(
            *NODE.local_addresses,
            *("127.0.0.53", "172.16.0.1", "fd00:172::1"),
        ),
    )
    service = make_service(
        "web", make_port(80, node_port=30080), cluster_ip=["10.96.0.10", "fd00:10:96::10"]
    )
    state = plan(service, node=node, options=PlanOptions(node_port_addresses=selection))

    found = [key.address for key in sorted(state.view()) if key.port == 30080]
    assert found == sorted(expected)


@pytest.mark.parametrize("selection", [(), ("localhost", "192.168.0.0/16"), ("127.0.0.0/8",)])
def test_node_ports_stay_off_loopback_when_told(selection):
    """localhostNodePorts: false closes loopback, whatever selects it (S7)."""
    state = plan(
        make_service("web", make_port(80, node_port=30080)),
        options=replace(V4_ONLY, node_port_addresses=selection, localhost_node_ports=False),
    )

    assert "127.0.0.1:30080/TCP" not in keys(state)
    assert len(keys(state)) == 1 + (selection != ("127.0.0.0/8",))


def test_primary_without_a_node_ip_is_open():
    """`primary` on a node whose IP is unknown restricts nothing (A2, A5)."""
    service = make_service("web", make_port(80, node_port=30080))
    state = plan(
        service,
        node=replace(NODE, addresses=()),
        options=replace(V4_ONLY, node_port_addresses=("primary",)),
    )

    assert "192.168.0.11:30080/TCP" in keys(state)


def test_node_ip_that_is_no_local_address_gets_no_node_port():
    """An address that a cloud translates to the node's is not one of the node's (P15)."""
    node = replace(NODE, addresses=("198.51.100.7",))
    state = plan(make_service("web", make_port(80, node_port=30080)), node=node)

    assert "198.51.100.7:30080/TCP" not in keys(state)


def test_node_port_repeats_with_another_protocol():
    """The same number may serve TCP and UDP (F5)."""
    service = make_service(
        "dns",
        make_port(53, "tcp", node_port=30053),
        make_port(53, "udp", node_port=30053, protocol="UDP"),
    )

    assert {"192.168.0.11:30053/TCP", "192.168.0.11:30053/UDP"} <= set(keys(plan(service)))


# -- no endpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [CLUSTER, LOCAL])
def test_without_any_endpoint_every_frontend_refuses(policy):
    """A service nobody answers is refused from everywhere, Local policies or not.

    Rules P2, T6; digest row 7.
    """
    state = plan(
        make_service(
            "web",
            make_port(80, node_port=30080),
            load_balancer_ips=["203.0.113.1"],
            external_ips=["203.0.113.2"],
            internal_policy=policy,
            external_policy=policy,
        )
    )

    assert [view.has_endpoints for view in state.view().values()] == [False] * 5


def test_internal_policy_local_drops_then_refuses():
    """Endpoints only elsewhere: drop; none at all: refuse (P2, P3, digest rows 8 and 32)."""
    service: Service = make_service("web", internal_policy=LOCAL)
    planner = Planner(V4_ONLY)
    remote = planner.plan(make_snapshot(service, make_endpoints("web", ready("10.1.0.1"))))
    gone = planner.plan(make_snapshot(service))

    def verdicts(state):
        return [
            (view.has_endpoints, [item.in_local for item in view.backends])
            for view in state.view().values()
        ]

    assert verdicts(remote) == [(True, [False])]
    assert verdicts(gone) == [(False, [])]
