"""Masquerade packets that carry our mark, by one netfilter rule.

Netfilter stays the only allocator of source ports, so nothing collides with the host's own
connections. Where `nft` is missing a chain of iptables does the same.

Packets keep their mark when a tunnel wraps them; masqueraded once more, the outer packet would get
a source port the other node's tunnel does not expect. Hence the second chain, which clears the mark
of every packet after source NAT. (iptables has no hook there: its chain clears the mark of the
first packet of each flow, as kube-proxy does.)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Protocol

from ebpf_svc.errors import CommandError
from ebpf_svc.host.command import run

TABLE = "inet ebpf-svc"
CHAIN = "EBPF-SVC-MASQ"
PORTS = (1024, 29999)
"""Source ports of masqueraded packets, apart from all others (docs/decisions/0015): no node port,
or the answer to one would look like a request to that node port (B9); none that sockets get by
themselves (32768 to 60999); none that the eBPF programs give out (from 61000)."""
_ALL = 0xFFFFFFFF


class MasqueradeRules(Protocol):
    """The rules of one network namespace, that of the calling thread."""

    name: str
    """What they are called in the tool's listing."""

    def exists(self) -> bool:
        """Whether anything of ours is there, in whatever shape; raises CommandError."""

    def apply(self) -> None:
        """Make the rules be there, whatever was there before; raises CommandError."""

    def read(self) -> bool:
        """Whether the rules are there as the last `apply` left them."""

    def remove(self) -> bool:
        """Remove every rule of ours; return whether there was one. Raises CommandError."""


def masquerade_rules(mark: int) -> MasqueradeRules:
    """The rules for packets with that bit of the mark set, by the tool this host has.

    Raises:
        CommandError: it has neither nft nor iptables.
    """
    if shutil.which("nft"):
        return NftRules(mark)
    if shutil.which("iptables"):
        return IptablesRules(mark)
    raise CommandError(["nft"], 127, "neither nft nor iptables is installed")


def render(mark: int) -> str:
    """The transaction that makes our table hold exactly our rules.

    Chains that stand are kept, only emptied: a NAT chain that goes takes the translation of live
    connections with it until the next one is there.
    """
    marked = f"meta mark & {mark:#010x} == {mark:#010x}"
    masquerade = f"masquerade to :{PORTS[0]}-{PORTS[1]} fully-random"
    return f"""\
add table {TABLE}
add chain {TABLE} postrouting {{ type nat hook postrouting priority srcnat; policy accept; }}
add chain {TABLE} clear {{ type filter hook postrouting priority srcnat + 10; policy accept; }}
flush table {TABLE}
add rule {TABLE} postrouting {marked} meta l4proto {{ tcp, udp, sctp }} {masquerade}
add rule {TABLE} clear {marked} meta mark set meta mark & {_ALL & ~mark:#010x}
"""


class NftRules:
    """The rules as an nftables table of both families."""

    name = f"table {TABLE}"

    def __init__(self, mark: int) -> None:
        self._mark = mark
        self._applied: str | None = None

    def exists(self) -> bool:
        return self._list() is not None

    def apply(self) -> None:
        text = render(self._mark)
        try:
            run(["nft", "-f", "-"], input=text)
        except CommandError:
            # A chain of that name with another hook is in the way: start over, in one transaction.
            run(["nft", "-f", "-"], input=f"add table {TABLE}\ndelete table {TABLE}\n{text}")
        self._applied = self._list()

    def read(self) -> bool:
        # nft words rules differently from version to version: compare with what it said itself.
        return self._applied is not None and self._list() == self._applied

    def remove(self) -> bool:
        self._applied = None
        if self._list() is None:
            return False
        run(["nft", "delete", "table", *TABLE.split()])
        return True

    def _list(self) -> str | None:
        """The table as nft prints it, without counters; None when it is not there."""
        try:
            return run(["nft", "--stateless", "list", "table", *TABLE.split()])
        except CommandError as exc:
            if "No such file" in exc.stderr:
                return None
            raise


class IptablesRules:
    """The rules as a chain of the nat table, once a family."""

    TOOLS = ("iptables", "ip6tables")
    name = f"chain {CHAIN}"

    def __init__(self, mark: int) -> None:
        bit, ports = f"{mark:#x}", f"{PORTS[0]}-{PORTS[1]}"
        self._rules: tuple[Sequence[str], ...] = (
            ["-m", "mark", "!", "--mark", f"{bit}/{bit}", "-j", "RETURN"],
            ["-j", "MARK", "--set-xmark", f"0x0/{bit}"],
            *(
                ["-p", protocol, "-j", "MASQUERADE", "--to-ports", ports, "--random-fully"]
                for protocol in ("tcp", "udp", "sctp")
            ),
        )

    def exists(self) -> bool:
        return any(_succeeds(tool, "-S", CHAIN) for tool in self.TOOLS)

    def apply(self) -> None:
        lines = [f":{CHAIN} - [0:0]", *(f"-A {CHAIN} {' '.join(rule)}" for rule in self._rules)]
        text = "\n".join(["*nat", *lines, "COMMIT", ""])
        for tool in self.TOOLS:
            run([f"{tool}-restore", "--noflush", "--wait"], input=text)
            if not _succeeds(tool, "-C", "POSTROUTING", "-j", CHAIN):
                run([tool, "-w", "-t", "nat", "-I", "POSTROUTING", "-j", CHAIN])

    def read(self) -> bool:
        return all(
            _succeeds(tool, "-C", *rule)
            for tool in self.TOOLS
            for rule in (["POSTROUTING", "-j", CHAIN], *([CHAIN, *rule] for rule in self._rules))
        )

    def remove(self) -> bool:
        found = False
        for tool in self.TOOLS:
            if not _succeeds(tool, "-S", CHAIN):
                continue
            found = True
            while _succeeds(tool, "-D", "POSTROUTING", "-j", CHAIN):
                pass
            run([tool, "-w", "-t", "nat", "-F", CHAIN])
            run([tool, "-w", "-t", "nat", "-X", CHAIN])
        return found


def _succeeds(tool: str, *arguments: str) -> bool:
    try:
        run([tool, "-w", "-t", "nat", *arguments])
    except CommandError:
        return False
    return True
