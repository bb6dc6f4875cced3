"""Ranges addresses and ports are allocated from, and the choice of a free one.

The choice starts from a hash of the claimant's name, so that nodes with the same manifests agree
without talking to each other. Its lower band is left to those who ask for a value by number, as
the API server does (KEP-3070, KEP-3668): tutorials' 30080 is never given to somebody else first.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Container, Iterator
from itertools import chain

from ebpf_svc.errors import ConfigError
from ebpf_svc.model.net import Family, family_of


class AddressRange:
    """The cluster IPs of one family."""

    def __init__(self, prefix: str) -> None:
        try:
            self._network = ipaddress.ip_network(prefix)
        except ValueError as error:
            raise ConfigError("service_cidrs", got=prefix, expected="prefixes") from error
        self.family = family_of(prefix)
        size = self._network.num_addresses
        # The first address names the network; IPv4 reserves the last one too.
        self._end = size - 1 if self.family is Family.V4 and size > 2 else size
        self._band = 1 if size <= 16 else min(max(16, size // 16), 256)

    def __str__(self) -> str:
        return str(self._network)

    def __contains__(self, address: str) -> bool:
        if family_of(address) is not self.family:
            return False
        offset = int(ipaddress.ip_address(address)) - int(self._network.network_address)
        return 1 <= offset < self._end

    def choose(self, name: str, taken: Container[str]) -> str:
        """The free address that belongs to this name; empty when all are taken."""
        base = int(self._network.network_address)
        for offset in _candidates(name, 1, self._band, self._end):
            address = str(type(self._network.network_address)(base + offset))
            if address not in taken:
                return address
        return ""


class PortRange:
    """The node ports."""

    def __init__(self, bounds: tuple[int, int]) -> None:
        self._first, last = bounds
        if not 1 <= self._first <= last <= 65535:
            raise ConfigError("node_port_range", got=bounds, expected="two ports, lower first")
        self._end = last + 1
        size = self._end - self._first
        self._band = self._first + (0 if size <= 16 else min(max(16, size // 32), 128))

    def __str__(self) -> str:
        return f"{self._first}-{self._end - 1}"

    def __contains__(self, port: int) -> bool:
        return self._first <= port < self._end

    def choose(self, name: str, taken: Container[int]) -> int:
        """The free port that belongs to this name; 0 when all are taken."""
        for port in _candidates(name, self._first, self._band, self._end):
            if port not in taken:
                return port
        return 0


def _candidates(name: str, first: int, band: int, end: int) -> Iterator[int]:
    """All of [first, end): from the name's own place upwards and around, the lower band last."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    start = band + int.from_bytes(digest, "big") % (end - band)
    return chain(range(start, end), range(band, start), range(first, band))
