"""Make traffic between the testbed's hosts and read how it ended.

serve(pod, tcp=[80], udp=[53])
answers = ask(cluster.client, "198.51.100.7", 80, count=20)
with load(pod, [Target("10.96.0.10", 80)], workers=4) as running: ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from ebpf_svc.model.net import Protocol
from ebpf_svc.testbed.control import PeerError
from ebpf_svc.testbed.host import Host
from ebpf_svc.testbed.patience import CROWD, PATIENCE


class Outcome(StrEnum):
    """How a request ended for the one who asked."""

    OK = "ok"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one request ended; the fields after `detail` are empty unless it was answered."""

    outcome: Outcome
    latency_ms: float = 0.0
    detail: str = ""
    """Name of the errno."""
    server: str = ""
    client: str = ""
    """Source address the server saw."""
    client_port: int = 0
    peer: str = ""
    """Address the client's socket says it talks to (getpeername, or recvfrom's)."""
    peer_port: int = 0
    request_bytes: int = 0
    reply_bytes: int = 0

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Answer:
        return cls(**{**raw, "outcome": Outcome(raw["outcome"])})


@dataclass(frozen=True, slots=True)
class Target:
    """What to ask and how."""

    address: str
    port: int
    protocol: Protocol = Protocol.TCP
    timeout_s: float = 1.0
    source_port: int = 0
    """0 = any."""
    own_port: bool = False
    """From a port that no earlier request of the host had which asked for one of its own, of that
    protocol and family: what is remembered of a port is then nothing to this request.
    """
    connected: bool = True
    """UDP: connect the socket, so that errors arrive; else sendto and recvfrom."""
    mapped: bool = False
    """Use an IPv6 socket and the v4-mapped address, as dual-stack programs do."""
    request_bytes: int = 0
    reply_bytes: int = 0
    """Least sizes of request and answer; larger than the MTU makes UDP fragment."""

    @property
    def waits_s(self) -> float:
        """The timeout on this machine."""
        return self.timeout_s * PATIENCE

    def raw(self) -> dict[str, Any]:
        """As a host's peer takes it."""
        return {**asdict(self), "timeout_s": self.waits_s}


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask a target some times, one request after the other, each on a new socket."""

    host: Host
    target: Target
    count: int = 1


@dataclass(frozen=True, slots=True)
class Account:
    """What a load counted."""

    ok: int
    failed: int
    servers: dict[str, int]
    failures: tuple[dict[str, Any], ...]
    """The first failures: outcome, detail, target and `at_s` since the load began."""
    slowest_ms: float
    least: int
    """Requests that ended of the worker with the fewest: from 1 on none is under way that was when
    the count began.
    """

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Account:
        return cls(**{**raw, "failures": tuple(raw["failures"])})


def serve(
    host: Host,
    *,
    tcp: Iterable[int] = (),
    udp: Iterable[int] = (),
    name: str | None = None,
    address: str = "",
) -> None:
    """Answer on ports of a host, as `name` (default: the host's), until it goes or is told to stop.

    Args:
        address: the only address to listen on; default all, of both families.
    """
    host.peer.call("serve", name=name or host.name, ports=_ports(tcp, udp), address=address)


def stop_serving(host: Host, *, tcp: Iterable[int] = (), udp: Iterable[int] = ()) -> None:
    """Close ports and their connections: new requests are refused by the host itself."""
    host.peer.call("stop_serving", ports=_ports(tcp, udp))


def ask(
    host: Host, address: str, port: int, protocol: Protocol = Protocol.TCP, *, count: int = 1,
    **options: Any,
) -> list[Answer]:  # fmt: skip
    """Ask from a host, `count` times; options are those of Target."""
    return ask_all([Probe(host, Target(address, port, protocol, **options), count)])[0]


def ask_all(probes: Sequence[Probe]) -> list[list[Answer]]:
    """Make many probes at the same time; answers stand in the order of the probes.

    The whole takes as long as the slowest probe, so a table with timeouts in it costs one timeout;
    on an emulated machine it is one for each `CROWD`.
    """
    crowds = (probes[first : first + CROWD] for first in range(0, len(probes), CROWD))
    return [answers for crowd in crowds for answers in _ask_crowd(crowd)]


def _ask_crowd(probes: Sequence[Probe]) -> list[list[Answer]]:
    by_host: dict[Host, list[int]] = {}
    for position, probe in enumerate(probes):
        by_host.setdefault(probe.host, []).append(position)
    futures: list[tuple[list[int], Future[Any]]] = []
    for host, positions in by_host.items():
        raw = [{**probes[i].target.raw(), "count": probes[i].count} for i in positions]
        futures.append((positions, host.peer.submit("ask", probes=raw)))
    longest_s = max((probe.target.waits_s * probe.count * 2 for probe in probes), default=0.0)
    answers: list[list[Answer]] = [[] for _ in probes]
    for positions, future in futures:
        for position, got in zip(
            positions, future.result(longest_s + 10.0 * PATIENCE), strict=True
        ):
            answers[position] = [Answer.of(one) for one in got]
    return answers


def spread(answers: Iterable[Answer]) -> Counter[str]:
    """How many answers each server gave; requests without an answer count as their outcome."""
    return Counter(answer.server if answer.ok else answer.outcome.value for answer in answers)


class Connection:
    """An open socket of a host: a TCP connection or a UDP socket, asked now and then."""

    def __init__(self, host: Host, target: Target) -> None:
        self._host, self._target = host, target
        opened = host.peer.call("open", target=target.raw(), takes_s=target.waits_s)
        if opened["outcome"] != Outcome.OK:
            raise PeerError(f"{host.name} cannot open {target}: {opened}")
        self._channel: int = opened["channel"]

    def ping(self) -> Answer:
        """One request on the socket."""
        takes_s = 2 * self._target.waits_s
        return Answer.of(self._host.peer.call("ping", channel=self._channel, takes_s=takes_s))

    def close(self) -> None:
        """Close the socket; does nothing when its host is gone."""
        if self._host.has_peer:
            self._host.peer.call("close", channel=self._channel)


@contextmanager
def connection(host: Host, target: Target) -> Iterator[Connection]:
    """An open socket that is closed in the end; raises PeerError when it cannot be opened."""
    conn = Connection(host, target)
    try:
        yield conn
    finally:
        conn.close()


class Load:
    """Workers on a host that ask targets in turn until stopped."""

    def __init__(
        self, host: Host, targets: Sequence[Target], *, workers: int, pause_ms: float
    ) -> None:
        self._host = host
        self._longest_s = 2 * max(target.waits_s for target in targets)
        raw = [target.raw() for target in targets]
        self._number: int = host.peer.call(
            "start_load", targets=raw, workers=workers, pause_s=pause_ms / 1e3
        )
        self._final: Account | None = None

    def read(self, *, reset: bool = False) -> Account:
        """The account so far; `reset` begins a new one."""
        return Account.of(self._host.peer.call("read_load", load=self._number, reset=reset))

    def stop(self) -> Account:
        """Let every worker finish, then give the account; stopping again gives the same."""
        if self._final is None:
            raw = self._host.peer.call("stop_load", load=self._number, takes_s=self._longest_s)
            self._final = Account.of(raw)
        return self._final


@contextmanager
def load(
    host: Host, targets: Sequence[Target], *, workers: int = 4, pause_ms: float = 5.0
) -> Iterator[Load]:
    """Keep asking during the block, stopped at its end."""
    running = Load(host, targets, workers=workers, pause_ms=pause_ms)
    try:
        yield running
    finally:
        running.stop()


def _ports(tcp: Iterable[int], udp: Iterable[int]) -> list[tuple[str, int]]:
    return [("TCP", port) for port in tcp] + [("UDP", port) for port in udp]
