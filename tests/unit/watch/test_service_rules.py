"""What an API server would refuse in a Service, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.watch.cluster import Cluster, apply, named, service, told

LABEL = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must"
    " start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for"
    " validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
DNS_1035 = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an"
    " alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123',"
    " regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
)
SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.',"
    " and must start and end with an alphanumeric character (e.g. 'example.com', regex used for"
    r" validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
PORT = "must be between 1 and 65535, inclusive"
IP = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
CIDR = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
DUAL = "must be 'RequireDualStack' or 'PreferDualStack' when multiple"
ONLY_LB = "Forbidden: may only be used when `type` is 'LoadBalancer'"


def ports(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"ports": list(entries)}


HTTP = {"name": "http", "port": 80}
HTTPS = {"name": "https", "port": 443}
LB = {"type": "LoadBalancer"}
LOCAL = {"externalTrafficPolicy": "Local"}

CASES: list[tuple[dict[str, Any], str, str]] = [
    # ports
    ({"ports": []}, "spec.ports", "Required value"),
    (ports(HTTP, {"port": 443}), "spec.ports[1].name", "Required value"),
    (
        ports({"name": "Http", "port": 80}),
        "spec.ports[0].name",
        f'Invalid value: "Http": {LABEL}',
    ),
    (
        ports({"name": "web_1", "port": 80}),
        "spec.ports[0].name",
        f'Invalid value: "web_1": {LABEL}',
    ),
    (
        ports({"name": "n" * 64, "port": 80}),
        "spec.ports[0].name",
        f'Invalid value: "{"n" * 64}": must be no more than 63 characters',
    ),
    (ports(HTTP, {**HTTP, "port": 81}), "spec.ports[1].name", 'Duplicate value: "http"'),
    (
        ports(HTTP, {**HTTPS, "port": 80}),
        "spec.ports[1]",
        'Duplicate value: {"port":80,"protocol":"TCP"}',
    ),
    (ports({"port": 0}), "spec.ports[0].port", f"Invalid value: 0: {PORT}"),
    (ports({"port": 65536}), "spec.ports[0].port", f"Invalid value: 65536: {PORT}"),
    (
        ports({"port": 80, "targetPort": 70000}),
        "spec.ports[0].targetPort",
        f"Invalid value: 70000: {PORT}",
    ),
    (
        ports({"port": 80, "targetPort": "a-very-long-port"}),
        "spec.ports[0].targetPort",
        'Invalid value: "a-very-long-port": must be no more than 15 characters',
    ),
    (
        ports({"port": 80, "targetPort": "8080"}),
        "spec.ports[0].targetPort",
        'Invalid value: "8080": must contain at least one letter (a-z)',
    ),
    (
        ports({"port": 80, "targetPort": "a--b"}),
        "spec.ports[0].targetPort",
        'Invalid value: "a--b": must not contain consecutive hyphens',
    ),
    (
        ports({"port": 80, "targetPort": "-b"}),
        "spec.ports[0].targetPort",
        'Invalid value: "-b": must not begin or end with a hyphen',
    ),
    (
        ports({"port": 80, "targetPort": "Web"}),
        "spec.ports[0].targetPort",
        'Invalid value: "Web": must contain only alpha-numeric characters (a-z, 0-9), and hyphens'
        " (-)",
    ),
    (
        ports({"port": 80, "protocol": "tcp"}),
        "spec.ports[0].protocol",
        'Unsupported value: "tcp": supported values: "SCTP", "TCP", "UDP"',
    ),
    (
        ports({"port": "http"}),
        "spec.ports[0].port",
        'Invalid value: "http": must be an integer',
    ),
    (
        ports({"port": 80, "targetPort": 1.5}),
        "spec.ports[0].targetPort",
        "Invalid value: 1.5: must be an integer or a string",
    ),
    # node ports
    (
        ports({"port": 80, "nodePort": 30080}),
        "spec.ports[0].nodePort",
        "Forbidden: may not be used when `type` is 'ClusterIP'",
    ),
    (
        {
            "type": "NodePort",
            **ports({**HTTP, "nodePort": 30080}, {**HTTPS, "nodePort": 30080}),
        },
        "spec.ports[1].nodePort",
        "Duplicate value: 30080",
    ),
    (
        {"type": "NodePort", **ports({"port": 80, "nodePort": 80})},
        "spec.ports[0].nodePort",
        "Invalid value: 80: provided port is not in the valid range."
        " The range of valid ports is 30000-32767",
    ),
    # words
    (
        {"type": "Clusterip"},
        "spec.type",
        'Unsupported value: "Clusterip": supported values:'
        ' "ClusterIP", "ExternalName", "LoadBalancer", "NodePort"',
    ),
    (
        {"sessionAffinity": "Cookie"},
        "spec.sessionAffinity",
        'Unsupported value: "Cookie": supported values: "ClientIP", "None"',
    ),
    (
        {"internalTrafficPolicy": "local"},
        "spec.internalTrafficPolicy",
        'Unsupported value: "local": supported values: "Cluster", "Local"',
    ),
    (
        {"type": "NodePort", "externalTrafficPolicy": "Node"},
        "spec.externalTrafficPolicy",
        'Unsupported value: "Node": supported values: "Cluster", "Local"',
    ),
    (
        LOCAL,
        "spec.externalTrafficPolicy",
        'Invalid value: "Local": may only be set for externally-accessible services',
    ),
    (
        {"trafficDistribution": "Near"},
        "spec.trafficDistribution",
        'Unsupported value: "Near": supported values:'
        ' "PreferClose", "PreferSameNode", "PreferSameZone"',
    ),
    # affinity
    *(
        (
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout_s}},
            },
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            f"Invalid value: {timeout_s}: must be greater than 0 and less than 86400",
        )
        for timeout_s in (0, -1, 86401)
    ),
    (
        {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10}}},
        "spec.sessionAffinityConfig",
        "Forbidden: must not be set when session affinity is None",
    ),
    # cluster IPs and families
    ({"clusterIP": "10.96.0"}, "spec.clusterIPs[0]", f'Invalid value: "10.96.0": {IP}'),
    (
        {"clusterIP": "10.97.0.1"},
        "spec.clusterIPs",
        'Invalid value: ["10.97.0.1"]: failed to allocate IP 10.97.0.1: the provided IP (10.97.0.1)'
        " is not in the valid range. The range of valid IPs is 10.96.0.0/16",
    ),
    (
        {"clusterIP": "10.96.0.0"},
        "spec.clusterIPs",
        'Invalid value: ["10.96.0.0"]: failed to allocate IP 10.96.0.0: the provided IP (10.96.0.0)'
        " is not in the valid range. The range of valid IPs is 10.96.0.0/16",
    ),
    (
        {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.8"]},
        "spec.clusterIPs",
        'Invalid value: ["10.96.0.8"]: first value must match `clusterIP`',
    ),
    (
        {"clusterIPs": ["10.96.0.8"]},
        "spec.clusterIPs",
        'Invalid value: ["10.96.0.8"]: must be empty when `clusterIP` is not specified',
    ),
    (
        {
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7", "fd00:10:96::7", "10.96.0.8"],
            "ipFamilyPolicy": "RequireDualStack",
        },
        "spec.clusterIPs",
        'Invalid value: ["10.96.0.7","fd00:10:96::7","10.96.0.8"]: may only hold up to 2 values',
    ),
    (
        {
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7", "10.96.0.8"],
            "ipFamilyPolicy": "RequireDualStack",
        },
        "spec.clusterIPs",
        'Invalid value: ["10.96.0.7","10.96.0.8"]:'
        " may specify no more than one IP for each IP family",
    ),
    (
        {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00:10:96::7"]},
        "spec.ipFamilyPolicy",
        f'Invalid value: "SingleStack": {DUAL} cluster IPs are specified',
    ),
    (
        {"ipFamilies": ["IPv4", "IPv6"]},
        "spec.ipFamilyPolicy",
        f'Invalid value: "SingleStack": {DUAL} IP families are specified',
    ),
    (
        {"clusterIP": "10.96.0.7", "ipFamilies": ["IPv6"]},
        "spec.clusterIPs[0]",
        'Invalid value: "10.96.0.7": expected an IPv6 value as indicated by `ipFamilies[0]`',
    ),
    (
        {"ipFamilies": ["IPv5"]},
        "spec.ipFamilies[0]",
        'Unsupported value: "IPv5": supported values: "IPv4", "IPv6"',
    ),
    (
        {"ipFamilies": ["IPv4", "IPv4"], "ipFamilyPolicy": "PreferDualStack"},
        "spec.ipFamilies[1]",
        'Duplicate value: "IPv4"',
    ),
    (
        {"ipFamilyPolicy": "DualStack"},
        "spec.ipFamilyPolicy",
        'Unsupported value: "DualStack": supported values:'
        ' "PreferDualStack", "RequireDualStack", "SingleStack"',
    ),
    # headless
    (
        {"type": "NodePort", "clusterIP": "None"},
        "spec.clusterIPs[0]",
        "Invalid value: \"None\": may not be set to 'None' for NodePort services",
    ),
    (
        {**LB, "clusterIP": "None"},
        "spec.clusterIPs[0]",
        "Invalid value: \"None\": may not be set to 'None' for LoadBalancer services",
    ),
    (
        {"clusterIP": "None", "clusterIPs": ["None", "10.96.0.7"]},
        "spec.clusterIPs",
        'Invalid value: ["None","10.96.0.7"]: \'None\' must be the first and only value',
    ),
    # ExternalName
    ({"type": "ExternalName"}, "spec.externalName", "Required value"),
    (
        {"type": "ExternalName", "externalName": "db.example.com", "clusterIP": "10.96.0.7"},
        "spec.clusterIPs",
        "Forbidden: may not be set for ExternalName services",
    ),
    (
        {"type": "ExternalName", "externalName": "x", "ipFamilyPolicy": "SingleStack"},
        "spec.ipFamilyPolicy",
        "Forbidden: may not be set for ExternalName services",
    ),
    # external IPs
    ({"externalIPs": ["nowhere"]}, "spec.externalIPs[0]", f'Invalid value: "nowhere": {IP}'),
    *(
        ({"externalIPs": ["198.51.100.1", address]}, "spec.externalIPs[1]", message)
        for address, message in (
            ("0.0.0.0", 'Invalid value: "0.0.0.0": may not be unspecified (0.0.0.0)'),
            (
                "127.0.0.9",
                'Invalid value: "127.0.0.9":'
                " may not be in the loopback range (127.0.0.0/8, ::1/128)",
            ),
            (
                "fe80::1",
                'Invalid value: "fe80::1":'
                " may not be in the link-local range (169.254.0.0/16, fe80::/10)",
            ),
            (
                "224.0.0.9",
                'Invalid value: "224.0.0.9":'
                " may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)",
            ),
            (
                "::ffff:127.0.0.1",
                'Invalid value: "::ffff:127.0.0.1":'
                " may not be in the loopback range (127.0.0.0/8, ::1/128)",
            ),
            ("fe80::1%eth0", f'Invalid value: "fe80::1%eth0": {IP}'),
        )
    ),
    # load balancers
    ({"loadBalancerSourceRanges": ["10.0.0.0/8"]}, "spec.loadBalancerSourceRanges", ONLY_LB),
    *(
        (
            {**LB, "loadBalancerSourceRanges": [text]},
            "spec.loadBalancerSourceRanges[0]",
            f'Invalid value: "{text}": {CIDR}',
        )
        for text in ("10.0.0.0", "10.0.0.0/33", "10.0.0.0/255.0.0.0")
    ),
    ({"allocateLoadBalancerNodePorts": False}, "spec.allocateLoadBalancerNodePorts", ONLY_LB),
    ({"loadBalancerClass": "x/y"}, "spec.loadBalancerClass", ONLY_LB),
    (
        {**LB, "healthCheckNodePort": 31000},
        "spec.healthCheckNodePort",
        "Invalid value: 31000: may only be set when `type` is 'LoadBalancer' and"
        " `externalTrafficPolicy` is 'Local'",
    ),
    (
        {**LB, **LOCAL, "healthCheckNodePort": 99},
        "spec.healthCheckNodePort",
        "Invalid value: 99: provided port is not in the valid range."
        " The range of valid ports is 30000-32767",
    ),
    # selector
    (
        {"selector": {"app": "a b"}},
        "spec.selector",
        'Invalid value: "a b": a valid label must be an empty string or consist of alphanumeric'
        " characters, '-', '_' or '.', and must start and end with an alphanumeric character"
        " (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is"
        " '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')",
    ),
    ({"selector": {"app": 1}}, "spec.selector.app", "Invalid value: 1: must be a string"),
]


@pytest.mark.parametrize(
    ("spec", "field", "message"), CASES, ids=[f"{i}-{c[1]}" for i, c in enumerate(CASES)]
)
def test_a_wrong_field_is_refused_in_the_api_servers_words(
    spec: dict[str, Any], field: str, message: str
) -> None:
    """The object is left out, its file, name and field are said, and its neighbour is served."""
    state = apply(service("web", **spec), service("other"))
    assert told(state.problems) == [(field, message)]
    assert state.problems[0].source == "a.yaml"
    assert state.problems[0].object_ref == "Service default/web"
    assert list(state.services) == [named("other")]


@pytest.mark.parametrize("name", ["1web", "Web", "web.a", "w" * 64])
def test_a_service_must_be_named_as_dns_demands(name: str) -> None:
    state = apply(service(name))
    assert state.services == {}
    assert {problem.field for problem in state.problems} == {"metadata.name"}


def test_a_service_name_is_refused_with_the_rule() -> None:
    assert told(apply(service("1web")).problems) == [
        ("metadata.name", f'Invalid value: "1web": {DNS_1035}')
    ]


def test_all_faults_of_an_object_are_told_at_once() -> None:
    """Nobody has to mend a manifest one message at a time."""
    wrong = service("Web", **ports({"port": 0}, {"port": 70000}), sessionAffinity="x")
    assert [field for field, _ in told(apply(wrong).problems)] == [
        *["metadata.name", "spec.ports[0].port", "spec.ports[0].name"],
        *["spec.ports[1].port", "spec.ports[1].name", "spec.sessionAffinity"],
    ]


def test_a_family_the_cluster_lacks_is_refused() -> None:
    cluster = Cluster(cidrs=("10.96.0.0/16",))
    state = cluster.apply(
        service("six", ipFamilies=["IPv6"]), service("both", ipFamilyPolicy="RequireDualStack")
    )
    assert told(state.problems) == [
        ("spec.ipFamilies[0]", 'Invalid value: "IPv6": not configured on this cluster'),
        (
            "spec.ipFamilyPolicy",
            'Invalid value: "RequireDualStack":'
            " this cluster is not configured for dual-stack services",
        ),
    ]


@pytest.mark.parametrize(
    ("text", "ref", "field", "message"),
    [
        (
            "kind: Service\nmetadata: {name: a}",
            *("Service default/a", "apiVersion"),
            "Required value: apiVersion not set, expected v1",
        ),
        ("apiVersion: v1\nmetadata: {name: a}", "", "kind", "Object 'Kind' is missing"),
        (
            "apiVersion: v1\nkind: Service",
            *("Service default/", "metadata.name"),
            "Required value: name or generateName is required",
        ),
        (
            "apiVersion: v2\nkind: Service\nmetadata: {name: a}",
            *("Service default/a", "apiVersion"),
            'no matches for kind "Service" in version "v2"',
        ),
        ("- 1", "", "", "an object was expected, found a list"),
        ("hello", "", "", "an object was expected, found 'hello'"),
        (
            "{apiVersion: v1, kind: Node, metadata: {name: A}}",
            *("Node A", "metadata.name"),
            f'Invalid value: "A": {SUBDOMAIN}',
        ),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: A}}",
            *("Pod A/a", "metadata.namespace"),
            f'Invalid value: "A": {LABEL}',
        ),
        (
            "{apiVersion: v1, kind: Service, metadata: {name: a, labels: {b: yes}}}",
            *("Service default/a", "metadata.labels.b"),
            "Invalid value: true: must be a string",
        ),
    ],
)
def test_a_document_that_is_no_proper_object_is_told(
    text: str, ref: str, field: str, message: str
) -> None:
    (problem,) = apply(text).problems
    assert (problem.object_ref, problem.field, problem.message) == (ref, field, message)


def test_other_kinds_pass_unseen() -> None:
    """A folder may hold a whole application, and Knative's Services are not ours."""
    state = apply(
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}, spec: {anything: [1]}}",
        "{apiVersion: serving.knative.dev/v1, kind: Service, metadata: {name: x}}",
    )
    assert state.problems == ()
    assert state.services == {}


def test_the_second_object_of_a_name_is_refused() -> None:
    """Which one counts is the order of file names, not of time."""
    state = apply(service("web", clusterIP="10.96.0.1"), service("web", clusterIP="10.96.0.2"))
    assert state.services[named("web")].cluster_ips == ("10.96.0.1",)
    assert state.problems[0].source == "b.yaml"
    assert told(state.problems) == [
        ("metadata.name", 'Duplicate value: "web": declared in a.yaml already')
    ]


def test_the_same_document_twice_in_a_file_is_refused_once() -> None:
    state = apply("---\n".join([service("web")] * 2))
    assert [field for field, _ in told(state.problems)] == ["metadata.name"]
    assert list(state.services) == [named("web")]


@pytest.mark.parametrize("kind", ["List", "ServiceList"])
def test_a_list_is_its_items(kind: str) -> None:
    """Items of a typed list need not repeat their kind."""
    stamp = "apiVersion: v1, kind: Service, " if kind == "List" else ""
    items = ", ".join(
        f"{{{stamp}metadata: {{name: {name}}}, spec: {{ports: [{{port: {port}}}]}}}}"
        for name, port in (("a", 80), ("b", 0))
    )
    state = apply(f"{{apiVersion: v1, kind: {kind}, items: [{items}]}}")
    assert list(state.services) == [named("a")]
    assert [problem.object_ref for problem in state.problems] == ["Service default/b"]
