"""The first part of the tour: every kind of frontend, asked from everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ebpf_svc.demo.report import Asker, Probe
from ebpf_svc.demo.stage import Stage
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.model.net import family_of
from ebpf_svc.testbed import traffic
from ebpf_svc.testbed.traffic import Answer, Target

REQUESTS = 30
"""Asked of each frontend from each place, by each protocol, in each family."""


@dataclass(frozen=True, slots=True)
class Frontend:
    """One line of the table: a kind of frontend and where it is asked from."""

    name: str
    targets: Callable[[Stage], Iterable[Target]]
    askers: tuple[Asker, ...] = tuple(Asker)


FRONTENDS = (
    Frontend("ClusterIP", lambda stage: stage.targets("web", FrontendKind.CLUSTER_IP)),
    Frontend("NodePort node1", lambda stage: stage.node_port_targets("web-nodeport", "node1")),
    Frontend("NodePort node2", lambda stage: stage.node_port_targets("web-nodeport", "node2")),
    Frontend(
        "NodePort lo",
        lambda stage: stage.targets("web-nodeport", FrontendKind.NODE_PORT, "localhost"),
        (Asker.HOST,),
    ),
    Frontend("externalIP", lambda stage: stage.targets("web-external", FrontendKind.EXTERNAL_IP)),
    Frontend(
        "LoadBalancer",
        lambda stage: stage.targets("web-loadbalancer", FrontendKind.LOAD_BALANCER),
    ),
)
LINES_PER_FRONTEND = 4
"""TCP and UDP, IPv4 and IPv6."""


def ask_frontends(stage: Stage) -> Iterator[list[Probe]]:
    """Ask one kind of frontend after the other, each from everywhere at once."""
    for frontend in FRONTENDS:
        targets = list(frontend.targets(stage))
        if len(targets) != LINES_PER_FRONTEND:
            raise LookupError(f"{frontend.name}: the agent serves {targets}")
        asked = [(asker, target) for asker in frontend.askers for target in targets]
        answered = traffic.ask_all(
            [traffic.Probe(stage.askers[asker], target, REQUESTS) for asker, target in asked]
        )
        yield [
            _probe(frontend.name, asker, target, answers)
            for (asker, target), answers in zip(asked, answered, strict=True)
        ]


def _probe(name: str, asker: Asker, target: Target, answers: list[Answer]) -> Probe:
    reasons = {_fault(answer, target) for answer in answers} - {""}
    return Probe(
        frontend=name,
        address=target.address,
        port=target.port,
        protocol=target.protocol,
        family=family_of(target.address),
        asker=asker,
        requests=len(answers),
        servers=traffic.spread(answer for answer in answers if answer.ok),
        failures=tuple(sorted(reasons)),
        slowest_ms=max(answer.latency_ms for answer in answers),
    )


def _fault(answer: Answer, target: Target) -> str:
    """What is wrong with an answer; empty when nothing is."""
    if not answer.ok:
        return f"{answer.outcome.value} {answer.detail}"
    if answer.peer != target.address:
        return f"answered from {answer.peer}"
    return ""
