"""Whose a table of nf_tables named `kube-proxy` is: ours are signed.

A comment alone would not do. kube-proxy, when it starts in nftables mode, goes on with the table it
finds, and the comment stays; but it removes every chain with a slash in its name that it did not
write, and one such chain is the other half of the sign.
"""

from __future__ import annotations

from contextlib import closing

from ebpf_svc.host.nf_dump import Held, has_chain, table_comment
from ebpf_svc.host.nf_tables import IPV4, IPV6, Chain, Table
from ebpf_svc.host.nfnetlink import Socket
from ebpf_svc.model.net import Family

NAME = "kube-proxy"
TABLES = {Family.V4: Table(IPV4, NAME), Family.V6: Table(IPV6, NAME)}
SIGN = "ebpf-svc"
"""What the comment of our tables starts with."""
COMMENT = f"{SIGN}: rules for Services"
SIGN_CHAIN = Chain("ebpf-svc/wrote-this", comment="kube-proxy removes it when it takes over")


def is_ours(socket: Socket, table: Table) -> bool:
    """Whether there is such a table, and we wrote it."""
    comment = table_comment(socket, table)
    return (
        comment is not None
        and comment.startswith(SIGN)
        and has_chain(socket, table, SIGN_CHAIN.name)
    )


def is_signed(held: Held) -> bool:
    """The same for a table that was read."""
    return held.comment.startswith(SIGN) and SIGN_CHAIN.name in held.chains


def own_tables() -> tuple[Family, ...]:
    """The families of this network namespace in which we wrote the table; raises OSError."""
    with closing(Socket()) as socket:
        return tuple(family for family, table in TABLES.items() if is_ours(socket, table))
