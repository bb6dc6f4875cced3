"""Read and change iptables' rules as text, of both backends and both families.

A host may have rules in the legacy backend and in nf_tables at once: those of the one are invisible
to the other's tools, so every variant that is installed is looked at. Looking loads nothing: each
save command lists only the tables that exist.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebpf_svc.errors import CommandError
from ebpf_svc.host.command import run
from ebpf_svc.model.net import Family

TOOLS = {Family.V4: "iptables", Family.V6: "ip6tables"}
BACKENDS = ("legacy", "nft")
TIMEOUT_S = 300.0
"""A node of ten thousand services has a million lines."""
LOCK_S = 5
"""How long to wait for whoever else is writing, as kube-proxy does."""

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_TARGET = re.compile(r" -[jg] (\S+)")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, in the words of iptables-save."""

    chain: str
    text: str
    """All of it: `PREROUTING -m comment … -j KUBE-SERVICES`; `-A` or `-D` in front is a command."""

    @property
    def target(self) -> str:
        """Where it jumps or goes to; empty for a rule that only counts."""
        match = _TARGET.search(_QUOTED.sub('""', self.text) if '"' in self.text else self.text)
        return match[1] if match else ""


@dataclass(slots=True)
class Table:
    """A table as saved."""

    name: str
    chains: dict[str, str] = field(default_factory=dict)
    """Chain -> policy; `-` for those that are not built in."""
    rules: list[Rule] = field(default_factory=list)

    def is_built_in(self, chain: str) -> bool:
        return self.chains.get(chain, "-") != "-"


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of tools: a family and a backend."""

    family: Family
    backend: str
    """`legacy`, `nft`, or empty where the host has one unnamed set."""

    def __str__(self) -> str:
        return f"{TOOLS[self.family]}{f'-{self.backend}' if self.backend else ''}"

    def save(self, table: str = "") -> Mapping[str, Table]:
        """Every table that exists, or only that one, by name; raises CommandError."""
        if not table:
            return parse(run([f"{self}-save"], timeout_s=TIMEOUT_S))
        if self.backend == "legacy" and table not in _legacy_tables(self.family):
            return {}  # the legacy tool would make it
        return parse(run([f"{self}-save", "-t", table], timeout_s=TIMEOUT_S))

    def rules(self, table: str, chain: str) -> list[str]:
        """The rules of one chain, as `Rule.text`; raises CommandError when there is no chain."""
        argv = [str(self), "--wait", str(LOCK_S), "-t", table, "-S", chain]
        if self.backend == "legacy" and table not in _legacy_tables(self.family):
            raise CommandError(argv, 1, f"no table {table}")  # the tool would make it
        listed = run(argv)
        return [line[3:] for line in listed.splitlines() if line.startswith("-A ")]

    def restore(self, text: str) -> None:
        """Carry commands out, each table whole or not at all; raises CommandError."""
        argv = [f"{self}-restore", "--noflush", "--wait", str(LOCK_S)]
        run(argv, input=text, timeout_s=TIMEOUT_S)


def _legacy_tables(family: Family) -> list[str]:
    """Tables the legacy backend has in this thread's network namespace."""
    name = f"{TOOLS[family].removesuffix('tables')}_tables_names"
    try:
        return Path("/proc/thread-self/net", name).read_text().split()
    except OSError:
        return []


def variants(families: Sequence[Family]) -> tuple[Variant, ...]:
    """The sets of tools this host has."""
    return tuple(each for family in families for each in _of_family(family))


def _of_family(family: Family) -> Iterator[Variant]:
    named = [Variant(family, backend) for backend in BACKENDS]
    found = [each for each in named if shutil.which(f"{each}-save")]
    if not found and shutil.which(f"{TOOLS[family]}-save"):
        found = [Variant(family, "")]
    return iter(found)


def parse(text: str) -> dict[str, Table]:
    """Read what a save command printed.

    Raises:
        CommandError: a line stands outside any table.
    """
    tables: dict[str, Table] = {}
    table: Table | None = None
    for line in text.splitlines():
        if not line or line.startswith("#") or line == "COMMIT":
            continue
        if line.startswith("*"):
            table = tables.setdefault(line[1:], Table(line[1:]))
        elif table is None:
            raise CommandError(["iptables-save"], 0, f"a line before any table: {line}")
        elif line.startswith(":"):
            chain, policy, *_ = line[1:].split()
            table.chains[chain] = policy
        else:
            # `[packets:bytes] ` stands before the command when counters are saved too.
            _, _, rule = line.partition("-A ")
            table.rules.append(Rule(rule.partition(" ")[0], rule))
    return tables
