"""One socket for both tables, and what is known about others who write to nf_tables."""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_svc.host.nfnetlink import GenerationPassed, Request, Socket

_WRAP = 1 << 32


class Writer:
    """Sends transactions, and knows whether anybody else's came between.

    The kernel counts the transactions of a network namespace. While that number only moves by ours,
    the tables hold what we put there, and reading them back is one message.
    """

    def __init__(self) -> None:
        self.socket = Socket()
        self._generation: int | None = None

    def close(self) -> None:
        """Give the socket back."""
        self.socket.close()

    def commit(self, requests: Sequence[Request]) -> None:
        """Do all of it or nothing; raises Refused, OSError."""
        if not requests:
            return
        try:
            self.socket.commit(requests, generation=self._generation)
        except GenerationPassed:
            self._generation = None
            self.socket.commit(requests)
        if self._generation is not None:
            self._generation = (self._generation + 1) % _WRAP or 1

    def start_check(self) -> None:
        """From now on count; to be called before the tables are read."""
        self._generation = self.socket.generation()

    def doubt(self) -> None:
        """What the tables hold is not known."""
        self._generation = None

    def is_untouched(self) -> bool:
        """Whether nobody wrote since the tables were read but we."""
        if self._generation is None:
            return False
        if self._generation == self.socket.generation():
            return True
        self._generation = None
        return False
