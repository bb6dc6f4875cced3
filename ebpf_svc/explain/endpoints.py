"""Every endpoint of a service port: does this client get it, and why not. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ebpf_svc.explain.model import End, ListName, members
from ebpf_svc.model.desired import FrontendView
from ebpf_svc.model.endpoint import Endpoint
from ebpf_svc.plan.place import Place


@dataclass(frozen=True, slots=True)
class Row:
    """One endpoint."""

    address: str
    port: int
    node: str
    state: str
    """ready, not ready, terminating …; empty where only the kernel was asked."""
    eligible: bool
    why: str


def rows_of(
    view: FrontendView,
    name: ListName,
    candidates: Mapping[End, Endpoint] | None,
    place: Place,
) -> list[Row]:
    """Judge every endpoint for clients that get the list `name`.

    Args:
        view: the frontend as the kernel holds it.
        name: which list counts.
        candidates: the endpoints as the API says; None = only the kernel is known.
        place: this node.
    """
    if candidates is None:
        return _from_kernel(view, name)
    listed = set(members(view, name))
    held = {(each.address, each.port) for each in view.backends}
    rows = []
    for end in sorted(candidates.keys() | held):
        endpoint = candidates.get(end)
        eligible = end in listed
        if endpoint is None:
            why = "the kernel has it, the API not: the agent lags, or is gone"
            rows.append(Row(*end, "", "", eligible, why))
            continue
        why = _why(endpoint, name, candidates.values(), place, eligible=eligible)
        if not (eligible or endpoint.ready) and endpoint.serving and end in held:
            why += "; flows it has stay"
        rows.append(Row(*end, endpoint.node_name, state_of(endpoint), eligible, why))
    return rows


def state_of(endpoint: Endpoint) -> str:
    """The conditions of an endpoint in words."""
    if endpoint.ready:
        return "ready"
    if endpoint.terminating:
        return "terminating, serving" if endpoint.serving else "terminating"
    return "not ready"


def _from_kernel(view: FrontendView, name: ListName) -> list[Row]:
    listed = set(members(view, name))
    rows = []
    for each in view.backends:
        end = (each.address, each.port)
        if end in listed:
            why = f"in the {name} list"
        elif each.in_cluster or each.in_local:
            why = f"not in the {name} list"
        else:
            why = "draining: no new flows, those it has stay"
        rows.append(Row(*end, "", "", end in listed, why))
    return rows


def _why(
    endpoint: Endpoint,
    name: ListName,
    everyone: Iterable[Endpoint],
    place: Place,
    *,
    eligible: bool,
) -> str:
    """One endpoint's reason, by rules T1-T10."""
    here = place.node_name
    is_local = bool(here) and endpoint.node_name == here
    rivals = [
        each
        for each in everyone
        if each.ready and (name is ListName.CLUSTER or each.node_name == here)
    ]
    where = " on this node" if name is ListName.LOCAL else ""
    if eligible:
        serving = f"serves while it terminates, and none{where} is ready"
        return f"ready{where}" if endpoint.ready else serving
    if name is ListName.LOCAL and not is_local:
        node = f"on node {endpoint.node_name}" if endpoint.node_name else "its node is not known"
        return f"{node}, and the policy is Local"
    return _hint(endpoint, place) if endpoint.ready else _lack(endpoint, rivals=bool(rivals))


def _lack(endpoint: Endpoint, *, rivals: bool) -> str:
    """Why an endpoint that is not ready gets nothing (T2-T5)."""
    if not endpoint.terminating:
        return "not ready"
    if not endpoint.serving:
        return "terminating, and serves no more"
    if rivals:
        return "terminating, and others are ready"
    return "terminating: the kernel does not have it in the list"


def _hint(endpoint: Endpoint, place: Place) -> str:
    """Why a ready endpoint of the Cluster list is kept away (T7-T9)."""
    if endpoint.node_hints and place.node_name not in endpoint.node_hints:
        return f"its hint names node {_words(endpoint.node_hints)}; this is {place.node_name}"
    if endpoint.zone_hints and place.zone not in endpoint.zone_hints:
        own = place.zone or "none"
        return f"its hint names zone {_words(endpoint.zone_hints)}; this node's is {own}"
    return "ready, but the kernel does not have it in the list yet"


def _words(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
