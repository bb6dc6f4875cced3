"""What a backend may show of itself besides its frontends: `show` prints it, metrics collect it.

A backend offers these by having methods of these names; one that keeps no flows of its own (the
kernel's conntrack has them) leaves `flows` out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

from ebpf_svc.model.desired import FrontendKey, PlanKey
from ebpf_svc.model.net import Family


@dataclass(frozen=True, slots=True)
class FlowView:
    """One client's flow to a frontend."""

    client: str
    client_port: int
    frontend: FrontendKey
    backend: str
    backend_port: int
    state: str
    """In words: `established`, `closing` …; empty for protocols without one."""
    idle_s: int
    family: Family


@dataclass(frozen=True, slots=True)
class KernelPart:
    """One thing a backend has put into the kernel."""

    kind: str
    """`map`, `program`, `rule` …"""
    name: str
    place: str
    """Where it is pinned or attached."""
    detail: str
    """Size, filling, whatever a reader of the table wants beside the name."""


@runtime_checkable
class ShowsFlows(Protocol):
    """A backend that keeps flows itself."""

    def flows(self) -> Iterable[FlowView]:
        """Flows alive now, in any order; needs no `open()`."""


@runtime_checkable
class ShowsParts(Protocol):
    """A backend that can list what it has put into the kernel."""

    def parts(self) -> Iterable[KernelPart]:
        """Every map, program and rule of ours that is there; needs no `open()`."""


@dataclass(frozen=True, slots=True)
class MapFill:
    """How full a table of the kernel is."""

    name: str
    entries: int
    capacity: int
    evicts: bool
    """When full, the entry used longest ago makes room; else nothing new fits."""


@dataclass(frozen=True, slots=True)
class FlowCounts:
    """Flows that are alive, by whom they go to."""

    by_port: Mapping[PlanKey, int]
    """Service ports without any are left out."""
    draining: Mapping[Family, int]
    """Of service ports that are gone."""


class Traffic(NamedTuple):
    """What a service port got since it is served, requests and replies together."""

    connections: int
    """Flows opened, and destinations chosen at a socket."""
    packets: int
    bytes: int


@runtime_checkable
class ShowsTraffic(Protocol):
    """A backend that counts what each service port gets."""

    def traffic(self) -> Mapping[PlanKey, Traffic]:
        """By service port; those without any are left out, and all while not open."""


@runtime_checkable
class ShowsDrops(Protocol):
    """A backend that counts packets it did not forward."""

    def drops(self) -> Mapping[str, int]:
        """Reason, in snake case -> packets since the counters were made; empty while not open."""


@runtime_checkable
class ShowsFill(Protocol):
    """A backend whose tables can get full."""

    def fill(self) -> Iterable[MapFill]:
        """Each table; may be some seconds old, and nothing while not open."""


@runtime_checkable
class ShowsFlowCounts(Protocol):
    """A backend that can count its flows without listing them."""

    def flow_counts(self) -> FlowCounts:
        """Flows of each service port; may be some seconds old, and none while not open."""


@runtime_checkable
class ShowsStart(Protocol):
    """A backend that knows how long its start took."""

    def start_s(self) -> Mapping[str, float]:
        """Step, one word -> seconds; empty until it is open."""


class Series(NamedTuple):
    """One value of a counter or gauge only this backend has."""

    name: str
    """As `metrics.catalog` spells it."""
    labels: Mapping[str, str]
    value: float


@runtime_checkable
class ShowsSeries(Protocol):
    """A backend with metrics of its own, such as kube-proxy has for iptables."""

    def series(self) -> Iterable[Series]:
        """Each value; nothing while not open."""


class Happening(StrEnum):
    """What happened to a flow."""

    OPENED = "opened"
    """A client got a backend, by packet or at its socket."""
    ENDING = "ending"
    """One side has ended it."""
    CLOSED = "closed"
    """Both sides have, or one reset it."""
    REFUSED = "refused"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class FlowEvent:
    """Something that happened to a flow."""

    time_s: float
    """Since the epoch."""
    what: Happening
    client: str
    """Empty where only its socket is known."""
    client_port: int
    netns: int
    """Cookie of the network namespace of the socket that called; 0 = it was a packet."""
    frontend: FrontendKey
    backend: tuple[str, int] | None
    reason: str
    """Why it was refused or dropped, or who ended it: a key of `monitor.words`."""
    device: int
    """Index of the device the packet came by or leaves; 0 = none."""
    masquerade: bool = False
    hairpin: bool = False


class EventStream(Protocol):
    """What happens from now on; closing it ends the telling, and so does the end of the process."""

    @property
    def lost(self) -> int:
        """Events there was no room for."""

    def wait(self, timeout_s: float) -> Sequence[FlowEvent]:
        """Events that came since the last call, oldest first; none when time is over."""

    def close(self) -> None:
        """Stop listening."""


@runtime_checkable
class ShowsEvents(Protocol):
    """A backend that can tell what happens to flows while it happens."""

    def events(self) -> EventStream:
        """Listen; needs no `open()`.

        Raises:
            UnsupportedHost: nothing serves here, another one listens, or this kernel cannot tell.
        """


@runtime_checkable
class HandsOver(Protocol):
    """A backend whose rules a kube-proxy of the same mode takes for its own."""

    def hand_over(self) -> None:
        """Leave our rules as they are, without the sign that they are ours; needs no `open()`."""
