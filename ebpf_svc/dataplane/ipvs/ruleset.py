"""Our rules among those that are there: what to write, and what takes them away. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ebpf_svc.dataplane.ipvs.rules import (
    ALL,
    FILTER,
    FIREWALL,
    FORWARD,
    MARK_MASQ,
    NAT,
    NODE_PORT,
    OURS,
    POSTROUTING,
    SERVICES,
    RuleOptions,
    contents,
    jumps,
)
from ebpf_svc.host.iptables import Table
from ebpf_svc.host.kubeproxy import MARKER

Rules = tuple[str, ...]
Wording = Mapping[tuple[str, str, Rules], Rules]
"""(table, chain, its rules as written) -> the same as the host's tool prints them."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What leads from the rules that were saved to ours."""

    text: str
    """Input of iptables-restore --noflush; empty when nothing is to change."""
    count: int
    """Rules and chains written."""
    found: tuple[str, ...]
    """What was missing, changed or too much, in words."""


def difference(
    options: RuleOptions,
    tables: Mapping[str, Table],
    occupied: Collection[str] = ALL,
    wording: Wording | None = None,
) -> Changes:
    """Compare what is there with what should be; rules and chains of others are left alone.

    Args:
        options: how our rules look.
        tables: as saved.
        occupied: sets that have elements.
        wording: how this host's tool words rules it was given; what is missing is worded as here.
    """
    lines: list[str] = []
    found: list[str] = []
    count = 0
    for name, chains in contents(options, occupied).items():
        table = tables.get(name) or Table(name)
        if not any(chains.values()) and not table.chains.keys() & chains.keys():
            continue  # each table costs every packet, also one in which nothing is asked
        changes = _table_difference(table, chains, wording or {})
        lines += changes.lines
        count += changes.count
        found += (f"{options.family.label} {name}: {each}" for each in changes.found)
    return Changes("\n".join([*lines, ""]) if lines else "", count, tuple(found))


@dataclass(frozen=True, slots=True)
class _TableChanges:
    lines: list[str]
    count: int
    found: list[str]


def _table_difference(table: Table, chains: Mapping[str, Rules], wording: Wording) -> _TableChanges:
    held = _by_chain(table)
    filled = {
        chain: rules
        for chain, rules in chains.items()
        if chain not in table.chains
        or tuple(held.get(chain, ())) != wording.get((table.name, chain, rules), rules)
    }
    absent: list[str] = []
    idle: list[str] = []
    for jump, to in jumps(table.name):
        there = _jump_there(held, jump)
        if chains[to] and there is None:
            absent.append(jump)
        elif not chains[to] and there is not None:
            idle.append(there)
    if not (filled or absent or idle):
        return _TableChanges([], 0, [])
    rules = [rule for written in filled.values() for rule in written]
    lines = [f"*{table.name}", *(f":{chain} - [0:0]" for chain in filled)]
    lines += (f"-A {rule}" for rule in rules)
    lines += (f"-I {rule}" for rule in absent)
    lines += (f"-D {rule}" for rule in idle)
    found = [
        f"chain {chain} was {'changed' if chain in table.chains else 'missing'}" for chain in filled
    ]
    found += (f"jump to {rule.split()[-1]} was missing" for rule in absent)
    found += (f"jump to {rule.split()[-1]} was too much" for rule in idle)
    return _TableChanges(
        [*lines, "COMMIT"], len(filled) + len(rules) + len(absent) + len(idle), found
    )


def wording_of(
    options: RuleOptions, tables: Mapping[str, Table], occupied: Collection[str] = ALL
) -> Wording:
    """How the host's tool words our chains, which were just written."""
    held = {name: _by_chain(table) for name, table in tables.items()}
    return {
        (name, chain, rules): tuple(held.get(name, {}).get(chain, ()))
        for name, chains in contents(options, occupied).items()
        for chain, rules in chains.items()
    }


def _jump_there(held: Mapping[str, list[str]], rule: str) -> str | None:
    """A jump as it is there, under whatever comment: only its ends tell it; None = it is not."""
    chain, _, rest = rule.partition(" ")
    end = rest[rest.rindex(" -j ") :]
    for each in held.get(chain, ()):
        if each.endswith(end) and ("--comment" in each or each == chain + end):
            return each
    return None


def removal(tables: Mapping[str, Table], *, marker: bool) -> str:
    """What takes our chains away with every jump to them, or in the end only the sign of them.

    Chains whose names the iptables mode has as well are left where that mode serves by now.

    Args:
        tables: as saved.
        marker: remove the sign that they are ours, not the chains themselves.
    """
    lines: list[str] = []
    shared = _shared(tables)
    for name, owned in OURS.items():
        table = tables.get(name)
        names = [MARKER] if marker and name == NAT else [] if marker else owned
        chains = [
            chain
            for chain in names
            if table and chain in table.chains and (name, chain) not in shared
        ]
        if table is None or not chains:
            continue
        lines.append(f"*{name}")
        lines += (f":{chain} - [0:0]" for chain in chains)
        lines += (
            f"-D {rule.text}"
            for rule in table.rules
            if rule.target in chains and rule.chain not in chains
        )
        lines += (f"-X {chain}" for chain in chains)
        lines.append("COMMIT")
    return "\n".join([*lines, ""]) if lines else ""


def is_ours(tables: Mapping[str, Table]) -> bool:
    """Whether rules of this mode stand here, and are our agent's rather than kube-proxy's.

    The sign alone is left where a removal was cut short.
    """
    nat = tables.get(NAT)
    if nat is None or MARKER not in nat.chains:
        return False
    return NODE_PORT in nat.chains or not _is_iptables_mode(tables)


def _is_iptables_mode(tables: Mapping[str, Table]) -> bool:
    """Whether the iptables mode has its rules here, not only chains it left behind.

    It alone has KUBE-NODEPORTS; the chain both begin with asks no sets then.
    """
    nat = tables.get(NAT)
    return (
        nat is not None
        and "KUBE-NODEPORTS" in nat.chains
        and not any(rule.chain == SERVICES and "--match-set" in rule.text for rule in nat.rules)
    )


def _shared(tables: Mapping[str, Table]) -> frozenset[tuple[str, str]]:
    if not _is_iptables_mode(tables):
        return frozenset()
    return frozenset(
        {
            *((NAT, chain) for chain in (SERVICES, POSTROUTING, MARK_MASQ, MARKER)),
            *((FILTER, chain) for chain in (FORWARD, FIREWALL)),
        }
    )


def _by_chain(table: Table) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rule in table.rules:
        found.setdefault(rule.chain, []).append(rule.text)
    return found
