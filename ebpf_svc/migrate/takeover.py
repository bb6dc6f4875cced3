"""From kube-proxy to us: look, check that nothing would be lost, remove.

Connections made under kube-proxy's rules live on. Netfilter translates a connection by its
conntrack entry, not by the rule that made it, and goes on as long as any NAT chain of the family is
there: our own table's is. Our programs leave TCP they did not see open to the stack. What IPVS
carries is different: a connection dies with its virtual server, so those wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ebpf_svc.errors import CommandError, DataplaneError
from ebpf_svc.host import ipvs, kubeproxy
from ebpf_svc.host.kubeproxy import Sign
from ebpf_svc.migrate.agent import START_IT, AgentView
from ebpf_svc.migrate.inventory import Inventory, IptablesFound, Part, look
from ebpf_svc.migrate.rules import Served, plan_removal
from ebpf_svc.model.net import Family

ATTEMPTS = 3
"""How often to read anew and try again when somebody changed a table meanwhile."""
POLL_S = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Something that speaks against going on."""

    what: str
    mend: str
    forcible: bool
    """`--force` may overrule it."""


@dataclass(slots=True)
class Outcome:
    """What became of it."""

    removed: list[Part] = field(default_factory=list)
    kept: list[Part] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def obstacles(
    found: Inventory, signs: Sequence[Sign], agent: AgentView | None, *, keeps_nat: bool
) -> Iterator[Obstacle]:
    """What speaks against removing kube-proxy's rules now; nothing in the best of cases.

    Args:
        agent: None = none serves here.
        keeps_nat: a NAT chain of ours is there. With the last one of a family the kernel stops
            translating, live connections included.
    """
    for sign in signs:
        yield Obstacle(
            f"kube-proxy runs ({sign.what}: {sign.detail}) and would write its rules again",
            kubeproxy.STOP_IT,
            forcible=False,
        )
    if agent is None:
        yield Obstacle("no agent of ours serves here", START_IT, forcible=False)
        return
    if not keeps_nat:
        yield Obstacle(
            "our masquerade rules are not there, and connections of kube-proxy's need them",
            "the agent writes them again within its resync period: try again then",
            forcible=False,
        )
    missing = uncovered(found, agent.served)
    if missing:
        yield Obstacle(
            f"kube-proxy's rules serve what our agent does not: {frontends_text(missing)}",
            "`ebpf-svc show problems` may say why; --force when those Services are gone",
            forcible=True,
        )
    if agent.failed:
        yield Obstacle(
            f"our agent could not write everything: {'; '.join(agent.failed[:3])}",
            "see its log",
            forcible=True,
        )


def warnings(found: Inventory) -> Iterator[str]:
    """What to know before, without being a reason to stop."""
    for each in found.iptables:
        if each.forward_drops:
            yield (
                f"{each.variant}: the policy of FORWARD is DROP and KUBE-FORWARD, which lets "
                "service traffic pass, goes: see that the CNI's rules accept pod traffic"
            )


def uncovered(found: Inventory, served: frozenset[Served]) -> list[Served]:
    """Frontends of kube-proxy's that we do not serve, sorted.

    IPVS serves a node port at each address, so a node port of ours covers any address.
    """
    return sorted(
        (address, port, protocol)
        for address, port, protocol in found.served
        if (address, port, protocol) not in served and ("", port, protocol) not in served
    )


def frontends_text(missing: Sequence[Served]) -> str:
    """The first few frontends, and how many more."""
    shown = ", ".join(
        f"{f'[{address}]:' if ':' in address else f'{address}:' if address else 'node port '}"
        f"{port}/{protocol}"
        for address, port, protocol in missing[:5]
    )
    return shown + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")


def remove(
    families: Sequence[Family],
    ours: frozenset[Served],
    *,
    drain_s: float,
    say: Say,
) -> Outcome:
    """Remove everything of kube-proxy's; one thing that fails does not hold back the others.

    Safe to repeat: what is gone is not looked for.

    Args:
        ours: what our agent serves.
        drain_s: how long to wait for connections that IPVS carries; those that are left then keep
            their virtual servers.
        say: told of every step.
    """
    outcome = Outcome()
    before = look(families, ours)
    _remove_rules(before, outcome, say)
    if before.nft:
        say(f"removing nft tables {', '.join(before.nft)}")
        _try(kubeproxy.remove_nft_tables, outcome)
    after = _drain(look(families, ours), families, ours, drain_s, say)
    if after.active_count == 0:
        if after.virtual_servers:
            say(f"removing {len(after.virtual_servers)} virtual servers of IPVS")
            _try(lambda: ipvs.remove(after.virtual_servers), outcome)
        if after.link is not None and not after.foreign_servers:
            say(f"removing device {kubeproxy.LINK}")
            _try(kubeproxy.remove_link, outcome)
    # Only now: no rule and no chain names a set any more.
    if after.ipsets:
        say(f"removing {len(after.ipsets)} ipsets")
        _try(lambda: kubeproxy.remove_ipsets(after.ipsets), outcome)
    _account(before, look(families, ours), outcome)
    return outcome


def _remove_rules(found: Inventory, outcome: Outcome, say: Say) -> None:
    for each in found.iptables:
        count = sum(len(removal.chains) for removal in each.removals)
        if count:
            say(f"removing {count} chains ({each.variant})")
            _try(lambda each=each: _restore(each), outcome)  # type: ignore[misc]


def _restore(found: IptablesFound) -> None:
    """Remove one variant's chains, table by table, reading anew when a table changed meanwhile."""
    removals = found.removals
    for attempt in range(ATTEMPTS):
        text = "".join(removal.restore_text() for removal in removals if not removal.empty)
        try:
            if text:
                found.variant.restore(text)
            return
        except CommandError:
            if attempt == ATTEMPTS - 1:
                raise
        removals = tuple(plan_removal(table) for table in found.variant.save().values())


def _drain(
    found: Inventory,
    families: Sequence[Family],
    ours: frozenset[Served],
    drain_s: float,
    say: Say,
) -> Inventory:
    """Wait for connections through IPVS to end."""
    deadline = time.monotonic() + drain_s
    waited_for = {(each.address, each.port, each.protocol) for each in found.virtual_servers}
    count = told = found.active_count
    while count and time.monotonic() < deadline:
        say(f"waiting for {told} connections through IPVS")
        while count == told and time.monotonic() < deadline:
            time.sleep(POLL_S)
            count = sum(
                each.active_count
                for each in ipvs.virtual_servers()
                if (each.address, each.port, each.protocol) in waited_for
            )
        told = count
    return look(families, ours) if told != found.active_count else found


def _try(step: Callable[[], None], outcome: Outcome) -> None:
    try:
        step()
    except (DataplaneError, OSError) as error:
        outcome.failures.append(str(error))


def _account(before: Inventory, after: Inventory, outcome: Outcome) -> None:
    """Compare what was there with what is."""
    left = {(part.kind, part.where): part for part in after.parts() if not part.kept}
    outcome.kept += [part for part in after.parts() if part.kept]
    for part in before.parts():
        if part.kept:
            continue
        still = left.get((part.kind, part.where))
        if still is None:
            outcome.removed.append(part)
            continue
        why = "could not be removed"
        if after.active_count and part.where in ("IPVS", "links"):
            why = f"{after.active_count} connections still pass IPVS: migrate again later"
        elif after.foreign_servers and part.where == "links":
            why = "foreign virtual servers may use it"
        outcome.kept.append(Part(still.kind, still.where, still.names, still.count, why))
