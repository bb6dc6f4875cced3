"""The kernel as ipvs mode writes and reads it: IPVS, ipsets and kube-ipvs0, in bulk.

Works in the network namespace of the thread that opens it. Iptables is not here: its rules do not
change with services.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ebpf_svc.dataplane.ipvs.sets import SPECS, SetEntry, specs_of
from ebpf_svc.dataplane.ipvs.state import Found, Steps
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import dummy, rtnetlink
from ebpf_svc.host.ipset import ERR_BUSY, ERR_FIND_TYPE, Entry, Sets, Spec
from ebpf_svc.host.ipvs import Dest, Ipvs, RealServer, ServerKey
from ebpf_svc.host.kubeproxy import LINK
from ebpf_svc.host.netlink import Failure
from ebpf_svc.model.net import Family, family_of

_TEMPORARY = "EBPF-SVC-TMP"
LOADING_S = 2.0
"""How long a module may take that others are loading."""
Item = TypeVar("Item")


@dataclass(slots=True)
class Refused:
    """What the kernel did not take, with its reasons."""

    servers: dict[ServerKey, str] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    entries: dict[SetEntry, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.servers or self.addresses or self.entries)


class Kernel:
    """Open sockets to all three; `close()` gives them back."""

    def __init__(self) -> None:
        """Open; raises DataplaneError when the kernel lacks one of them."""
        self._ipvs = Ipvs()
        try:
            self._sets = Sets()
            self._route = rtnetlink.Socket()
        except OSError as error:
            self._ipvs.close()
            raise DataplaneError(f"ipsets cannot be reached: {error.strerror}") from error
        self._index = 0

    def close(self) -> None:
        """Leave everything as it is."""
        self._ipvs.close()
        self._sets.close()
        self._route.close()

    def prepare(self, families: Sequence[Family]) -> None:
        """Make device and sets unless they are there; raises DataplaneError."""
        self._index = dummy.create(self._route, LINK)
        for family in families:
            for spec in specs_of(family):
                failure = self._create(spec)
                if failure is not None:
                    self._adapt(spec, failure)

    def _create(self, spec: Spec) -> Failure | None:
        """Make a set. The kernel loads the module of its type, but does not wait for one that is
        being loaded for somebody else at that moment.
        """
        (failure,) = self._sets.create([spec])
        until_s = time.monotonic() + LOADING_S
        while failure is not None and failure.errno == ERR_FIND_TYPE:
            if time.monotonic() > until_s:
                break
            time.sleep(LOADING_S / 20)
            (failure,) = self._sets.create([spec])
        return failure

    def _adapt(self, spec: Spec, failure: Failure) -> None:
        """A set of that name is there in another shape, as after kube-proxy: put ours in its place.

        Rules that use it go on with ours, which has all that was in it.
        """
        held = self._sets.read(spec.name)
        if held is None or held.spec.type != spec.type:
            raise DataplaneError(f"ipset {spec.name}: {failure.reason}")
        other = replace(spec, name=_TEMPORARY)
        self._sets.destroy([_TEMPORARY])
        answers = self._sets.create([other])
        answers += self._sets.add((other, entry) for entry in held.entries)
        answers.append(self._sets.swap(_TEMPORARY, spec.name))
        answers += self._sets.destroy([_TEMPORARY])
        for each in answers:
            if each is not None:
                raise DataplaneError(f"ipset {spec.name}: {each.reason}")

    def read(self, families: Collection[Family]) -> Found:
        """Look at all that may be ours; raises DataplaneError."""
        try:
            index = dummy.index_of(LINK)
            here, elsewhere = set(), set()
            for held in dummy.addresses(self._route):
                if held.device != index:
                    elsewhere.add(held.address)
                elif family_of(held.address) in families and not held.address.startswith("fe80:"):
                    here.add(held.address)
            shapes = self._ipvs.shapes()
            reals = self._ipvs.real_servers(shapes)
            lists = {spec.name: self._sets.read(spec.name) for spec in _specs(families)}
        except OSError as error:
            raise DataplaneError(f"the kernel cannot be read back: {error.strerror}") from error
        return Found(
            {key: shape for key, shape in shapes.items() if family_of(key.address) in families},
            {key: each for key, each in reals.items() if family_of(key.address) in families},
            here,
            frozenset(elsewhere),
            {name: held.entries for name, held in lists.items() if held is not None},
        )

    def real_servers(self, keys: Iterable[ServerKey]) -> Mapping[ServerKey, list[RealServer]]:
        """The real servers of these virtual servers at least; raises DataplaneError."""
        try:
            return self._ipvs.real_servers(keys)
        except OSError as error:
            raise DataplaneError(f"connections cannot be counted: {error.strerror}") from error

    def connection_counts(
        self, keys: Sequence[ServerKey]
    ) -> Mapping[ServerKey, Mapping[Dest, int]]:
        """Connections of these virtual servers' real ones; raises DataplaneError."""
        try:
            return self._ipvs.connection_counts(keys)
        except OSError as error:
            raise DataplaneError(f"connections cannot be counted: {error.strerror}") from error

    def take(self, steps: Steps) -> Refused:
        """Carry steps out in their order; what is refused holds nothing else back."""
        refused = Refused()
        kernel = self._ipvs
        note = refused.servers
        _note(refused.entries, steps.add_entries, self._sets.add(_elements(steps.add_entries)))
        _note_servers(note, steps.add_servers, kernel.add_servers(steps.add_servers))
        _note_servers(note, steps.set_servers, kernel.set_servers(steps.set_servers))
        _note_servers(note, steps.add_dests, kernel.add_dests(steps.add_dests))
        _note_servers(note, steps.set_dests, kernel.set_dests(steps.set_dests))
        _note(
            refused.addresses,
            steps.add_addresses,
            dummy.add_addresses(self._route, self._index, steps.add_addresses),
        )
        _note_servers(note, steps.remove_dests, kernel.remove_dests(steps.remove_dests))
        _note(note, steps.remove_servers, kernel.remove_servers(steps.remove_servers))
        _note(
            refused.addresses,
            steps.remove_addresses,
            dummy.remove_addresses(self._route, self._index, steps.remove_addresses),
        )
        gone = self._sets.remove(_elements(steps.remove_entries))
        _note(refused.entries, steps.remove_entries, gone)
        return refused

    def set_timeouts(self, tcp_s: float, tcp_fin_s: float, udp_s: float) -> None:
        """Set how long idle connections are kept, each unless 0 (V3); raises DataplaneError."""
        failure = self._ipvs.set_timeouts(int(tcp_s), int(tcp_fin_s), int(udp_s))
        if failure is not None:
            raise DataplaneError(f"IPVS timeouts: {failure.reason}")

    def rest(self, found: Found, keys: Collection[ServerKey]) -> None:
        """Let these virtual servers open no more connections; raises DataplaneError."""
        wanted = [
            (key, real.dest, 0) for key in keys for real in found.reals.get(key, ()) if real.weight
        ]
        _raise_first("real server", self._ipvs.set_dests(wanted))

    def remove_servers(self, keys: Iterable[ServerKey]) -> None:
        """Remove virtual servers, against the order in which they are added: see `state.compare`.

        Raises:
            DataplaneError: the kernel refused one; the others are gone.
        """
        _raise_first("virtual server", self._ipvs.remove_servers(sorted(keys, reverse=True)))

    def remove_device(self) -> None:
        """Remove kube-ipvs0 with its addresses; raises DataplaneError."""
        dummy.remove(self._route, LINK)

    def remove_sets(self, families: Collection[Family]) -> None:
        """Destroy our sets; one that somebody else's rules use stays. Raises DataplaneError."""
        answers = self._sets.destroy(spec.name for spec in _specs(families))
        used = (one for one in answers if one is not None and one.errno != ERR_BUSY)
        _raise_first("ipset", list(used))


def _specs(families: Collection[Family]) -> list[Spec]:
    return [spec for spec in SPECS.values() if spec.family in families]


def _elements(entries: Iterable[SetEntry]) -> Iterable[tuple[Spec, Entry]]:
    return ((SPECS[name], entry) for name, entry in entries)


def _note(
    refused: dict[Item, str], items: Sequence[Item], answers: Sequence[Failure | None]
) -> None:
    for item, failure in zip(items, answers, strict=True):
        if failure is not None:
            refused.setdefault(item, failure.reason)


def _note_servers(
    refused: dict[ServerKey, str],
    items: Sequence[tuple[ServerKey, object] | tuple[ServerKey, Dest, int]],
    answers: Sequence[Failure | None],
) -> None:
    """The first refusal tells: without its virtual server no real one can be added."""
    _note(refused, [item[0] for item in items], answers)


def _raise_first(what: str, answers: Sequence[Failure | None]) -> None:
    for failure in answers:
        if failure is not None:
            raise DataplaneError(f"{what}: {failure.reason}")
