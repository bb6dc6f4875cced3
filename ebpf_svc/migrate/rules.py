"""Which iptables chains are kube-proxy's, and what to write to be rid of them.

Pure. Chains go by exact name, never by their `KUBE-` alone: kubelet's (KUBE-FIREWALL,
KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT, KUBE-MARK-DROP) and those of others (kube-router's
KUBE-ROUTER-…, KUBE-POD-FW-…) begin with it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ebpf_svc.host.iptables import Rule, Table

Served = tuple[str, int, str]
"""A frontend: address (empty for a node port), port, protocol in upper case."""

MARK, POSTROUTING = "KUBE-MARK-MASQ", "KUBE-POSTROUTING"
"""The first asks for a masquerade, the second does it: neither is of use without the other."""

FIXED: Mapping[str, frozenset[str]] = {
    "nat": frozenset(
        {
            *("KUBE-SERVICES", "KUBE-NODEPORTS", MARK, POSTROUTING, "KUBE-PROXY-CANARY"),
            # ipvs (V14)
            *("KUBE-NODE-PORT", "KUBE-LOAD-BALANCER"),
            # userspace, gone since 1.26 (U2)
            *("KUBE-PORTALS-CONTAINER", "KUBE-PORTALS-HOST"),
            *("KUBE-NODEPORT-CONTAINER", "KUBE-NODEPORT-HOST"),
        }
    ),
    "filter": frozenset(
        {
            *("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-FORWARD"),
            *("KUBE-PROXY-FIREWALL", "KUBE-PROXY-CANARY"),
            *("KUBE-NODE-PORT", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER"),
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-NODEPORT-NON-LOCAL",
        }
    ),
    "mangle": frozenset({"KUBE-PROXY-CANARY"}),
}
"""Table -> chains of every mode (§2.1, V14, I24)."""

_SERVING = (
    *(("nat", "KUBE-SERVICES"), ("nat", "KUBE-NODEPORTS")),
    *(("filter", "KUBE-SERVICES"), ("filter", "KUBE-EXTERNAL-SERVICES")),
)
_PER_SERVICE = re.compile(r"KUBE-(?:SVC|SVL|SEP|FW|EXT|XLB)-[A-Z2-7]{16}")
"""Names made of a hash (I17), all in nat."""
_TO_NODE_PORT = re.compile(r"-p (\w+) .*?--dport (\d+)")
_TO_VIP = re.compile(r"-d (\S+?)(?:/32|/128)? -p (\w+) .*?--dport (\d+)")


@dataclass(frozen=True, slots=True)
class Kept:
    """A chain of kube-proxy's that has to stay."""

    chain: str
    why: str


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes from one table."""

    table: str
    chains: tuple[str, ...]
    jumps: tuple[str, ...]
    """Rules of chains that stay, word for word."""
    kept: tuple[Kept, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.chains

    def restore_text(self) -> str:
        """Input for iptables-restore --noflush: empty the chains, take the jumps away, drop them.

        In this order no rule ever names a chain that is not there.
        """
        lines = [
            f"*{self.table}",
            *(f":{chain} - [0:0]" for chain in self.chains),
            *(f"-D {jump}" for jump in self.jumps),
            *(f"-X {chain}" for chain in self.chains),
            "COMMIT",
        ]
        return "\n".join(lines) + "\n"


def is_kube_proxys(table: str, chain: str) -> bool:
    """Whether a chain of that table is one that kube-proxy makes, in any of its modes."""
    return chain in FIXED.get(table, ()) or (
        table == "nat" and _PER_SERVICE.fullmatch(chain) is not None
    )


def plan_removal(table: Table) -> Removal:
    """Decide what of a table can go.

    A chain that somebody else's chain jumps to stays, with all that it needs itself: the portmap
    plugin of a CNI may mark packets through KUBE-MARK-MASQ.
    """
    ours = {chain for chain in table.chains if is_kube_proxys(table.name, chain)}
    kept = _kept(table, ours)
    gone = ours - kept.keys()
    jumps = tuple(
        rule.text for rule in table.rules if rule.chain not in gone and rule.target in gone
    )
    return Removal(
        table.name,
        tuple(chain for chain in table.chains if chain in gone),
        jumps,
        tuple(Kept(chain, why) for chain, why in sorted(kept.items())),
    )


def _kept(table: Table, ours: set[str]) -> dict[str, str]:
    """Chains that are needed by others -> by whom."""
    needed_by: dict[str, str] = {}
    by_chain: dict[str, list[Rule]] = {}
    for rule in table.rules:
        by_chain.setdefault(rule.chain, []).append(rule)
        is_foreign = rule.chain not in ours and not table.is_built_in(rule.chain)
        if is_foreign and rule.target in ours:
            needed_by.setdefault(rule.target, f"chain {rule.chain} jumps to it")
    waiting = list(needed_by)
    while waiting:
        chain = waiting.pop()
        needs = {rule.target for rule in by_chain.get(chain, ())} & ours
        if chain == MARK and POSTROUTING in ours:
            needs.add(POSTROUTING)
        for other in sorted(needs - needed_by.keys()):
            needed_by[other] = f"{chain}, which stays, needs it"
            waiting.append(other)
    return needed_by


def services_in(tables: Mapping[str, Table]) -> frozenset[Served]:
    """What rules serve or, for frontends without endpoints, refuse (I1, I2, I7, I8)."""
    found: set[Served] = set()
    for table, chain in _SERVING:
        for rule in tables[table].rules if table in tables else ():
            if rule.chain != chain:
                continue
            if match := _TO_VIP.search(rule.text):
                found.add((match[1], int(match[3]), match[2].upper()))
            elif match := _TO_NODE_PORT.search(rule.text):
                found.add(("", int(match[2]), match[1].upper()))
    return frozenset(found)


def drops_by_default(table: Table, removal: Removal) -> bool:
    """Whether the table forwards nothing unasked while a chain that asked goes (KUBE-FORWARD)."""
    return "KUBE-FORWARD" in removal.chains and table.chains.get("FORWARD") == "DROP"
