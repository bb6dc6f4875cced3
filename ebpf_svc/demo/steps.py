"""The second part of the tour: promises that take time to keep. Each returns its Step.

`note` is called with what happens meanwhile, for the screen.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ebpf_svc.demo.report import Asker, Step
from ebpf_svc.demo.stage import Stage
from ebpf_svc.errors import EbpfSvcError
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.testbed import traffic
from ebpf_svc.testbed.traffic import Account, Answer, Load, Outcome, Target

Note = Callable[[str], None]

AFFINITY_S = 2
"""`timeoutSeconds` of examples/sticky.yaml."""
TICK_S = 1.2
"""The kernel counts whole seconds, so a timeout may last one longer."""
NEWCOMER = "web-4"
LOAD_REQUESTS = 150
"""Answers each asker gets before, during and after a change."""
LOAD_DEADLINE_S = 20.0


class TourError(EbpfSvcError):
    """Something that should have happened during the tour did not."""


def refuse(stage: Stage, note: Note) -> Step:
    """A service without endpoints is refused at once."""
    note("calling a service that has no pods yet")
    targets = list(stage.targets("soon", FrontendKind.CLUSTER_IP))
    answers = [answer for group in _ask_everywhere(stage, targets).values() for answer in group]
    refused = [answer for answer in answers if answer.outcome is Outcome.REFUSED]
    slowest_ms = max(answer.latency_ms for answer in answers)
    detail = f"{len(refused)} of {len(answers)} refused, the slowest after {slowest_ms:.1f} ms"
    held = len(refused) == len(answers) > 0 and slowest_ms < 100
    return Step("no endpoints: refused at once", held, detail)


def hold_affinity(stage: Stage, note: Note) -> Step:
    """A client keeps its pod for as long as it keeps asking."""
    targets = list(stage.targets("sticky", FrontendKind.CLUSTER_IP))
    first = _servers(stage, targets)
    rounds = 5
    kept = True
    for number in range(rounds):
        note(f"asking again within {AFFINITY_S} s, {number + 1} of {rounds}")
        time.sleep(AFFINITY_S * 0.3)
        kept = kept and _servers(stage, targets) == first
    seconds = rounds * AFFINITY_S * 0.3
    spread = Counter(server for servers in first.values() for server in servers)
    detail = f"{len(first)} clients kept their pod for {seconds:.0f} s ({_shares(spread)})"
    held = kept and len(first) > 0 and all(len(servers) == 1 for servers in first.values())
    return Step("affinity holds while a client asks", held, detail)


def expire_affinity(stage: Stage, note: Note) -> Step:
    """A client that was silent for the timeout may get another pod."""
    targets = list(stage.targets("sticky", FrontendKind.CLUSTER_IP))
    before = _servers(stage, targets)
    note(f"silent for {AFFINITY_S + TICK_S:.1f} s")
    time.sleep(AFFINITY_S + TICK_S)
    after = _servers(stage, targets)
    moved = sum(after[client] != servers for client, servers in before.items())
    detail = f"{moved} of {len(before)} clients drew another pod after {AFFINITY_S} s of silence"
    return Step("affinity ends after its timeout", moved > 0, detail)


def add_and_remove(stage: Stage, note: Note) -> Iterator[Step]:
    """A pod joins and leaves under load: it gets its share, and no request fails."""
    manifest = stage.pod_manifest("web-3")
    manifest["metadata"]["name"] = NEWCOMER
    manifest["status"]["podIPs"] = [{"ip": "10.244.2.14"}, {"ip": "fd00:10:244:2::14"}]
    with _loads(stage) as loads:
        note("load from pod, host and outside")
        _await_answers(loads, LOAD_REQUESTS)
        note(f"{NEWCOMER} starts on node2")
        stage.add_pod(manifest)
        begun = time.monotonic()
        stage.publish(manifest)
        _await(loads, lambda account: NEWCOMER in account.servers)
        joined_ms = (time.monotonic() - begun) * 1e3
        _await_answers(loads, LOAD_REQUESTS)
        joined = _reset(loads)
        detail = f"{NEWCOMER} answered everyone {joined_ms:.0f} ms after its manifest came"
        yield _under_load("a backend joins under load", joined, detail)
        note(f"{NEWCOMER} leaves")
        stage.withdraw(NEWCOMER)
        left_ms = _await_silence(loads, NEWCOMER)
        _await_answers(loads, LOAD_REQUESTS)
        left = _reset(loads)
        detail = f"its last answer came {left_ms:.0f} ms after its manifest went"
        yield _under_load("a backend leaves under load", left, detail)


def restart_agent(stage: Stage, note: Note) -> Step:
    """The agent is killed and comes back: traffic does not notice."""
    agent = stage.agents[0]
    with _loads(stage) as loads:
        _await_answers(loads, LOAD_REQUESTS)
        note("kill -9 of node1's agent")
        agent.kill()
        _await_answers(loads, 2 * LOAD_REQUESTS)
        note("node1's agent starts again")
        ready_s = agent.start()
        _await_answers(loads, 3 * LOAD_REQUESTS)
        accounts = _reset(loads)
    detail = f"ready {ready_s * 1e3:.0f} ms after it was started"
    return _under_load("an agent is killed and restarted under load", accounts, detail)


def clean_up(stage: Stage, note: Note) -> Step:
    """`ebpf-svc cleanup` leaves nothing of ours in the kernel."""
    note("ebpf-svc cleanup on both nodes")
    for agent in stage.agents:
        agent.stop()
    held_before = len(stage.leftovers())
    for agent in stage.agents:
        agent.cleanup()
    left = stage.leftovers()
    detail = ", ".join(left) or f"{held_before} filters, pins, hooks and rules removed"
    return Step("cleanup leaves nothing behind", not left and held_before > 0, detail)


def _ask_everywhere(
    stage: Stage, targets: list[Target], count: int = 2
) -> Mapping[tuple[Asker, Target], list[Answer]]:
    asked = [(asker, target) for asker in Asker for target in targets]
    answers = traffic.ask_all(
        [traffic.Probe(stage.askers[asker], target, count) for asker, target in asked]
    )
    return dict(zip(asked, answers, strict=True))


def _servers(stage: Stage, targets: list[Target]) -> dict[tuple[Asker, Target], frozenset[str]]:
    """Who answered each client; a failure counts as a server of its own."""
    return {
        client: frozenset(traffic.spread(answers))
        for client, answers in _ask_everywhere(stage, targets).items()
    }


@contextmanager
def _loads(stage: Stage) -> Iterator[dict[Asker, Load]]:
    """Everyone asks the addresses of their kind all the time, both families and protocols."""
    cluster_ip = list(stage.targets("web", FrontendKind.CLUSTER_IP))
    external = [
        *stage.node_port_targets("web-nodeport", "node1"),
        *stage.node_port_targets("web-nodeport", "node2"),
        *stage.targets("web-loadbalancer", FrontendKind.LOAD_BALANCER),
    ]
    chosen = {Asker.POD: cluster_ip, Asker.HOST: [*cluster_ip, *external], Asker.OUTSIDE: external}
    with ExitStack() as stack:
        yield {
            asker: stack.enter_context(traffic.load(host, chosen[asker]))
            for asker, host in stage.askers.items()
        }


def _await(loads: Mapping[Asker, Load], enough: Callable[[Account], bool]) -> None:
    deadline = time.monotonic() + LOAD_DEADLINE_S
    while not all(enough(load.read()) for load in loads.values()):
        if time.monotonic() > deadline:
            raise TourError(f"no change under load: {[load.read() for load in loads.values()]}")
        time.sleep(0.01)


def _await_answers(loads: Mapping[Asker, Load], count: int) -> None:
    """Wait until every load has had that many requests since its last reset, failed or not."""
    _await(loads, lambda account: account.ok + account.failed >= count)


def _await_silence(loads: Mapping[Asker, Load], server: str) -> float:
    """Wait until a server answers nobody any more; returns the milliseconds that took."""
    begun = last = time.monotonic()
    seen = -1
    while time.monotonic() - last < 0.3:
        now = sum(load.read().servers.get(server, 0) for load in loads.values())
        if now != seen:
            seen, last = now, time.monotonic()
        if last - begun > LOAD_DEADLINE_S:
            raise TourError(f"{server} still answers")
        time.sleep(0.01)
    return (last - begun) * 1e3


def _reset(loads: Mapping[Asker, Load]) -> list[Account]:
    return [load.read(reset=True) for load in loads.values()]


def _under_load(name: str, accounts: list[Account], detail: str) -> Step:
    answered = sum(account.ok for account in accounts)
    failed = sum(account.failed for account in accounts)
    failures = [failure for account in accounts for failure in account.failures]
    text = f"{answered:,} requests answered, {failed} failed; {detail}"
    if failures:
        first = failures[0]
        text += f" ({first['outcome']} {first['detail']} at {first['address']} {first['port']})"
    return Step(name, failed == 0, text, {"answered": answered, "failed": failed})


def _shares(servers: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(servers.items()))
