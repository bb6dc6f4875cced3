"""An explanation in words: steps of sentences, a table of headers, and one line that sums it up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ebpf_svc.dataplane.ebpf.constants import HAIRPIN_ADDRESS
from ebpf_svc.dataplane.ebpf.options import uses_fast_path
from ebpf_svc.explain import host, nothing, port, way
from ebpf_svc.explain.explain import Explanation
from ebpf_svc.explain.model import (
    ChosenBy,
    End,
    ListName,
    Verdict,
    is_local_policy,
    is_short_circuit,
)
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.model.net import Protocol, Sources, family_of
from ebpf_svc.monitor.view import at
from ebpf_svc.monitor.words import reason_in_words

KINDS = {
    FrontendKind.CLUSTER_IP: "the cluster IP",
    FrontendKind.NODE_PORT: "a node port",
    FrontendKind.EXTERNAL_IP: "an external IP",
    FrontendKind.LOAD_BALANCER: "a load balancer IP",
}
CLASSES = {
    Sources.POD: "a pod",
    Sources.NODE: "this node",
    Sources.EXTERNAL: "outside the cluster",
}


class Step(NamedTuple):
    """One thing that was decided, and why."""

    topic: str
    sentences: tuple[str, ...]


class Header(NamedTuple):
    """The ends of a packet at one place of its way."""

    where: str
    source: str
    destination: str


def steps(told: Explanation) -> list[Step]:
    """Everything that was decided, in the order in which it is."""
    found = [Step("client", tuple(_client(told))), Step("frontend", tuple(_frontend(told)))]
    if told.view is not None:
        is_answer = told.prediction.reason == "own_answer"
        if told.view.frontend.source_ranges is not None and not is_answer:
            found.append(Step("sources", (_sources(told),)))
        if told.prediction.list_name is not None:
            found.append(Step("policy", tuple(_policy(told))))
        if told.view.affinity_s:
            found.append(Step("affinity", (_affinity(told),)))
        if told.prediction.reason != "source_range":
            found.append(Step("choice", tuple(_choice(told))))
        if told.prediction.verdict is Verdict.FORWARDED:
            found.append(Step("source", (_masquerade(told),)))
    for topic, sentences in (("answer", port.answer(told)), ("port", port.sentences(told))):
        if said := tuple(sentences):
            found.append(Step(topic, said))
    found.append(Step("hook", tuple(_hook(told))))
    if said := tuple(_way(told)):
        found.append(Step("way", said))
    if told.way is not None and told.way.driver is not None:
        found.append(Step("driver", tuple(way.driver_sentences(told.way.driver))))
    found.append(Step("program", tuple(_program(told))))
    return found


def summary(told: Explanation) -> str:
    """What becomes of the call, in one line."""
    prediction = told.prediction
    if prediction.verdict is Verdict.FORWARDED:
        backend = told.backend
        if backend is not None and (
            prediction.by is not ChosenBy.RANDOM or prediction.chosen is not None
        ):
            return f"forwarded to {at(*backend)}"
        return f"forwarded to one of {len(prediction.candidates)} endpoints of {told.name}"
    if prediction.verdict is Verdict.UNTOUCHED:
        if prediction.reason == "own_answer":
            return port.ANSWER
        return host.UNTOUCHED.get(prediction.reason, "not a service: left alone")
    if prediction.verdict is Verdict.OTHER_PORT:
        return f"not a service: left alone, but the endpoint sees port {port.seen_port(told)}"
    return f"{prediction.verdict.value}: {reason_in_words(prediction.reason)}"


def _client(told: Explanation) -> Iterator[str]:
    client = told.client
    who = client.address or client.name
    name = f" ({client.name})" if client.name and client.name != who else ""
    yield f"{who}{name} is {CLASSES[client.kind]}: {client.why}."
    if client.kind is Sources.POD and not client.is_pod_here:
        yield (
            "It is a pod of another node, where its calls of cluster IPs are translated already; "
            "here come its calls of this node's addresses."
        )


def _frontend(told: Explanation) -> Iterator[str]:
    scene, key = told.scene, told.call.frontend
    if told.view is None:
        is_changed = told.prediction.verdict is Verdict.OTHER_PORT
        found = nothing.sentences(scene, key)
        yield from (each for each in found if not (is_changed and each == nothing.LEFT_ALONE))
    else:
        yield f"{key} is {KINDS[told.view.frontend.kind]} of {told.name}."
    if told.lags:
        yield f"The plan of this moment {told.lags}: the agent lags, failed or is gone."
    for problem in told.problems:
        yield f"Conflict: {problem}."


def _sources(told: Explanation) -> str:
    assert told.view is not None
    ranges = ", ".join(told.view.frontend.source_ranges or ())
    if told.call.at_socket:
        may = "may not: dropped" if told.prediction.reason == "source_range" else "may"
        return f"only {ranges} may call, and by that this node's processes {may} (P10)."
    if told.prediction.by is ChosenBy.FLOW:
        return f"only {ranges} may call (P10); the flow that is open is not asked again."
    if told.prediction.reason == "source_range":
        return f"{told.call.client[0]} is in none of {ranges}: dropped (P10)."
    return f"{told.call.client[0]} is let in by {told.prediction.admitting} (P10)."


def _policy(told: Explanation) -> Iterator[str]:
    view, kind = told.view, told.call.kind
    assert view is not None
    internal = view.frontend.kind is FrontendKind.CLUSTER_IP
    policy = "internalTrafficPolicy" if internal else "externalTrafficPolicy"
    word = "Local" if is_local_policy(view) else "Cluster"
    name = told.prediction.list_name
    assert name is not None
    endpoints = f"{len(told.prediction.candidates)} endpoints"
    if len(told.prediction.candidates) == 1:
        endpoints = "1 endpoint"
    here = " on this node" if name is ListName.LOCAL else ""
    if is_short_circuit(view, kind):
        who = "a pod" if kind is Sources.POD else "this node"
        yield f"{policy} is Local, but {who} is spared it (P5): the Cluster list, {endpoints}."
    else:
        yield f"{policy} is {word} (P1): the {name.value} list, {endpoints}{here}."


def _affinity(told: Explanation) -> str:
    assert told.view is not None
    seconds = told.view.affinity_s
    who = "this node's processes" if told.call.at_socket else "its address"
    begin = f"ClientIP, {seconds} s, by {who} (P13): "
    if told.scene.mode != "ebpf":
        return begin + f"what is remembered mode {told.scene.mode} does not tell."
    found = told.affinity
    if found is None:
        return begin + "nothing is remembered; this call will be."
    if found.counts:
        left_s = max(0, seconds - found.idle_s)
        return begin + f"it stays with {at(*found.backend)}, for {left_s} s more."
    return begin + f"what is remembered, {at(*found.backend)}, is over or gets no new flows."


def _choice(told: Explanation) -> Iterator[str]:
    prediction = told.prediction
    if told.flow is not None and prediction.by is not ChosenBy.FLOW:
        yield f"The flow its port had with {at(*told.flow.backend)} is over."
    if prediction.verdict is Verdict.UNTOUCHED:
        yield "Nothing chooses."
    elif prediction.verdict is Verdict.REFUSED:
        how = "a reset" if told.call.frontend.protocol is Protocol.TCP else "ICMP port unreachable"
        how = "ECONNREFUSED at connect()" if told.call.at_socket else how
        yield f"No endpoint is usable anywhere: refused at once by {how} (P2)."
    elif prediction.verdict is Verdict.DROPPED:
        yield f"{_capital(reason_in_words(prediction.reason))}: dropped silently."
    else:
        yield _chosen(told)


def _chosen(told: Explanation) -> str:
    prediction = told.prediction
    where = at(*prediction.chosen) if prediction.chosen else ""
    count = len(prediction.candidates)
    took = told.proof.outcome.backend if told.proof else None
    tried = f"; this trial took {at(*took)}" if took and not prediction.chosen else ""
    return {
        ChosenBy.FLOW: f"its port has a flow, which goes on: {where}.",
        ChosenBy.AFFINITY: f"affinity decides: {where}.",
        ChosenBy.ONLY: f"there is one: {where}.",
        ChosenBy.MAGLEV: f"the client's hash decides, the same on every node: {where}.",
        ChosenBy.RANDOM: f"chance decides among {count}{tried}."
        if not where
        else f"the client's port decides among {count}: {where}.",
        ChosenBy.NOTHING: "",
    }[prediction.by]


def _masquerade(told: Explanation) -> str:
    view, call, backend = told.view, told.call, told.backend
    assert view is not None
    if call.at_socket:
        how = "the pod's own: the packet is on its way to the endpoint from the start."
        if call.kind is Sources.NODE:
            how = "routing chooses the node's own address towards the endpoint: none is translated."
    elif told.is_relayed:
        how = "the endpoint sees this node, whose agent relays: it is not the client's connection."
    elif told.proof is not None and told.proof.outcome.hairpin:
        hairpin = HAIRPIN_ADDRESS[family_of(call.frontend.address)]
        how = f"the endpoint is the client itself, so it sees {hairpin} instead (P9)."
    elif told.by_host_packet:
        how = host.source(told)
    elif backend is not None and backend[0] == call.client[0]:
        how = "the endpoint is the client itself, so the packet is masqueraded (P9)."
    elif told.prediction.by is ChosenBy.FLOW:
        how = "as with the packets before."
    elif view.frontend.masquerade_for & call.kind:
        how = f"masqueraded, the endpoint sees an address of this node: {_why_masquerade(told)}."
        if (seen := told.taken) and not told.has_port:
            how += f" In this trial {at(*seen)}, whose port stands for the client's."
    else:
        how = f"kept, the endpoint sees {call.client[0] or 'the caller'}: {_why_kept(told)}."
    return how


def _why_masquerade(told: Explanation) -> str:
    view, kind = told.view, told.call.kind
    assert view is not None
    if view.frontend.kind is FrontendKind.CLUSTER_IP:
        if told.scene.settings.masquerade_all:
            return "masqueradeAll (D3)"
        return "whoever is no pod might not be answered through this node (P8)"
    if is_short_circuit(view, kind):
        return "this node is spared the policy, not the masquerade (P5)"
    return "externalTrafficPolicy is Cluster, and the answer must come back through here (P6)"


def _why_kept(told: Explanation) -> str:
    view, kind = told.view, told.call.kind
    assert view is not None
    if kind is Sources.POD:
        rule = "P5" if is_short_circuit(view, kind) else "P8"
        return f"pods and endpoints know the way to each other ({rule})"
    if view.frontend.kind is FrontendKind.CLUSTER_IP:
        return "without a prefix of pods nobody is masqueraded here (D2)"
    return "externalTrafficPolicy is Local (P7)"


def _hook(told: Explanation) -> Iterator[str]:
    client, scene = told.client, told.scene
    if scene.mode != "ebpf":
        where = "OUTPUT" if client.kind is Sources.NODE else "PREROUTING"
        in_words = {
            "userspace": "the agent's own listeners take the connection and open another",
            "ipvs": f"IPVS translates what {where} marks",
        }
        yield in_words.get(scene.mode, f"the rules of mode {scene.mode} translate at {where}") + "."
        return
    if told.call.at_socket:
        how = (
            "the process names the service, the kernel calls the endpoint, no packet is translated"
        )
        if told.prediction.verdict is not Verdict.FORWARDED:
            how = "the call ends there"
        yield f"the socket hooks at connect() and sendmsg(): {how}."
        yield "They cannot be tried: this is from the model."
        if client.kind is Sources.POD:
            yield "A pod whose sockets they do not see (a sandbox) meets the tc program below."
            if told.call.frontend.protocol is Protocol.UDP and _is_node_port(told):
                yield "So does a datagram of a socket that is not connected (B9)."
    elif client.kind is Sources.NODE:
        if told.by_host_packet:
            yield host.hook(told)
        else:
            yield "the socket hooks, which leave the call alone."
    elif client.device is None:
        yield "no route leads to the client, so it is not known where its packets come in."
    elif client.device.role is None:
        yield (
            f"its packets would come in by {client.device.name}, which carries no program of "
            "ours: see ebpf.podDevices and ebpf.nodeDevices."
        )
    else:
        what = "a port of " + client.device.bridge if client.device.is_guess else client.device.name
        yield f"tc, ingress of {what}, program {told.program}."


def _is_node_port(told: Explanation) -> bool:
    return told.view is not None and told.view.frontend.kind is FrontendKind.NODE_PORT


def _way(told: Explanation) -> list[str]:
    """Past the stack or through it; nothing where the fast path was not asked for."""
    ebpf = told.scene.settings.ebpf
    if told.scene.mode != "ebpf" or not ebpf.fast_path:
        return []
    if told.way is not None:
        return way.sentences(told.way)
    if (
        told.call.at_socket
        and told.prediction.verdict is Verdict.FORWARDED
        and uses_fast_path(ebpf)
    ):
        return ["through the stack: the fast path is for what others send, not this node itself."]
    return []


def _program(told: Explanation) -> Iterator[str]:
    proof = told.proof
    if proof is None:
        if told.scene.mode == "ebpf":
            yield "not tried: what a process of this node sends meets no program that can be."
        else:
            yield f"none: mode {told.scene.mode} has none to try, this is from the plan and kernel."
        return
    if proof.differences:
        yield "THE PROGRAM DOES NOT DO WHAT IT MUST:"
        yield from proof.differences
        return
    which = "the code that is attached" if told.loaded_tag else "the code of this version"
    yield f"tried {proof.program} ({which}, tag {proof.tag}): it does exactly that."


def headers(told: Explanation) -> list[Header]:
    """The packet from place to place; empty when it is not forwarded."""
    call, backend = told.call, told.backend
    is_sent = told.prediction.verdict in (Verdict.FORWARDED, Verdict.OTHER_PORT)
    if not is_sent or backend is None:
        return []
    frontend = at(call.frontend.address, call.frontend.port)
    to = at(*backend)
    if call.at_socket:
        address = call.client[0]
        if call.kind is Sources.NODE:
            address = told.scene.around.source_to(backend[0]) or "node"
        own = _own(address, call.client)
        return [
            Header("process asks for", "-", frontend),
            Header("packet", own, to),
            Header("answer", to, own),
            Header("process is told", frontend, "-"),
        ]
    client = at(*call.client) if call.client[0] else "node"
    seen = _seen_by_backend(told, backend)
    found = [Header("sent", client, frontend)]
    if seen != client:
        in_steps = told.scene.mode == "ebpf" and not told.taken
        found += [Header("translated", client, to)] if in_steps else []
    found += [
        Header("to the endpoint", seen, to),
        Header("answer", to, seen),
        Header("to the client", frontend, client),
    ]
    return found


def _seen_by_backend(told: Explanation, backend: End) -> str:
    """The source the endpoint sees."""
    call = told.call
    if seen := told.tracked or told.taken:
        return at(*seen)
    if told.masquerades:
        return f"{told.scene.around.source_to(backend[0]) or 'this node'}:any"
    return at(*call.client) if call.client[0] else "node"


def _own(address: str, client: End) -> str:
    return at(address, client[1]) if client[1] and address != "node" else address


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
