"""What iptables-restore is told: changes of one family's tables, collected and written down. Pure.

Within a table chains are made and emptied first, then single rules go and come, then chains are
filled, and those without use go last: no line names a chain that is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from ebpf_svc.dataplane.iptables import chains
from ebpf_svc.dataplane.iptables.chains import NAT
from ebpf_svc.host.kubeproxy import MARKER


@dataclass(slots=True)
class TableChanges:
    """Changes of one table."""

    fill: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Chain -> all it is to hold; made where it is missing."""
    delete: list[str] = field(default_factory=list)
    """Rules that go, word for word."""
    first: list[str] = field(default_factory=list)
    """Rules that come at the start of their chain, one before the other."""
    last: list[str] = field(default_factory=list)
    """Rules that come at the end."""
    drop: set[str] = field(default_factory=set)
    """Chains that go."""

    @property
    def rule_count(self) -> int:
        """Rules and chains the kernel is told about."""
        filled = sum(map(len, self.fill.values())) + len(self.fill)
        return filled + len(self.delete) + len(self.first) + len(self.last) + len(self.drop)

    def lines(self, table: str) -> Iterator[str]:
        """Input of iptables-restore --noflush; nothing when nothing changes."""
        if not self.rule_count:
            return
        yield f"*{table}"
        yield from (f":{chain} - [0:0]" for chain in self.fill)
        yield from (f":{chain} - [0:0]" for chain in sorted(self.drop))
        yield from (f"-D {rule}" for rule in self.delete)
        yield from (f"-I {rule}" for rule in self.first)
        yield from (f"-A {rule}" for rules in self.fill.values() for rule in rules)
        yield from (f"-A {rule}" for rule in self.last)
        yield from (f"-X {chain}" for chain in sorted(self.drop))
        yield "COMMIT"


class Script:
    """Changes of one family."""

    def __init__(self) -> None:
        # filter comes first: a service that refuses no longer must not refuse what nat sends on.
        self.tables: dict[str, TableChanges] = {}

    def of(self, table: str) -> TableChanges:
        return self.tables.setdefault(table, TableChanges())

    @property
    def rule_count(self) -> int:
        return sum(changes.rule_count for changes in self.tables.values())

    def texts(self, chains_at_once: int | None) -> Iterator[str]:
        """What to write, piece by piece.

        Args:
            chains_at_once: how many chains of service ports a piece may have; None = everything is
                one piece. Those of endpoints come before those that jump to them, and go after.
        """
        text = self._text
        if chains_at_once is None:
            yield from text(self.tables)
            return
        nat = self.of(NAT)
        mine = sorted(filter(chains.is_per_service, nat.fill), key=_height)
        gone = sorted(filter(chains.is_per_service, nat.drop), key=_height, reverse=True)
        # What fills no piece stays with the rest, so a small change is one transaction.
        early = mine[: _whole(len(mine), chains_at_once)]
        late = gone[len(gone) - _whole(len(gone), chains_at_once) :]
        if early and chains.MARK_MASQ in nat.fill:
            early.insert(0, chains.MARK_MASQ)
        for piece in _pieces(early, chains_at_once):
            yield from text({NAT: TableChanges({chain: nat.fill[chain] for chain in piece})})
        # What all others jump to, and what says whose they are.
        end = {chains.MARK_MASQ, MARKER} & nat.drop if late else set()
        left = nat.fill.keys() - early
        rest = TableChanges(
            {chain: rules for chain, rules in nat.fill.items() if chain in left},
            *(nat.delete, nat.first, nat.last),
            nat.drop - set(late) - end,
        )
        yield from text({**self.tables, NAT: rest})
        for piece in _pieces(late, chains_at_once):
            yield from text({NAT: TableChanges(drop=set(piece))})
        yield from text({NAT: TableChanges(drop=end)})

    @staticmethod
    def _text(tables: dict[str, TableChanges]) -> Iterator[str]:
        lines = [line for table in sorted(tables) for line in tables[table].lines(table)]
        if lines:
            yield "\n".join([*lines, ""])


def _height(chain: str) -> int:
    """Chains of a lower height never jump to those of a higher one."""
    order = ("KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-")
    return next(number for number, prefix in enumerate(order) if chain.startswith(prefix))


def _whole(count: int, at_once: int) -> int:
    """How many of them fill whole pieces."""
    return count // at_once * at_once


def _pieces(items: Iterable[str], size: int) -> Iterator[list[str]]:
    left = iter(items)
    while piece := list(islice(left, size)):
        yield piece
