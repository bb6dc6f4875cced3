"""What must become of a call, by the rules alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ebpf_svc.explain.model import (
    Call,
    ChosenBy,
    ListName,
    Memory,
    Prediction,
    Verdict,
    admitting_range,
    is_short_circuit,
    predict,
    predict_direct,
)
from ebpf_svc.model.desired import Backend, Frontend, FrontendKey, FrontendKind, FrontendView
from ebpf_svc.model.net import Protocol, Sources

KEY = FrontendKey("10.96.0.1", 80, Protocol.TCP)
POD, OUTSIDE = ("10.244.1.5", 40000), ("203.0.113.9", 40000)
A, B = ("10.244.1.21", 80), ("10.244.2.22", 8080)


def _view(
    *,
    local_for: Sources = Sources.NONE,
    masquerade_for: Sources = Sources.NONE,
    ranges: tuple[str, ...] | None = None,
    kind: FrontendKind = FrontendKind.CLUSTER_IP,
    backends: tuple[Backend, ...] = (Backend(*A, True, True), Backend(*B)),
    has_endpoints: bool = True,
) -> FrontendView:
    frontend = Frontend(KEY, kind, local_for, masquerade_for, ranges)
    return FrontendView(frontend, backends, has_endpoints, 0)


def _pod(**how: object) -> Call:
    return replace(Call(POD, Sources.POD, KEY), **how)  # type: ignore[arg-type]


def test_nothing_served_is_untouched() -> None:
    """P15, P16."""
    assert predict(_pod(), None, Memory()) == Prediction(Verdict.UNTOUCHED)


def test_lists_are_by_class_of_client() -> None:
    """P1, P5: who is not in `local_for` gets the Cluster list."""
    view = _view(local_for=Sources.EXTERNAL, kind=FrontendKind.NODE_PORT)
    pod = predict(_pod(), view, Memory())
    outside = predict(Call(OUTSIDE, Sources.EXTERNAL, KEY), view, Memory())
    assert (pod.list_name, pod.candidates, pod.by) == (
        ListName.CLUSTER, (A, B), ChosenBy.RANDOM
    )  # fmt: skip
    assert (outside.list_name, outside.candidates, outside.by) == (
        ListName.LOCAL, (A,), ChosenBy.ONLY
    )  # fmt: skip
    assert is_short_circuit(view, Sources.POD)
    assert not is_short_circuit(view, Sources.EXTERNAL)


def test_local_cluster_ip_is_no_short_circuit() -> None:
    """internalTrafficPolicy spares nobody (P3)."""
    assert not is_short_circuit(_view(local_for=Sources.ALL), Sources.POD)


def test_draining_backends_get_nothing() -> None:
    """C5: no new flows."""
    view = _view(backends=(Backend(*A, False, False),))
    assert predict(_pod(), view, Memory()).verdict is Verdict.DROPPED


def test_refusal_comes_after_source_ranges() -> None:
    """A source outside the ranges gets silence even where nobody serves (P10 before P2)."""
    call = Call(OUTSIDE, Sources.EXTERNAL, KEY)
    view = _view(ranges=("192.0.2.0/24",), has_endpoints=False, backends=())
    assert predict(call, view, Memory()).reason == "source_range"
    assert predict(call, view, Memory(), filtered_as="192.0.2.9").reason == "no_endpoint"
    inside = replace(view, frontend=replace(view.frontend, source_ranges=("203.0.113.0/24",)))
    told = predict(call, inside, Memory())
    assert (told.verdict, told.admitting) == (Verdict.REFUSED, "203.0.113.0/24")


def test_flow_comes_before_everything() -> None:
    """P12: neither ranges nor an empty list end what is open."""
    view = _view(ranges=("192.0.2.0/24",), has_endpoints=False, backends=())
    told = predict(_pod(), view, Memory(flow=B))
    assert (told.verdict, told.chosen, told.by) == (Verdict.FORWARDED, B, ChosenBy.FLOW)
    assert told.masquerade(view, _pod(), B) is None


@pytest.mark.parametrize(
    ("memory", "chosen", "by"),
    [
        (Memory(affinity=B, maglev=A), B, ChosenBy.AFFINITY),
        (Memory(affinity=("10.9.9.9", 1), maglev=A), A, ChosenBy.MAGLEV),
        (Memory(), None, ChosenBy.RANDOM),
    ],
)
def test_affinity_before_hash_before_chance(
    memory: Memory, chosen: tuple[str, int] | None, by: ChosenBy
) -> None:
    """P13, and only while the endpoint is in the list."""
    told = predict(_pod(), _view(), memory)
    assert (told.chosen, told.by) == (chosen, by)


def test_masquerade_is_by_class_and_never_at_sockets() -> None:
    """P6, P8; a socket has no packet to masquerade; a caller of itself is turned otherwise."""
    view = _view(masquerade_for=Sources.POD)
    told = predict(_pod(), view, Memory())
    assert told.masquerade(view, _pod(), A) is True
    assert told.masquerade(view, _pod(at_socket=True), A) is False
    assert told.masquerade(view, _pod(client=(A[0], 1)), A) is False
    assert told.masquerade(view, Call(OUTSIDE, Sources.EXTERNAL, KEY), A) is False


def test_sctp_stays_at_its_port() -> None:
    """Unless the dataplane can move it, or some endpoint has that port."""
    key = KEY._replace(protocol=Protocol.SCTP)
    call = _pod(frontend=key)
    moved = _view(backends=(Backend(*B),))
    assert predict(call, moved, Memory()).reason == "rewrite_failed"
    assert predict(call, moved, Memory(), moves_sctp=True).verdict is Verdict.FORWARDED
    assert predict(call, _view(), Memory()).verdict is Verdict.FORWARDED


def test_narrowest_range_admits() -> None:
    """P10; the other family's ranges say nothing."""
    ranges = ("10.0.0.0/8", "10.244.0.0/16", "fd00::/8")
    assert admitting_range("10.244.1.5", ranges) == "10.244.0.0/16"
    assert admitting_range("fd00::1", ranges) == "fd00::/8"
    assert admitting_range("192.0.2.1", ranges) == ""


def test_port_in_use_drops_where_no_other_can_be_had() -> None:
    """At the endpoint that is chosen alone; and to another a call goes with its port or another."""
    view = _view()
    for drawn, verdict in ((A, Verdict.DROPPED), (B, Verdict.FORWARDED)):
        memory = Memory(drawn=drawn, taken=frozenset({A, B}), stuck=frozenset({A}))
        found = predict(_pod(), view, memory)
        assert (found.verdict, found.chosen, found.by) == (verdict, drawn, ChosenBy.RANDOM)
        assert (found.reason == "client_port_clash") is (verdict is Verdict.DROPPED)


def test_endpoint_drawn_from_a_list_that_has_changed_is_not_told() -> None:
    """The list was read before: chance decides, as far as is known."""
    found = predict(_pod(), _view(), Memory(drawn=("10.244.1.99", 80)))
    assert (found.verdict, found.chosen, found.by) == (Verdict.FORWARDED, None, ChosenBy.RANDOM)


def test_answer_to_a_process_of_the_node_is_no_request() -> None:
    """B9: it comes after a flow that is open, and before source ranges (P10) and refusal (P2)."""
    view = _view(ranges=("192.0.2.0/24",), has_endpoints=False)
    found = predict(_pod(), view, Memory(answers=True))
    assert found == Prediction(Verdict.UNTOUCHED, "own_answer")
    assert predict(_pod(), view, Memory(flow=A, answers=True)).by is ChosenBy.FLOW


def test_direct_call_keeps_all_but_its_port() -> None:
    """And that, unless it is taken and another can be had, or it was given one before."""
    call = replace(_pod(), frontend=FrontendKey(*A, Protocol.TCP))
    for memory, wanted in (
        (Memory(), Prediction(Verdict.UNTOUCHED)),
        (Memory(taken=frozenset({B})), Prediction(Verdict.UNTOUCHED)),
        (Memory(taken=frozenset({A})), Prediction(Verdict.OTHER_PORT)),
        (Memory(taken=frozenset({A}), stuck=frozenset({A})), Prediction(Verdict.UNTOUCHED)),
        (Memory(flow=A), Prediction(Verdict.OTHER_PORT, by=ChosenBy.FLOW)),
    ):
        assert predict_direct(call, memory) == wanted
