"""Words of the network: protocols, families, addresses.

An address is a string in canonical form (`10.96.0.1`, `fd00::1`), a prefix `ADDRESS/LENGTH`.
Strings compare, hash and
print as they are; only the codecs at the kernel's edge turn them into bytes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import IntEnum, IntFlag, StrEnum
from functools import lru_cache

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
EVERYWHERE = ("0.0.0.0/0", "::/0")
"""Prefixes every address is in."""


class Family(IntEnum):
    """An IP family; the value is the IP version."""

    V4 = 4
    V6 = 6

    # An enumeration's own hash is a line of Python, and members are in every key.
    __hash__ = int.__hash__

    @property
    def label(self) -> str:
        """The label value kube-proxy's metrics use (rule MX1)."""
        return f"IPv{self.value}"


class Protocol(StrEnum):
    """A transport protocol, in the API's spelling."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"

    __hash__ = str.__hash__

    @property
    def number(self) -> int:
        """The IANA protocol number."""
        return _NUMBERS[self]

    @classmethod
    def from_number(cls, number: int) -> Protocol:
        """The protocol with that IANA number; raises KeyError for any other."""
        return _PROTOCOLS[number]


_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}
_PROTOCOLS = {number: protocol for protocol, number in _NUMBERS.items()}


class Sources(IntFlag):
    """Classes of clients a frontend may treat differently (kube-proxy rules P1-P10)."""

    NONE = 0
    POD = 1
    NODE = 2
    EXTERNAL = 4
    ALL = 7


def family_of(address: str) -> Family:
    """The family of a canonical address or prefix."""
    return Family.V6 if ":" in address else Family.V4


def canonical_address(text: str) -> str:
    """Parse an address as sloppily as the API allows (F17: leading zeros are decimal), canonically.

    Raises:
        ValueError: it is no address.
    """
    text = text.strip()
    if ":" not in text:
        parts = text.split(".")
        if len(parts) != 4 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError(f"{text!r} is not a valid IP address")
        text = ".".join(str(int(part)) for part in parts)
    return str(ipaddress.ip_address(text))


def canonical_prefix(text: str) -> str:
    """Parse a CIDR as sloppily (F10, F17) and print its network; a bare address is refused.

    Raises:
        ValueError: it is no prefix.
    """
    address, slash, length = text.strip().partition("/")
    if not slash:
        raise ValueError(f"{text!r} is not a valid CIDR")
    return str(ipaddress.ip_network(f"{canonical_address(address)}/{length}", strict=False))


@lru_cache(maxsize=4096)
def parse_prefix(text: str) -> Network:
    """Parse a canonical prefix; the same few hundred come back with every plan."""
    return ipaddress.ip_network(text)


def is_inside(address: str, prefixes: Iterable[str]) -> bool:
    """Whether one of the canonical prefixes, of whatever family, has the address."""
    found = ipaddress.ip_address(address)
    return any(found in parse_prefix(prefix) for prefix in prefixes)
