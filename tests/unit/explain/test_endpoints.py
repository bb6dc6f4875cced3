"""Why an endpoint gets a client, or not (T1-T10)."""

from __future__ import annotations

import pytest

from ebpf_svc.explain.endpoints import Row, rows_of
from ebpf_svc.explain.model import ListName
from ebpf_svc.model.desired import Frontend, FrontendKey, FrontendKind, FrontendView
from ebpf_svc.model.endpoint import Endpoint
from ebpf_svc.model.net import Protocol
from ebpf_svc.plan.endpoints import choose
from ebpf_svc.plan.place import Place

HERE = Place("node1", "east")
KEY = FrontendKey("10.96.0.1", 80, Protocol.TCP)


def _rows(
    *endpoints: Endpoint, name: ListName = ListName.CLUSTER, place: Place = HERE
) -> list[Row]:
    """Rows of endpoints whose lists the planner chose."""
    candidates = {(each.address, 80): each for each in endpoints}
    choice = choose(candidates, cluster=True, local=True, place=place)
    frontend = Frontend(KEY, FrontendKind.CLUSTER_IP)
    view = FrontendView(frontend, choice.backends, choice.has_endpoints, 0)
    return rows_of(view, name, candidates, place)


def _why(*endpoints: Endpoint, **how: object) -> list[tuple[bool, str]]:
    return [(row.eligible, row.why) for row in _rows(*endpoints, **how)]  # type: ignore[arg-type]


def _endpoint(number: int, **fields: object) -> Endpoint:
    return Endpoint(f"10.244.0.{number}", **{"node_name": "node1", **fields})  # type: ignore[arg-type]


TERMINATING = {"ready": False, "serving": True, "terminating": True}
GONE = {"ready": False, "serving": False, "terminating": True}


def test_ready_ones_win() -> None:
    """T2, T5."""
    assert _why(
        _endpoint(1),
        _endpoint(2, ready=False, serving=False),
        _endpoint(3, **TERMINATING),
        _endpoint(4, **GONE),
    ) == [
        (True, "ready"),
        (False, "not ready"),
        (False, "terminating, and others are ready; flows it has stay"),
        (False, "terminating, and serves no more"),
    ]


def test_terminating_ones_serve_when_none_is_ready() -> None:
    """T4, each list for itself."""
    assert _why(_endpoint(1, **TERMINATING), _endpoint(2, **GONE)) == [
        (True, "serves while it terminates, and none is ready"),
        (False, "terminating, and serves no more"),
    ]
    remote, local = _endpoint(1, node_name="node2"), _endpoint(2, **TERMINATING)
    assert _why(remote, local, name=ListName.LOCAL) == [
        (False, "on node node2, and the policy is Local"),
        (True, "serves while it terminates, and none on this node is ready"),
    ]


def test_local_list_wants_this_node() -> None:
    """T3, E6: an endpoint without a node is nowhere."""
    rows = _why(
        _endpoint(1),
        _endpoint(2, node_name="node2"),
        _endpoint(3, node_name=""),
        name=ListName.LOCAL,
    )
    assert rows == [
        (True, "ready on this node"),
        (False, "on node node2, and the policy is Local"),
        (False, "its node is not known, and the policy is Local"),
    ]


@pytest.mark.parametrize(
    ("field", "mine", "other", "words"),
    [
        ("zone_hints", "east", "west", "its hint names zone west; this node's is east"),
        ("node_hints", "node1", "node2", "its hint names node node2; this is node1"),
    ],
)
def test_hints_keep_endpoints_away(field: str, mine: str, other: str, words: str) -> None:
    """T7-T9."""
    rows = _why(
        _endpoint(1, **{field: frozenset({mine})}), _endpoint(2, **{field: frozenset({other})})
    )
    assert rows == [(True, "ready"), (False, words)]


def test_states_are_named() -> None:
    """In the words of `kubectl`."""
    rows = _rows(_endpoint(1), _endpoint(2, **TERMINATING), _endpoint(3, **GONE))
    assert [row.state for row in rows] == ["ready", "terminating, serving", "terminating"]


def test_kernel_alone_knows_the_lists() -> None:
    """Without manifests and API: who is in the list, who drains."""
    candidates = {("10.244.0.1", 80): _endpoint(1), ("10.244.0.2", 80): _endpoint(2, **TERMINATING)}
    choice = choose(candidates, cluster=True, local=False, place=HERE)
    view = FrontendView(Frontend(KEY, FrontendKind.CLUSTER_IP), choice.backends, True, 0)
    rows = rows_of(view, ListName.CLUSTER, None, HERE)
    assert [(row.eligible, row.why) for row in rows] == [
        (True, "in the Cluster list"),
        (False, "draining: no new flows, those it has stay"),
    ]
    (other, _) = rows_of(view, ListName.LOCAL, None, HERE)
    assert (other.eligible, other.why) == (False, "not in the Local list")


def test_endpoint_only_the_kernel_has_is_said_to_be_stale() -> None:
    """The API has forgotten it: the agent lags or is gone."""
    choice = choose({("10.244.0.1", 80): _endpoint(1)}, cluster=True, local=False, place=HERE)
    view = FrontendView(Frontend(KEY, FrontendKind.CLUSTER_IP), choice.backends, True, 0)
    ((row),) = rows_of(view, ListName.CLUSTER, {}, HERE)
    assert row.eligible
    assert "the API not" in row.why
