"""EndpointSlices and Endpoints written by hand."""

from __future__ import annotations

import pytest

from ebpf_svc.model.endpoint import Endpoint, EndpointPort, EndpointSlice
from ebpf_svc.model.net import Family, Protocol
from tests.unit.watch.cluster import apply, named, service, told

LABEL = "kubernetes.io/service-name: web"


def slice_text(
    body: str, *, labels: str = LABEL, name: str = "web-1", family: str = "IPv4", extra: str = ""
) -> str:
    meta = f"{{name: {name}, labels: {{{labels}}}{extra}}}"
    head = "apiVersion: discovery.k8s.io/v1, kind: EndpointSlice"
    return f"{{{head}, metadata: {meta}, addressType: {family}, {body}}}\n"


def only_slice(*texts: str) -> EndpointSlice:
    state = apply(*texts)
    assert state.problems == ()
    ((found,),) = state.slices.values()
    return found


def test_a_slice_is_taken_over_with_the_defaults_of_its_conditions() -> None:
    """Rules E1, E5, E6: ready and serving unless denied, terminating only if said."""
    found = only_slice(
        slice_text(
            "ports: [{name: http, port: 8080}, {name: dns, port: 53, protocol: UDP}], endpoints: ["
            "{addresses: [10.0.0.1]},"
            "{addresses: [10.0.0.2], conditions: {ready: false}, nodeName: node1},"
            "{addresses: [10.0.0.3], conditions: {ready: false, serving: false, terminating: true}}"
            "]"
        )
    )
    assert found == EndpointSlice(
        namespace="default",
        name="web-1",
        service_name=named("web"),
        family=Family.V4,
        ports=(EndpointPort("http", Protocol.TCP, 8080), EndpointPort("dns", Protocol.UDP, 53)),
        endpoints=(
            Endpoint("10.0.0.1"),
            Endpoint("10.0.0.2", ready=False, serving=True, node_name="node1"),
            Endpoint("10.0.0.3", ready=False, serving=False, terminating=True),
        ),
    )


def test_only_the_first_address_is_used() -> None:
    """Rule E4, in canonical form."""
    found = only_slice(slice_text("endpoints: [{addresses: [010.0.0.01, 10.0.0.2]}]"))
    assert [endpoint.address for endpoint in found.endpoints] == ["10.0.0.1"]


def test_a_port_without_number_is_skipped() -> None:
    """Rule E3; a port without a name is the unnamed one."""
    found = only_slice(slice_text("ports: [{name: a}, {port: 80}], endpoints: []"))
    assert found.ports == (EndpointPort("", Protocol.TCP, 80),)


def test_hints_become_sets() -> None:
    """Rule E7: an empty list is no hint."""
    found = only_slice(
        slice_text(
            "endpoints: [{addresses: [10.0.0.1], hints: {forZones: [{name: a}, {name: b}],"
            " forNodes: [{name: node1}]}}, {addresses: [10.0.0.2], hints: {forZones: []}}]"
        )
    )
    assert found.endpoints[0].zone_hints == {"a", "b"}
    assert found.endpoints[0].node_hints == {"node1"}
    assert found.endpoints[1].zone_hints == found.endpoints[1].node_hints == frozenset()


def test_the_trigger_time_is_read() -> None:
    """Rule E10: RFC 3339 with nanoseconds."""
    note = "endpoints.kubernetes.io/last-change-trigger-time"
    text = slice_text(
        "endpoints: []", extra=f", annotations: {{{note}: 2026-01-02T03:04:05.123456789Z}}"
    )
    assert only_slice(text).trigger_time_s == pytest.approx(1767323045.123456)


@pytest.mark.parametrize(
    ("labels", "family"),
    [
        ("", "IPv4"),
        (f"{LABEL}, service.kubernetes.io/headless: ''", "IPv4"),
        (LABEL, "FQDN"),
    ],
)
def test_slices_nobody_would_look_at_are_ignored(labels: str, family: str) -> None:
    """Rules E1, M2, W2: no service, a headless one, host names. No fault of theirs either."""
    state = apply(slice_text("endpoints: [{addresses: [a.b]}]", labels=labels, family=family))
    assert (state.slices, state.problems) == ({}, ())


def test_slices_of_one_service_stand_together_sorted() -> None:
    """Rule E1: merged by the planner, whatever file they come from."""
    state = apply(
        slice_text("endpoints: []", name="b", family="IPv6"), slice_text("endpoints: []", name="a")
    )
    assert [each.name for each in state.slices[named("web")]] == ["a", "b"]


SPECIAL = "may not be in the loopback range (127.0.0.0/8, ::1/128)"
CASES = [
    (
        "endpoints: [{addresses: []}]",
        "endpoints[0].addresses",
        "Required value: must contain at least 1 endpoint address",
    ),
    (
        "endpoints: [{addresses: [10.0.0.1]}, {addresses: [x]}]",
        "endpoints[1].addresses[0]",
        'Invalid value: "x": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)',
    ),
    (
        "endpoints: [{addresses: ['fd00::1']}]",
        "endpoints[0].addresses[0]",
        'Invalid value: "fd00::1": must be an IPv4 address',
    ),
    (
        "endpoints: [{addresses: [127.0.0.1]}]",
        "endpoints[0].addresses[0]",
        f'Invalid value: "127.0.0.1": {SPECIAL}',
    ),
    ("ports: [{port: 1}, {port: 2}]", "ports[1].name", 'Duplicate value: ""'),
    (
        "ports: [{port: 70000}]",
        "ports[0].port",
        "Invalid value: 70000: must be between 1 and 65535, inclusive",
    ),
    (
        "ports: [{port: 1, protocol: ICMP}]",
        "ports[0].protocol",
        'Unsupported value: "ICMP": supported values: "SCTP", "TCP", "UDP"',
    ),
    (
        "endpoints: [{addresses: [10.0.0.1], conditions: {ready: maybe}}]",
        "endpoints[0].conditions.ready",
        'Invalid value: "maybe": must be a boolean',
    ),
    (
        f"endpoints: [{', '.join(['{addresses: [10.0.0.1]}'] * 1001)}]",
        "endpoints",
        "Too many: 1001: must have at most 1000 items",
    ),
]


@pytest.mark.parametrize(("body", "field", "message"), CASES)
def test_a_wrong_slice_is_refused_and_left_out(body: str, field: str, message: str) -> None:
    state = apply(slice_text(body), service("web"))
    assert told(state.problems)[-1:] == [(field, message)]
    assert state.slices == {}
    assert list(state.services) == [named("web")]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ('""', "Required value"),
        ("IPv5", 'Unsupported value: "IPv5": supported values: "FQDN", "IPv4", "IPv6"'),
    ],
)
def test_the_address_type_must_be_known(family: str, message: str) -> None:
    """Rule E2."""
    state = apply(slice_text("endpoints: []", family=family))
    assert told(state.problems) == [("addressType", message)]


ENDPOINTS = """
apiVersion: v1
kind: Endpoints
metadata: {name: web}
subsets:
- addresses: [{ip: 10.0.0.1, nodeName: node1}, {ip: "fd00::1"}]
  notReadyAddresses: [{ip: 10.0.0.2}, {ip: 10.0.0.1}]
  ports: [{name: http, port: 8080}]
"""


def test_endpoints_of_a_service_without_selector_are_mirrored() -> None:
    """One slice a family; those not ready are there, and serving by rule E5."""
    state = apply(ENDPOINTS, service("web"))
    assert state.problems == ()
    four, six = state.slices[named("web")]
    assert (four.family, six.family) == (Family.V4, Family.V6)
    assert four.ports == six.ports == (EndpointPort("http", Protocol.TCP, 8080),)
    assert four.endpoints == (
        Endpoint("10.0.0.1", node_name="node1"),
        Endpoint("10.0.0.2", ready=False),
    )
    assert six.endpoints == (Endpoint("fd00::1"),)


@pytest.mark.parametrize(
    "spec", [{"selector": {"app": "web"}}, {"clusterIP": "None"}, None], ids=str
)
def test_endpoints_of_other_services_are_not_mirrored(spec: dict[str, object] | None) -> None:
    """Selectors make their own, headless services show none, and without Service there is none."""
    texts = [ENDPOINTS] if spec is None else [ENDPOINTS, service("web", **spec)]
    assert apply(*texts).slices == {}


def test_endpoints_may_ask_not_to_be_mirrored() -> None:
    label = "labels: {endpointslice.kubernetes.io/skip-mirror: 'true'}"
    text = ENDPOINTS.replace("{name: web}", f"{{name: web, {label}}}")
    assert apply(text, service("web")).slices == {}


@pytest.mark.parametrize(
    ("subset", "field", "message"),
    [
        (
            "{ports: [{port: 1}]}",
            "subsets[0]",
            "Required value: must specify `addresses` or `notReadyAddresses`",
        ),
        (
            "{addresses: [{ip: 127.0.0.1}], ports: [{port: 1}]}",
            "subsets[0].addresses[0].ip",
            f'Invalid value: "127.0.0.1": {SPECIAL}',
        ),
        (
            "{addresses: [{ip: 10.0.0.1}], ports: [{port: 1, name: a}, {port: 2}]}",
            "subsets[0].ports[1].name",
            "Required value",
        ),
    ],
)
def test_wrong_endpoints_are_refused(subset: str, field: str, message: str) -> None:
    text = f"{{apiVersion: v1, kind: Endpoints, metadata: {{name: web}}, subsets: [{subset}]}}"
    state = apply(text, service("web"))
    assert told(state.problems) == [(field, message)]
    assert state.slices == {}
