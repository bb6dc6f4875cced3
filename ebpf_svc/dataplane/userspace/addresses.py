"""Which addresses the host of the calling thread has."""

from __future__ import annotations

import socket


class NodeAddresses:
    """Finds out by trying, and remembers, for a trial costs four calls of the kernel."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def has(self, address: str) -> bool:
        """Whether an address is on this node: only then can a socket have it."""
        known = self._known.get(address)
        if known is None:
            known = self._known[address] = _can_bind(address)
        return known

    def forget(self) -> None:
        """Find out anew."""
        self._known.clear()


def _can_bind(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True
