"""Expressions of nf_tables: what is encoded is decoded again, and looks as nft encodes it."""

from __future__ import annotations

import pytest

from ebpf_svc.host import nf_expr as nf
from ebpf_svc.host.netlink import attribute
from ebpf_svc.host.nf_expr import Expression, Unknown, Verdict, encode_expression, expressions_in

EXPRESSIONS = (
    nf.Payload(nf.NETWORK_HEADER, 12, 4, 9),
    nf.Meta(nf.META_MARK),
    nf.Meta(nf.META_MARK, register=None, source=1),
    nf.Ct(nf.CT_STATUS),
    nf.Fib(nf.FIB_TYPE, nf.FIB_SADDR),
    nf.Numgen(3, offset=4096),
    nf.Cmp(b"\x06"),
    nf.Cmp(b"lo".ljust(16, b"\0"), nf.NOT_EQUAL),
    nf.Bitwise(b"\0\x40\0\0", bytes(4), 4),
    nf.Immediate(Verdict(nf.GOTO, "service-X")),
    nf.Immediate(Verdict(nf.DROP)),
    nf.Immediate(b"\0\x50", 2),
    nf.Lookup("service-ips", register=0),
    nf.Lookup("cluster-ips"),
    nf.Lookup("ranges", flags=nf.INVERT),
    nf.Dynset("affinity-X"),
    nf.Nat(2, 1, 9, address_max=1, port_max=9),
    nf.Masquerade(),
    nf.Reject(3),
    nf.Reject(None, nf.TCP_RESET),
)


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda each: each.KIND)
def test_expression_is_read_as_written(expression: Expression) -> None:
    """One definition serves both ways."""
    assert expressions_in(encode_expression(expression)) == (expression,)


def test_expressions_keep_their_order() -> None:
    """A rule is a list."""
    assert expressions_in(b"".join(map(encode_expression, EXPRESSIONS))) == EXPRESSIONS


def test_reject_is_encoded_as_nft_does() -> None:
    """Bytes of `nft --debug=mnl add rule … reject`."""
    assert encode_expression(nf.Reject(3)) == bytes.fromhex(
        "24 00 01 80  0b 00 01 00 72 65 6a 65 63 74 00 00"
        "14 00 02 80  08 00 01 00 00 00 00 00  05 00 02 00 03 00 00 00"
    )


def test_foreign_expression_equals_nothing_of_ours() -> None:
    """A rule with a counter in it is not the rule we wrote."""
    body = attribute(1, b"counter\0") + attribute(2 | nf.NESTED, b"")
    (found,) = expressions_in(attribute(1 | nf.NESTED, body))
    assert isinstance(found, Unknown)
    assert found.kind == "counter"


def test_broken_expression_is_foreign() -> None:
    """A dump of a later kernel may lack what we expect: no crash, a difference."""
    body = attribute(1, b"reject\0") + attribute(2 | nf.NESTED, attribute(2, b""))
    (found,) = expressions_in(attribute(1 | nf.NESTED, body))
    assert isinstance(found, Unknown)


def test_registers_are_numbered_as_dumped() -> None:
    """Sixteen bytes each at the front, four bytes each behind (as nft prints them)."""
    assert [nf.register(offset) for offset in (0, 4, 8, 16, 20, 32, 36)] == [1, 9, 10, 2, 13, 3, 17]
